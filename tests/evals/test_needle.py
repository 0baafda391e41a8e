import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import llama

from glalm.config.strict import ConfigError, RunError
from glalm.evals import needle
from glalm.evals.eval_model import EvalModel
from glalm.evals.evaluator import EvalContext
from glalm.evals.identity import TEXT_FILE
from glalm.evals.likelihood import Choices
from glalm.evals.needle import NeedleEvaluator, NeedleTask
from glalm.evals.options import EvalConfig, NeedleConfig


class Letters:
    """A tokenizer of characters: 2 stands before every document, 3 after."""

    bos_id, eos_id, vocab_size = 2, 3, 128

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids) -> str:
        return "".join(map(chr, ids))


class Lookup:
    """A model that remembers the last `memory` tokens and says what came after the longest match of what it reads."""

    document_prefix, train_length, vocab_size, tokenizer = (2,), 64, 128, Letters()
    device, accepts_state, is_recurrent, bytes_per_state = torch.device("cpu"), True, False, 2**12

    def __init__(self, memory: int = 10**6):
        self.memory, self.segments = memory, []

    def require_tokenizer(self, evaluator):
        return self.tokenizer

    def require_train_length(self, evaluator):
        return self.train_length

    def require_length(self, length, key):
        pass

    def forward_features(self, ids, mask=None, state=None, return_state=False):
        self.segments.append(ids.shape[1])
        before = [[]] * len(ids) if state is None else state
        said = [row + new for row, new in zip(before, ids.tolist(), strict=True)]
        T = ids.shape[1]
        answers = [[self.next(row[: len(row) - T + t + 1]) for t in range(T)] for row in said] if T < 20 else []
        return torch.tensor(answers), said

    def next(self, row: list[int]) -> int:
        text = row[-self.memory :]
        ends = [i for i in range(12, len(text)) if text[i - 12 : i] == text[-12:]]
        return text[ends[-1]] if ends else 0

    def select_states(self, state, rows):
        return [list(state[i]) for i in rows.tolist()]

    def compute_logits(self, features):
        return 10.0 * F.one_hot(features, 128)


HAY = np.frombuffer(b"It was a bright cold day in April, and the clocks were striking thirteen. " * 40, dtype=np.uint8)


@pytest.fixture
def hay(monkeypatch):
    class Split:
        folder, split, sha256, num_tokens = "memory", "test", "f", len(HAY) + 2

        def read_tokens(self, start, stop):
            return np.concatenate([[2], HAY, [3]])[start:stop]

    monkeypatch.setattr(needle, "open_split", lambda config, model, split: Split())


def config(**settings) -> EvalConfig:
    return EvalConfig(batch_size=3, needle=NeedleConfig(**{"samples": 4, "candidates": 5} | settings))


def task(**changes) -> NeedleTask:
    return NeedleTask(
        **{"tokenizer": Letters(), "document_prefix": (2,), "filler": HAY, "candidates": 5, "seed": 1} | changes
    )


def test_a_sample_is_text_with_the_needle_at_its_depth():
    for depth in (0.0, 0.25, 1.0):
        sample = task().build_sample(600, depth, 7)
        assert len(sample.context) == 600 and sample.context[0] == 2
        text = Letters().decode(sample.context[1:])
        told = text.index("\nThe secret number of the ")
        question = text.index("\nAs was said, the secret number of the ")
        value = text[told:].split(" is ")[1][:5]
        assert text.endswith(" is ") and value.isdigit()
        assert Letters().decode(sample.continuations[0]) == value
        assert len({tuple(a) for a in sample.continuations}) == 5
        filled = question - text.count("\n", 0, told) - (text.index("Remember it.\n") + 13 - told)
        assert told == pytest.approx(depth * filled, abs=1)
        assert text[told + 26 :].split(" is ")[0] == text[question + 39 :].removesuffix(" is ")  # the same key


def test_only_the_needles_place_depends_on_the_depth():
    shallow, deep = (task().build_sample(600, depth, 3) for depth in (0.0, 1.0))
    assert shallow.continuations == deep.continuations
    assert sorted(shallow.context.tolist()) == sorted(deep.context.tolist())
    assert task().build_sample(600, 0.0, 4).continuations != shallow.continuations
    assert task(seed=2).build_sample(600, 0.0, 3).continuations != shallow.continuations


def test_the_question_ends_where_the_candidates_part():
    class Joins(Letters):
        def encode(self, text):
            return super().encode(text.replace(" 1", "X").replace(" 2", "Y"))

    sample = task(tokenizer=Joins(), candidates=50).build_sample(600, 0.5, 1)
    assert Joins().decode(sample.context).endswith(" is") and len(sample.context) == 600
    assert {Joins().decode(a)[0] for a in sample.continuations} == {"X", "Y", " "}


def test_a_model_that_remembers_finds_every_needle(hay):
    model = Lookup()
    evaluator = NeedleEvaluator(model, config(lengths=[400, 1000], depths=[1.0, 0.0]))
    done = []
    context = EvalContext()
    context.advance = done.append
    results = evaluator.run(context)
    assert [(c["length"], c["depth"]) for c in results["cells"]] == [(400, 0.0), (400, 1.0), (1000, 0.0), (1000, 1.0)]
    for cell in results["cells"]:
        assert (cell["token_accuracy"], cell["exact_match"], cell["ranked_first"], cell["mean_rank"]) == (1, 1, 1, 1)
        assert cell["samples"] == 4
    assert results["chance"] == 0.2
    assert max(model.segments) == 64  # the state carried in segments of the training length
    assert sum(done) == evaluator.total_units
    assert (
        evaluator.summarize(results)[0]
        == "needle in 400 tokens, tokens right (ranked first): 1.00 (1.00) at 0%, 1.00 (1.00) at 100%"
    )


def test_a_model_that_forgets_finds_what_is_near(hay):
    results = NeedleEvaluator(Lookup(memory=300), config(lengths=[1000], depths=[0.0, 1.0])).run(EvalContext())
    far, near = results["cells"]
    assert near["exact_match"] == 1
    assert far["exact_match"] == far["ranked_first"] == 0  # a tie ranks last
    assert far["mean_rank"] == 5


def test_few_states_at_once(hay, monkeypatch):
    rows, select = [], Lookup.select_states
    monkeypatch.setattr(Lookup, "select_states", lambda self, s, each: rows.append(len(each)) or select(self, s, each))
    wanted = config(lengths=[400], depths=[0.5])
    together = NeedleEvaluator(Lookup(), wanted).run(EvalContext())
    assert rows == [3 * 5, 5]  # batch_size=3 of four samples, each with five candidates
    monkeypatch.setattr("glalm.evals.likelihood.MAX_STATE_BYTES", 1)
    assert NeedleEvaluator(Lookup(), wanted).run(EvalContext()) == together
    assert rows[2:] == [5] * 4


@torch.no_grad()
@pytest.mark.parametrize("train_length", [16, 50, None])
@pytest.mark.parametrize("make", [None, lambda: llama(vocab_size=64)], ids=["ours", "transformers'"])
def test_scores_are_those_of_whole_forwards(model, make, train_length):
    model = make() if make else model
    random = np.random.default_rng(0)
    answers = [[random.integers(64, size=n).tolist() for n in (3, 5, 1, 4)] for _ in range(3)]
    samples = [Choices(random.integers(64, size=70), a) for a in answers]
    found = needle.score_samples(EvalModel(model, train_length=train_length), samples)
    for sample, result in zip(samples, found, strict=True):
        nats = []
        for i, answer in enumerate(sample.continuations):
            ids = torch.tensor([[*sample.context.tolist(), *answer]])
            logits = model(ids[:, :-1], use_cache=False).logits[0, -len(answer) :]
            nats.append(F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item())
            if i == 0:
                assert result["right"] == (logits.argmax(-1) == torch.tensor(answer)).sum()
        assert result["rank"] == 1 + sum(n <= nats[0] for n in nats[1:])
        assert result["tokens"] == 3


def test_a_model_whose_losses_are_no_numbers_is_refused(hay):
    class Broken(Lookup):
        def compute_logits(self, features):
            return super().compute_logits(features) * math.nan

    evaluator = NeedleEvaluator(Broken(), config(lengths=[400], depths=[0.5]))
    with pytest.raises(RunError, match="15 of 15 log-likelihoods are not finite"):
        evaluator.run(EvalContext())


def test_the_text_of_a_file_is_no_split(hay, monkeypatch):
    file = needle.open_split(None, None, "test")
    file.split = TEXT_FILE
    monkeypatch.setattr(needle, "open_split", lambda *_: file)
    assert NeedleEvaluator(Lookup(), config(lengths=[400])).settings["split"] == TEXT_FILE
    with pytest.raises(ConfigError, match=r"memory \(file\) has 2960 tokens of text; write 'needle.lengths=\[2960\]'"):
        NeedleEvaluator(Lookup(), config(lengths=[4000]))


def test_a_tokenizer_without_digits_is_refused(hay, monkeypatch):
    monkeypatch.setattr(Letters, "encode", lambda self, text: [1 if c.isdigit() else ord(c) for c in text])
    with pytest.raises(ConfigError, match="the tokenizer cannot tell numbers apart"):
        NeedleEvaluator(Lookup(), config(lengths=[400]))


def test_demands(hay):
    with pytest.raises(ConfigError, match=r"needle and question alone are 1\d\d tokens"):
        NeedleEvaluator(Lookup(), config(lengths=[150]))
    with pytest.raises(ConfigError, match=r"memory \(test\) has 2960 tokens of text"):
        NeedleEvaluator(Lookup(), config(lengths=[4000]))
    with pytest.raises(ConfigError, match="depths must lie in"):
        config(depths=[1.5])
