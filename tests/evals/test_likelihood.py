import math

import pytest
import tiny
import torch
from transformers import MambaConfig, MambaForCausalLM

from glalm.config.strict import ConfigError
from glalm.evals.eval_model import EvalModel
from glalm.evals.likelihood import Choices, make_batches, score_choices, score_documents, score_shared
from glalm.hf import GLALMConfig, GLALMForCausalLM

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 64}


def ours(**changes) -> GLALMForCausalLM:
    torch.manual_seed(0)
    return GLALMForCausalLM(GLALMConfig(**SHAPE | changes, initializer_range=0.3)).eval()


MODELS = {
    "gla": ours,
    "hybrid": lambda: ours(layers=["attention", "gla"]),
    "deltanet": lambda: ours(mixer="deltanet"),
    "mamba2": lambda: ours(mixer="mamba2", mamba2={"head_dim": 16}),
    "llama": lambda: tiny.llama(vocab_size=64),
    "mamba of transformers": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, bytes_per_state=4, initializer_range=0.3)
    ).eval(),
}


@pytest.fixture(scope="module", params=MODELS)
def eval_model(request) -> EvalModel:
    return EvalModel(MODELS[request.param]())


def ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(64, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def directly(eval_model: EvalModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """From the logits of one forward over one row."""
    row = torch.tensor([context + continuation])
    logits = eval_model.causal_lm(row[:, :-1], use_cache=False).logits[0, -len(continuation) :].double()
    wanted = torch.tensor(continuation)
    nats = logits.log_softmax(-1).gather(-1, wanted[:, None]).sum().item()
    return nats, torch.equal(logits.argmax(-1), wanted)


def contexts(eval_model: EvalModel) -> list[Choices]:
    """Shared and not, of unlike lengths, one-token continuations among them, and one that the model would write."""
    found = [
        Choices(context, ids(*lengths, seed=i))
        for i, (context, lengths) in enumerate(
            zip(
                ids(20, 3, 31, 12, 1, 20, 20),
                [(3, 5, 1), (4,), (2, 2, 2, 2), (1, 1), (6, 5), (9,), (1, 7, 2)],
                strict=True,
            )
        )
    ]
    with torch.no_grad():
        likeliest = eval_model.causal_lm(torch.tensor([found[3][0]])).logits[0, -1].argmax().item()
    found[3][1].append([likeliest])
    return found


@pytest.mark.parametrize("worth", [5, math.inf], ids=["contexts read once", "every row whole"])
@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_equal_those_computed_directly(eval_model, worth, batch_tokens, monkeypatch):
    monkeypatch.setattr("glalm.evals.likelihood.MIN_SAVED_TOKENS", worth)
    asked, scored = contexts(eval_model), []
    answers = score_choices(eval_model, asked, 64, batch_tokens, scored.append)
    for (context, continuations), found in zip(asked, answers, strict=True):
        for continuation, (nats, greedy) in zip(continuations, found, strict=True):
            expected, likeliest = directly(eval_model, context, continuation)
            assert nats == pytest.approx(expected, abs=2e-4)
            assert greedy == likeliest
    assert answers[3][-1][1]  # what the model would write
    assert sum(scored) == sum(len(continuations) for _, continuations in asked)


def test_shared_contexts_are_read_once(monkeypatch):
    eval_model, read = EvalModel(ours()), []

    def counted(ids, *args, **options):
        read.append(ids.numel())
        return EvalModel.forward_features(eval_model, ids, *args, **options)

    monkeypatch.setattr(eval_model, "forward_features", counted)
    (context,) = ids(60)
    score_choices(eval_model, [Choices(context, ids(3, 3, 3, 3))], 64, 1000)
    assert sum(read) == 1 + 60 + 4 * 2  # one more is to see how large a state is


def test_few_states_at_once(eval_model, monkeypatch):
    asked, sizes = contexts(eval_model), []

    def counted(eval_model, groups):
        sizes.append(len(groups))
        return score_shared(eval_model, groups)

    monkeypatch.setattr("glalm.evals.likelihood.MIN_SAVED_TOKENS", 5)
    together = score_choices(eval_model, asked, 64, 1000)
    monkeypatch.setattr("glalm.evals.likelihood.MAX_STATE_BYTES", 1)
    monkeypatch.setattr("glalm.evals.likelihood.score_shared", counted)
    apart = score_choices(eval_model, asked, 64, 1000)
    assert set(sizes) == ({1} if eval_model.accepts_state else set())
    for one, other in zip(together, apart, strict=True):
        assert [nats for nats, _ in one] == pytest.approx([nats for nats, _ in other], abs=2e-4)


@pytest.mark.parametrize("worth", [5, math.inf], ids=["contexts read once", "every row whole"])
def test_the_earliest_of_a_long_context_is_dropped(eval_model, worth, monkeypatch):
    monkeypatch.setattr("glalm.evals.likelihood.MIN_SAVED_TOKENS", worth)
    context, continuation = ids(50, 4)
    [[(nats, _)], [(other, _), _]] = score_choices(
        eval_model,
        [Choices(context, [continuation]), Choices(tuple(context), [continuation, continuation[:2]])],
        20,
        1000,
    )
    expected, _ = directly(eval_model, context[-17:], continuation)  # 20 are read, the last token is only predicted
    assert nats == other == pytest.approx(expected, abs=2e-4)
    with pytest.raises(ValueError, match="4 tokens, more than max_length=3"):
        score_choices(eval_model, [Choices(context, [continuation])], 3, 1000)


def test_carried_state_gives_each_token_all_before_it(eval_model):
    documents = ids(33, 7, 20, 16)
    if not eval_model.accepts_state:
        with pytest.raises(ConfigError, match="MambaForCausalLM cannot read a text in several parts"):
            score_documents(eval_model, documents, 1, 8, 1000)
        return
    found = score_documents(eval_model, documents, 1, segment=8, batch_tokens=24)
    for document, nats in zip(documents, found, strict=True):
        assert nats == pytest.approx(directly(eval_model, [1], document)[0], rel=1e-5, abs=2e-4)


def test_batches():
    lengths = [9, 8, 5, 5, 5, 2, 7]
    assert [len(b) for b in make_batches(lengths, lengths, 16)] == [1, 2, 3, 1]
    assert [len(b) for b in make_batches(lengths, lengths, 1)] == [1] * 7
    assert [len(b) for b in make_batches([2, 9, 3], [2, 9, 3], 16)] == [
        1,
        1,
        1,
    ]  # as long as the longest, wherever it is
    assert list(make_batches([], [], 16)) == []
