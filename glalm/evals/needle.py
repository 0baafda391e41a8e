"""A needle in a haystack: a number, told once somewhere in a long text, is asked for at its end.

The haystack is real text of a prepared split; what is told and asked are sentences, so that any tokenizer serves. The
model reads up to the question as it would any text, its state carried from segment to segment. Nothing is generated:
the answer's tokens are scored with those before them given, which suits models that were never taught to answer.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glalm import IGNORE_INDEX
from glalm.config.strict import require
from glalm.data.shards import TokenSet
from glalm.data.tokenizer import Tokenizer
from glalm.evals.eval_model import Subject, open_split
from glalm.evals.evaluator import Job, Work
from glalm.evals.likelihood import padded, within_states
from glalm.evals.options import EvalConfig
from glalm.evals.plot import plot_needle

NEEDLE = "\nThe secret number of the {key} is {value}. Remember it.\n"
QUESTION = "\nAs was said, the secret number of the {key} is"
KEYS = ("river", "castle", "teacher", "window", "garden", "captain", "mountain", "letter", "engine", "market")
HAY = 2**22  # tokens of the split at most that haystacks are cut from
LENGTHS = (1, 2, 4, 8)  # training lengths
ROOM = 32  # tokens for the answer


class Sample(NamedTuple):
    """haystack: ids up to the question's end, the needle in it. answers: ids of each candidate, the right one first."""

    haystack: np.ndarray
    answers: list[list[int]]


def job(subject: Subject, config: EvalConfig) -> Job:
    c = config.needle
    lengths = sorted(c.lengths or [n * subject.need_train_length("needle") for n in LENGTHS])
    tokenizer = subject.need_tokenizer("needle")
    tokens = open_split(config, subject, c.split)
    task = Task(tokenizer, subject.start, filler(tokens, tokenizer), c.candidates, config.seed)
    overhead = max(len(task.sample(0, 0.0, i).haystack) for i in range(8))
    require(
        lengths[0] >= 2 * overhead,
        f"needle.lengths={lengths}: needle and question alone are {overhead} tokens; write {2 * overhead} or more",
    )
    require(
        len(task.filler) >= lengths[-1],
        f"needle.lengths={lengths}: the split {c.split} has {len(task.filler)} tokens of text; write shorter lengths",
    )
    subject.need_length(lengths[-1] + ROOM, "needle.lengths")

    def run(work: Work) -> dict:
        grid = itertools.product(lengths, sorted(c.depths))
        cells = [work.part(f"{n} {d}", partial(cell, subject, task, n, d, config, work)) for n, d in grid]
        return {"cells": cells, "chance": 1 / c.candidates}

    return Job(
        settings={
            "data": str(tokens.folder),
            "data_fingerprint": tokens.fingerprint,
            **dataclasses.asdict(c),
            "lengths": lengths,
            "seed": config.seed,
            "needle": NEEDLE,
            "question": QUESTION,
        },
        run=run,
        total=sum(lengths) * len(c.depths) * c.samples,
        summary=summary,
        plots=lambda record, folder: plot_needle(record, folder / "needle.png"),
        metrics=metrics,
    )


def summary(results: dict) -> list[str]:
    lines = []
    for length, row in itertools.groupby(results["cells"], key=lambda cell: cell["length"]):
        shown = ", ".join(f"{c['token_accuracy']:.2f} ({c['ranked_first']:.2f}) at {c['depth']:.0%}" for c in row)
        lines.append(f"needle in {length} tokens, tokens right (ranked first): {shown}")
    return [*lines, f"ranked first by chance: {results['chance']:.2f}"]


def metrics(results: dict) -> dict[str, float]:
    """Means over lengths and depths."""
    cells = results["cells"]
    return {key: sum(c[key] for c in cells) / len(cells) for key in ("token_accuracy", "ranked_first")}


# ---------------------------------------------------------------------------------------------------- the haystacks


def filler(tokens: TokenSet, tokenizer: Tokenizer) -> np.ndarray:
    """The beginning of a split's text, without the tokens that begin and end documents."""
    ids = tokens.read_tokens(0, min(tokens.num_tokens, HAY))
    return ids[~np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id])]


@dataclass
class Task:
    tokenizer: Tokenizer
    start: tuple[int, ...]  # ids before a document
    filler: np.ndarray
    candidates: int
    seed: int

    def sample(self, length: int, depth: float, number: int) -> Sample:
        """Sample `number` of those of a length, exactly `length` tokens (without filler, if needle and question are
        more), the needle after `depth` of the filler. Keys, values and text do not depend on the depth.
        """
        random = np.random.default_rng([self.seed, number, length])
        key = KEYS[random.integers(len(KEYS))]
        values = random.choice(np.arange(10_000, 100_000), self.candidates, replace=False)
        asked = QUESTION.format(key=key)
        answered = [self.tokenizer.encode(f"{asked} {value}") for value in values]
        # The question ends where the candidates part: after a space that is a token for itself, or before one that the
        # tokenizer joins with the digits.
        agreed = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*answered, strict=False))
        question = [ids[0] for ids in agreed]
        needle = self.tokenizer.encode(NEEDLE.format(key=key, value=values[0]))
        room = max(0, length - len(self.start) - len(needle) - len(question))
        begin = random.integers(len(self.filler) - room + 1)
        hay, cut = self.filler[begin : begin + room], round(depth * room)
        parts = [self.start, hay[:cut], needle, hay[cut:], question]
        haystack = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
        return Sample(haystack, [ids[len(question) :] for ids in answered])


# -------------------------------------------------------------------------------------------------------- the cells


def cell(subject: Subject, task: Task, length: int, depth: float, config: EvalConfig, work: Work) -> dict:
    """Of `samples` haystacks of a length and depth: `token_accuracy`, the part of the answers' tokens that are the
    likeliest given those before; `exact_match`, the part of answers with all tokens so, which greedy decoding would
    give; `ranked_first`, the part of answers likelier than all other candidates; their `mean_rank`, from 1."""
    found, mine = [], work.mine(range(config.needle.samples))
    for start in range(0, len(mine), config.batch_size):
        samples = [task.sample(length, depth, i) for i in mine[start : start + config.batch_size]]
        for part in within_states(subject, samples):
            found += score(subject, part)
        work.advance(length * len(samples))
    found = work.gather(found)
    return {
        "length": length,
        "depth": depth,
        "samples": len(found),
        "token_accuracy": sum(r["right"] for r in found) / sum(r["tokens"] for r in found),
        "exact_match": float(np.mean([r["right"] == r["tokens"] for r in found])),
        "ranked_first": float(np.mean([r["rank"] == 1 for r in found])),
        "mean_rank": float(np.mean([r["rank"] for r in found])),
    }


@torch.no_grad()
def score(subject: Subject, samples: list[Sample]) -> list[dict]:
    """Of each sample, all of one length, {"right": tokens of the answer that are the likeliest, "tokens": of it,
    "rank": of the answer among the candidates by log likelihood}."""
    haystacks = torch.from_numpy(np.stack([s.haystack for s in samples])).to(subject.device)
    count = len(samples[0].answers)
    each = torch.arange(len(samples), device=subject.device).repeat_interleave(count)
    answers = padded([ids for s in samples for ids in s.answers], subject.device, fill=IGNORE_INDEX)
    state, read = read_on(subject, haystacks[:, :-1])
    if state is not None:
        state = subject.repeat(state, each)
    inputs = torch.cat([haystacks[each, read:], answers[:, :-1].clamp(min=0)], 1)
    features, _ = subject.read(inputs, state=state)
    logits = subject.logits(features[:, -answers.shape[1] :])
    nats = F.cross_entropy(logits.mT, answers, ignore_index=IGNORE_INDEX, reduction="none").sum(1).view(-1, count)
    right = (logits.argmax(-1) == answers).sum(1).view(-1, count)[:, 0]
    ranks = 1 + (~(nats[:, 1:] > nats[:, :1])).sum(1)  # a tie is no victory, nor are losses that are no numbers
    return [
        {"right": int(r), "tokens": len(s.answers[0]), "rank": int(rank)}
        for r, rank, s in zip(right, ranks, samples, strict=True)
    ]


def read_on(subject: Subject, rows: Tensor) -> tuple[object, int]:
    """The state after the rows, read in segments of the training length, and how many of their tokens it has seen: none
    where the model cannot go on from a state, and has to read everything with each candidate."""
    if not subject.can_resume:
        return None, 0
    state, length = None, rows.shape[1]
    segment = subject.train_length or length
    for start in range(0, length, segment):
        _, state = subject.read(rows[:, start : start + segment], state=state, keep_state=True)
    return state, length
