import dataclasses

import numpy as np
import pytest
import torch

from glalm.config.strict import ConfigError
from glalm.evals import generate
from glalm.evals.eval_model import EvalModel
from glalm.evals.evaluator import EvalContext
from glalm.evals.generate import GenerateEvaluator, sample_continuations
from glalm.evals.options import EvalConfig, GenerateConfig


class Numbers:
    """A tokenizer whose text is its token ids; like SentencePiece's, it drops the space that a text starts with."""

    bos_id, eos_id, vocab_size, fingerprint = 1, 2, 64, "numbers"

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return "".join(f" {i}" for i in ids if i not in (self.bos_id, self.eos_id)).removeprefix(" ")


def samples(model, tokenizer, config: GenerateConfig, seed: int) -> list[dict]:
    return sample_continuations(
        EvalModel(model, tokenizer=tokenizer, document_prefix=(1,)), config, seed, EvalContext()
    )


CONFIG = GenerateConfig(tokens=12, temperature=1.0, top_p=1.0, prompts=["5 6 7", "9", "9"])


@torch.no_grad()
def greedy(model, ids: list[int], tokens: int) -> list[int]:
    """By a forward over everything so far for each token."""
    for _ in range(tokens):
        ids = [*ids, model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()]
    return ids[-tokens:]


def test_cold_samples_are_the_greedy_continuation_from_bos(model):
    config = dataclasses.replace(CONFIG, temperature=1e-5)
    for sample, prompt in zip(samples(model, Numbers(), config, seed=0), ([5, 6, 7], [9], [9]), strict=True):
        expected = greedy(model, [1, *prompt], 12)
        assert sample["prompt"] == " ".join(map(str, prompt))
        assert sample["continuation"] == "".join(f" {i}" for i in expected)


def test_eos_ends_a_continuation(model):
    tokenizer = Numbers()
    expected = greedy(model, [1, 9], 12)
    tokenizer.eos_id = expected[4]
    config = dataclasses.replace(CONFIG, temperature=1e-5, prompts=["9"])
    words = samples(model, tokenizer, config, seed=0)[0]["continuation"].split()
    assert words == [str(i) for i in expected[: expected.index(expected[4])]]


def test_the_seed_decides_and_the_global_random_state_is_kept(model):
    before = torch.random.get_rng_state()
    first, again, other = (samples(model, Numbers(), CONFIG, seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == again
    assert first != other
    assert first[1] != first[2]  # the same prompt twice is two draws


def first_tokens(model, **changes) -> set[int]:
    config = dataclasses.replace(CONFIG, tokens=1, prompts=["9"] * 150, **changes)
    drawn = (s["continuation"].split() for s in samples(model, Numbers(), config, seed=0))
    return {int(words[0]) for words in drawn if words}


def test_top_p_and_temperature_decide_what_is_drawn(model):
    with torch.no_grad():
        p, order = model(torch.tensor([[1, 9]])).logits[0, -1].softmax(-1).sort(descending=True)
    nucleus = set(order[: int((p.cumsum(0) < 0.5).sum()) + 1].tolist())
    assert len(nucleus) > 1
    assert first_tokens(model, top_p=0.5) == nucleus
    assert first_tokens(model, temperature=1e3) & set(order[50:].tolist())  # transformers' default top_k is off


def test_tokens_that_the_tokenizer_lacks_are_never_drawn(model, monkeypatch):
    assert max(first_tokens(model, temperature=1e3)) >= 40
    monkeypatch.setattr(Numbers, "vocab_size", 40)
    assert max(first_tokens(model, temperature=1e3)) < 40


def test_a_prompt_does_not_end_within_a_character(model, monkeypatch):
    class Bytes(Numbers):
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    class Split:
        num_documents = 1

        def read_document(self, i):
            return np.frombuffer("a日本語日本語".encode(), dtype=np.uint8)

    monkeypatch.setattr(generate, "open_split", lambda *_: Split())
    assert generate.find_prompts(EvalConfig(), EvalModel(model, tokenizer=Bytes(), document_prefix=())) == ["a日本語"]


@pytest.mark.parametrize("prompts", [[""], []])
def test_an_empty_prompt_is_a_document_from_its_start(model, prompts):
    config = dataclasses.replace(CONFIG, temperature=1e-5, prompts=prompts)
    expected = [" ".join(map(str, greedy(model, [1], 12)))] * len(prompts)
    assert [s["continuation"] for s in samples(model, Numbers(), config, seed=0)] == expected


def test_the_job_prints_its_texts_and_needs_a_tokenizer(model):
    config = EvalConfig(generate=dataclasses.replace(CONFIG, temperature=1e-5))
    evaluator = GenerateEvaluator(EvalModel(model, tokenizer=Numbers(), document_prefix=(1,)), config)
    texts = evaluator.run(EvalContext())
    assert evaluator.summarize(texts)[0] == f"--- 5 6 7{texts[0]['continuation']}"
    with pytest.raises(ConfigError, match=r"evals=\[generate\]: model has no readable tokenizer"):
        GenerateEvaluator(EvalModel(model), config)


def test_processes_share_the_prompts_without_changing_a_text(model):
    class Half(EvalContext):
        """One of two ranks, which exchange nothing."""

        def __init__(self, rank: int):
            super().__init__()
            self.rank = rank
            self.world_size = 2

        def gather(self, results):
            return results

    eval_model = EvalModel(model, tokenizer=Numbers(), document_prefix=(1,))
    texts = sample_continuations(eval_model, CONFIG, 3, EvalContext())
    shares = [sample_continuations(eval_model, CONFIG, 3, Half(rank)) for rank in (0, 1)]
    assert shares == [texts[0::2], texts[1::2]]
