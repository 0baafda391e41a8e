import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import llama, saved

from glalm.config.strict import RunError
from glalm.data.loader import Windows
from glalm.evals import perplexity as module
from glalm.evals.eval_model import EvalModel
from glalm.evals.evaluator import EvalContext
from glalm.evals.inputs import open_eval_model
from glalm.evals.options import EvalConfig
from glalm.evals.perplexity import PerplexityEvaluator, compute_perplexity, summarize_losses
from glalm.hf import GLALMConfig, GLALMForCausalLM


def test_of_all_windows_each_from_a_fresh_state(model, true_losses, stream):
    windows = Windows(stream(7 * 12 + 5), 12)  # 7 windows, the last batch of 3 is smaller
    context, done = EvalContext(), []
    context.advance = done.append
    result = compute_perplexity(EvalModel(model), windows, 3, context)

    means = np.array([true_losses(windows[i]).mean() for i in range(7)])
    assert result["nats_per_token"] == pytest.approx(means.mean(), abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(means.mean()), rel=1e-5)
    error = means.std(ddof=1) / math.sqrt(7)
    assert result["standard_error"] == pytest.approx(error, rel=1e-3)
    assert result["perplexity_low"] == pytest.approx(math.exp(means.mean() - error), rel=1e-4)
    assert result["perplexity_high"] == pytest.approx(math.exp(means.mean() + error), rel=1e-4)
    assert (result["windows"], result["tokens"]) == (7, 84)
    assert done == [36, 36, 12]


@torch.no_grad()
def test_of_transformers_own_model_as_transformers_computes_it(stream):
    model, windows = llama(vocab_size=64), Windows(stream(50), 12)
    rows = torch.from_numpy(np.stack([windows[i] for i in range(4)]).astype(np.int64))
    expected = np.mean([model(row[None], labels=row[None]).loss.item() for row in rows])
    result = compute_perplexity(EvalModel(model), windows, 3, EvalContext())
    assert result["nats_per_token"] == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["gla", "attention"])
def test_documents_are_read_as_a_model_trained_with_resets_saw_them(mixer, stream, monkeypatch):
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 64}
    model = GLALMForCausalLM(GLALMConfig(**shape, mixer=mixer, initializer_range=0.3)).eval()
    split = stream(7, 20, 1, 15, 30)
    split.sha256 = "f"
    borders = np.cumsum([0, 7, 20, 1, 15, 30])
    split.document_starts = lambda start, stop: borders[(borders >= start) & (borders < stop)]
    run = SimpleNamespace(data=SimpleNamespace(document_boundaries="reset_state"))
    monkeypatch.setattr(module, "open_split", lambda config, model, name: split)
    evaluator = PerplexityEvaluator(EvalModel(model, train_length=12, run_config=run), EvalConfig(batch_size=4))

    nats, tokens = [], []
    for i in range(6):  # windows of 12, cut again wherever a document starts
        window = split.stream[i * 12 : i * 12 + 13].astype(np.int64)
        cuts = [0, *(borders[(borders > i * 12) & (borders <= i * 12 + 12)] - i * 12), 13]
        pieces = [window[a:b] for a, b in pairwise(cuts) if b - a > 1]
        losses = []
        for piece in pieces:
            ids = torch.from_numpy(piece)
            losses += F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none").tolist()
        nats.append(sum(losses))
        tokens.append(len(losses))
    result = evaluator.run(EvalContext())
    assert result["tokens"] == sum(tokens) < 72
    assert result["nats_per_token"] == pytest.approx(sum(nats) / sum(tokens), abs=1e-5)
    assert evaluator.settings["document_boundaries"] == "reset_state"


def test_bits_per_byte_are_of_the_text(stream, tmp_path):
    """The tokenizer has a token a byte, and </s>, which has none."""
    eval_model = open_eval_model(
        EvalConfig(checkpoint=str(saved(tmp_path / "bytes", llama())), runs_dir=str(tmp_path)), torch.device("cpu")
    )
    text = "one, zwölf, née " * 3
    documents = [[*eval_model.tokenizer.encode(text), eval_model.tokenizer.eos_id] for _ in range(2)]
    tokens = stream(10)
    tokens.stream = np.array([eval_model.tokenizer.eos_id, *documents[0], *documents[1]])
    tokens.source_tokens = {"memory": len(tokens.stream)}
    windows = Windows(tokens, 11)
    result = compute_perplexity(eval_model, windows, 3, EvalContext())
    rows = np.stack([windows[i] for i in range(len(windows))])
    targets = torch.from_numpy(rows[:, 1:])
    with torch.no_grad():
        logits = eval_model.causal_lm(torch.from_numpy(rows[:, :-1])).logits
    nats = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").double().sum(1).numpy()
    counts = (targets != eval_model.tokenizer.eos_id).sum(1).numpy()
    assert result["bytes"] == counts.sum() < result["tokens"]
    bits = nats.sum() / math.log(2) / counts.sum()
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    residuals = nats / math.log(2) - bits * counts
    error = math.sqrt((residuals**2).sum() / (len(nats) - 1) * len(nats)) / counts.sum()
    assert result["bits_per_byte_error"] == pytest.approx(error, rel=1e-4)
    eval_model.tokenizer = None
    assert compute_perplexity(eval_model, windows, 3, EvalContext())["bits_per_byte"] is None


def test_one_window_has_no_standard_error(model, stream):
    result = compute_perplexity(EvalModel(model), Windows(stream(13), 12), 4, EvalContext())
    assert result["standard_error"] is result["perplexity_low"] is result["perplexity_high"] is None


def test_weighted_means_are_ratios():
    means, weights = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([10, 30, 5])
    result = summarize_losses(means, weights)
    ratio = (10 + 60 + 20) / 45
    assert result["nats_per_token"] == pytest.approx(ratio)
    residuals = [10 * (1 - ratio), 30 * (2 - ratio), 5 * (4 - ratio)]
    assert result["standard_error"] == pytest.approx(math.sqrt(sum(r * r for r in residuals) * 3 / 2) / 45)
    assert summarize_losses(means, torch.tensor([7, 7, 7])) == pytest.approx(summarize_losses(means))
    assert set(summarize_losses(torch.empty(0)).values()) == {None}


def test_losses_that_are_no_numbers_are_named(model, stream, monkeypatch):
    monkeypatch.setattr(EvalModel, "score_tokens", lambda self, ids, *_, **__: (torch.full(ids.shape, math.nan), None))
    with pytest.raises(RunError, match="the losses of 6 of 6 windows are not finite"):
        compute_perplexity(EvalModel(model), Windows(stream(50), 8), 2, EvalContext())


def test_a_diverged_model_still_has_a_finite_perplexity():
    assert math.isfinite(summarize_losses(torch.tensor([1e4, 2e4]))["perplexity_high"])
