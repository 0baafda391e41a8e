"""Needle in a haystack: a number, stated once somewhere in a long text, is asked for at its end.

The haystack is text of a prepared split; needle and question are sentences, so that any tokenizer serves. The model
reads up to the question in segments, from state to state. Nothing is generated: the answer's tokens are scored, each
after the right ones before it, which suits models that were never taught to answer.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glalm import IGNORE_INDEX
from glalm.config.strict import require
from glalm.data.tokenizer import Tokenizer
from glalm.evals.eval_model import EvalModel
from glalm.evals.evaluator import EvalContext, Evaluator
from glalm.evals.inputs import describe_data, open_split
from glalm.evals.likelihood import Choices, pad_rows, require_finite, split_by_memory
from glalm.evals.options import EvalConfig
from glalm.evals.plot import plot_needle

NEEDLE = "\nThe secret number of the {key} is {value}. Remember it.\n"
QUESTION = "\nAs was said, the secret number of the {key} is"
KEYS = ("river", "castle", "teacher", "window", "garden", "captain", "mountain", "letter", "engine", "market")
MAX_FILLER = 2**22  # tokens of the split that haystacks are cut from
LENGTHS = (1, 2, 4, 8)  # training lengths
ANSWER_ROOM = 32  # tokens


class NeedleEvaluator(Evaluator):
    """Accuracy of the answer by the haystack's length and the needle's depth."""

    def __init__(self, model: EvalModel, config: EvalConfig):
        super().__init__(model, config)
        options = config.needle
        lengths = sorted(options.lengths or [n * model.require_train_length("needle") for n in LENGTHS])
        tokenizer = model.require_tokenizer("needle")
        tokens = open_split(config, model, options.split)
        filler = tokens.read_tokens(0, min(tokens.num_tokens, MAX_FILLER))
        filler = filler[~np.isin(filler, [tokenizer.bos_id, tokenizer.eos_id])]
        self.task = NeedleTask(tokenizer, model.document_prefix, filler, options.candidates, config.seed)
        samples = [self.task.build_sample(0, 0.0, i) for i in range(8)]
        require(
            all(all(sample.continuations) for sample in samples),
            "evals=[needle]: the tokenizer cannot tell numbers apart; leave needle out",
        )
        overhead = max(len(sample.context) for sample in samples)
        require(
            lengths[0] >= 2 * overhead,
            f"needle.lengths={lengths}: needle and question alone are {overhead} tokens; write "
            f"'needle.lengths=[{2 * overhead}]' or longer",
        )
        require(
            len(filler) >= lengths[-1],
            f"needle.lengths={lengths}: {tokens.folder} ({tokens.split}) has {len(filler)} tokens of text; write "
            f"'needle.lengths=[{len(filler)}]' or shorter",
        )
        model.require_length(lengths[-1] + ANSWER_ROOM, "needle.lengths")
        self.lengths = lengths
        self.total_units = sum(lengths) * len(options.depths) * options.samples
        self.settings = {
            **dataclasses.asdict(options),
            **describe_data(tokens),  # The split of a file is no option's.
            "lengths": lengths,
            "seed": config.seed,
            "needle": NEEDLE,
            "question": QUESTION,
        }

    def run(self, context: EvalContext) -> dict:
        cells = []
        for length, depth in itertools.product(self.lengths, sorted(self.config.needle.depths)):
            compute = partial(evaluate_cell, self.model, self.task, length, depth, self.config, context)
            cells.append(context.load_or_compute(f"{length} {depth}", compute))
        return {"cells": cells, "chance": 1 / self.config.needle.candidates}

    def summarize(self, results: dict) -> list[str]:
        lines = []
        for length, row in itertools.groupby(results["cells"], key=lambda cell: cell["length"]):
            cells = ", ".join(f"{c['token_accuracy']:.2f} ({c['ranked_first']:.2f}) at {c['depth']:.0%}" for c in row)
            lines.append(f"needle in {length} tokens, tokens right (ranked first): {cells}")
        return [*lines, f"ranked first by chance: {results['chance']:.2f}"]

    def metrics(self, results: dict) -> dict[str, float]:
        """Return means over lengths and depths."""
        cells = results["cells"]
        return {key: sum(cell[key] for cell in cells) / len(cells) for key in ("token_accuracy", "ranked_first")}

    def plot_results(self, record: dict, folder: Path) -> list[Path]:
        return plot_needle(record, folder / "needle.png")


@dataclass
class NeedleTask:
    """Builds haystacks from a split's text.

    Attributes:
        document_prefix: Ids before a document.
        filler: Ids of the text around needles.
        candidates: Numbers among which the right one is ranked.
    """

    tokenizer: Tokenizer
    document_prefix: tuple[int, ...]
    filler: np.ndarray
    candidates: int
    seed: int

    def build_sample(self, length: int, depth: float, index: int) -> Choices:
        """Return a haystack up to the question's end, and the ids of each candidate answer, the right one first.

        Keys, values and text depend on `length` and `index`, not on `depth`.

        Args:
            length: Tokens of the haystack, which is longer only where needle and question alone are.
            depth: Part of the filler before the needle, from 0 to 1.
        """
        random = np.random.default_rng([self.seed, index, length])
        key = KEYS[random.integers(len(KEYS))]
        values = random.choice(np.arange(10_000, 100_000), self.candidates, replace=False)
        question_text = QUESTION.format(key=key)
        answered = [self.tokenizer.encode(f"{question_text} {value}") for value in values]
        # The question ends where the candidates part: after a space that is a token of its own, or before a space that
        # the tokenizer joins with the digits.
        common = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*answered, strict=False))
        question = [ids[0] for ids in common]
        needle = self.tokenizer.encode(NEEDLE.format(key=key, value=values[0]))
        room = max(0, length - len(self.document_prefix) - len(needle) - len(question))
        start = random.integers(len(self.filler) - room + 1)
        hay = self.filler[start : start + room]
        cut = round(depth * room)
        parts = [self.document_prefix, hay[:cut], needle, hay[cut:], question]
        haystack = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
        return Choices(haystack, [ids[len(question) :] for ids in answered])


def evaluate_cell(
    model: EvalModel, task: NeedleTask, length: int, depth: float, config: EvalConfig, context: EvalContext
) -> dict:
    """Return the scores of `needle.samples` haystacks of one length and depth.

    Returns:
        `token_accuracy`: part of the answers' tokens that are the likeliest, each after the right ones before it.
        `exact_match`: fraction of the answers whose tokens all are: greedy decoding would give these answers.
        `ranked_first`: part of the answers that are likelier than all other candidates; `mean_rank`: their rank from 1.
    """
    scores = []
    indices = context.share(range(config.needle.samples))
    for start in range(0, len(indices), config.batch_size):
        samples = [task.build_sample(length, depth, i) for i in indices[start : start + config.batch_size]]
        for part in split_by_memory(model, samples):
            scores += score_samples(model, part)
        context.advance(length * len(samples))
    scores = context.gather(scores)
    return {
        "length": length,
        "depth": depth,
        "samples": len(scores),
        "token_accuracy": sum(s["right"] for s in scores) / sum(s["tokens"] for s in scores),
        "exact_match": float(np.mean([s["right"] == s["tokens"] for s in scores])),
        "ranked_first": float(np.mean([s["rank"] == 1 for s in scores])),
        "mean_rank": float(np.mean([s["rank"] for s in scores])),
    }


@torch.no_grad()
def score_samples(model: EvalModel, samples: list[Choices]) -> list[dict]:
    """Return the scores of samples of one length.

    Returns:
        For each sample: the number of `tokens` in its answer, how many of them are the likeliest (`right`), and the
        answer's `rank` among the candidates by log-likelihood.

    Raises:
        RunError: Some log-likelihoods are not finite.
    """
    haystacks = torch.from_numpy(np.stack([sample.context for sample in samples])).to(model.device)
    count = len(samples[0].continuations)
    sample_indices = torch.arange(len(samples), device=model.device).repeat_interleave(count)
    candidates = itertools.chain.from_iterable(sample.continuations for sample in samples)
    answers = pad_rows(list(candidates), model.device, fill=IGNORE_INDEX)
    state, tokens_read = read_haystacks(model, haystacks[:, :-1])
    if state is not None:
        state = model.select_states(state, sample_indices)
    inputs = torch.cat([haystacks[sample_indices, tokens_read:], answers[:, :-1].clamp(min=0)], 1)
    features, _ = model.forward_features(inputs, state=state)
    logits = model.compute_logits(features[:, -answers.shape[1] :])
    nats = F.cross_entropy(logits.mT, answers, ignore_index=IGNORE_INDEX, reduction="none").sum(1).view(-1, count)
    right = (logits.argmax(-1) == answers).sum(1).view(-1, count)[:, 0]
    require_finite(nats.flatten())
    ranks = 1 + (nats[:, 1:] <= nats[:, :1]).sum(1)  # The answer loses against equal candidates.
    return [
        {"right": int(r), "tokens": len(sample.continuations[0]), "rank": int(rank)}
        for r, rank, sample in zip(right, ranks, samples, strict=True)
    ]


def read_haystacks(model: EvalModel, rows: Tensor) -> tuple[Any, int]:
    """Return the state after the rows, [B, T], read in segments of the training length, and T.

    A model that does not accept a state returns (None, 0): it must read everything again with each candidate.
    """
    if not model.accepts_state:
        return None, 0
    state = None
    for segment in rows.split(model.train_length or rows.shape[1], dim=1):
        _, state = model.forward_features(segment, state=state, return_state=True)
    return state, rows.shape[1]
