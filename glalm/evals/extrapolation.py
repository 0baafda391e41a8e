"""Perplexity by position on text longer than the training length (GLA, arXiv 2312.06635, section 5.1).

Text is read in segments of the training length. What a token may see of the text before it is the `context`:

    stateful        all of it, by the state that each segment leaves to the next. A recurrent state has one size, so
                    memory does not depend on how far is read; softmax attention's keys and values grow with it.
    sliding_window  a window of the training length that moves by half of it: each token sees the half window before
                    its segment or more, whatever the model. Twice the work.
    reset           what its own segment holds: the state is emptied every training length.

The numbers differ. Stateful is what a model reaches at that length; the others are what it would reach without its
long memory, at the same positions of the same text, which may be easier or harder further in whatever the model.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor

from glalm import IGNORE_INDEX
from glalm.config.strict import ConfigError, RunError, require
from glalm.data.loader import Windows
from glalm.data.shards import TokenSet
from glalm.evals.eval_model import Subject, open_split
from glalm.evals.evaluator import Job, Work
from glalm.evals.options import EvalConfig
from glalm.evals.perplexity import summarise
from glalm.evals.plot import plot_extrapolation, plot_ratios


def job(subject: Subject, config: EvalConfig) -> Job:
    """Reads documents, or blocks of the whole stream, in every context asked for."""
    c, train_length = config.extrapolation, subject.need_train_length("extrapolation")
    require(
        c.max_length >= train_length,
        f"extrapolation.max_length={c.max_length} is under the training length {train_length}; "
        f"write extrapolation.max_length={10 * train_length} for ten times it",
    )
    require(
        c.bucket is None or train_length % c.bucket == 0,
        f"extrapolation.bucket={c.bucket} does not divide the training length {train_length}, at which a bucket has to "
        "end for others to be compared with it; write a divisor of it, or null for a half",
    )
    subject.need_length(c.max_length if "stateful" in c.contexts else train_length, "extrapolation.max_length")
    require(
        c.text == "documents" or subject.document_boundaries == "ignore",
        "extrapolation.text=stream reads on from document to document, which a model trained with "
        "data.document_boundaries=reset_state never did; write extrapolation.text=documents",
    )
    tokens = open_split(config, subject, c.split)
    edges = bucket_edges(train_length, c.max_length, c.bucket)
    texts = (furthest_documents if c.text == "documents" else blocks)(tokens, edges, c.documents)

    def run(work: Work) -> dict:
        nats = {}
        for context in c.contexts:
            # A model that cannot go on from a state reads a text whole.
            whole = context == "stateful" and not subject.can_resume
            segment = edges[-1] if whole else train_length
            nats[context] = position_losses(subject, texts, edges, segment, context, config.batch_size, work)
        return extrapolation(nats, edges, train_length)

    return Job(
        settings={
            "data": str(tokens.folder),
            "data_fingerprint": tokens.fingerprint,
            **dataclasses.asdict(c),
            "train_length": train_length,
        },
        run=run,
        total=len(c.contexts) * sum(reach(len(text), edges) for text in texts),
        summary=summary,
        plots=lambda record, folder: [
            *plot_extrapolation([record], folder / "extrapolation.png"),
            *plot_ratios([record], folder / "extrapolation_ratio.png"),
        ],
        metrics=metrics,
    )


def summary(results: dict) -> list[str]:
    lines = []
    for context, found in results["contexts"].items():
        ratios = ", ".join(f"{r['ratio']:.3f} at {n}x" for n, r in found["ratios"].items() if r["documents"])
        lines.append(f"{context}: perplexity relative to that at the training length: {ratios or 'nothing beyond it'}")
        if empty := [b for b in found["buckets"] if b["documents"] == 0]:
            lines.append(f"no document fills the {len(empty)} buckets from position {empty[0]['start']} on")
    return lines


def metrics(results: dict) -> dict[str, float | None]:
    """The first context's ratios."""
    context = next(iter(results["contexts"].values()))
    return {f"{n}x": r["ratio"] for n, r in context["ratios"].items()}


def extrapolation(nats: dict[str, Tensor], edges: list[int], train_length: int) -> dict:
    """The record of what `position_losses` found: nats by context, each [texts, buckets].

    Returns `train_length` and, for each context in `contexts`: `buckets`, in order, each with `start` and `end`
    (positions start < p <= end, the first predicted token of a text being at 1), what `perplexity.summarise` gives
    over the texts that fill it, and counts of these `documents` and their `tokens`. A bucket that no text fills has
    counts of 0 and None for the rest. `ratios` {"2": ..., "4": ...}: the bucket at n training lengths over that at
    one, `ratio` with `low` and `high` one standard error away, of the `documents` that fill both: the errors are those
    of paired differences. With the contexts stateful and reset, `stateful_over_reset` has the ratios of these two at
    the same position: below 1 where the carried state helps.

    Warns when the edges end before ten training lengths.
    """
    if edges[-1] < 10 * train_length:
        warnings.warn(
            f"positions to {edges[-1]} are {edges[-1] / train_length:g} times the training length; "
            f"for ten times, write extrapolation.max_length={10 * train_length}",
            stacklevel=2,
        )
    first = bucket_of(train_length, edges)
    at = {n: bucket_of(n * train_length, edges) for n in multiples(edges[-1] // train_length)}
    result = {"train_length": train_length, "contexts": {}}
    for context, x in nats.items():
        result["contexts"][context] = {
            "buckets": [bucket(x[:, i], a, b) for i, (a, b) in enumerate(pairwise(edges))],
            "ratios": {str(n): ratio(x[:, i] - x[:, first]) for n, i in at.items()},
        }
    if {"stateful", "reset"} <= nats.keys():
        gained = nats["stateful"] - nats["reset"]
        result["stateful_over_reset"] = {str(n): ratio(gained[:, i]) for n, i in at.items()}
    return result


def bucket(nats: Tensor, start: int, end: int) -> dict:
    """nats [texts], nan of a text that does not fill the bucket."""
    filled = nats[~nats.isnan()]
    counts = {"documents": len(filled), "tokens": len(filled) * (end - start)}
    return {"start": start, "end": end, **summarise(filled), **counts}


def ratio(differences: Tensor) -> dict:
    """exp of the mean of differences in nats [texts], nan left out."""
    filled = differences[~differences.isnan()]
    s = summarise(filled)
    found = {"ratio": s["perplexity"], "low": s["perplexity_low"], "high": s["perplexity_high"]}
    return {**found, "documents": len(filled)}


# --------------------------------------------------------------------------------------------------------- reading


def position_losses(
    model, texts: Sequence[np.ndarray], edges: list[int], segment: int, context: str, batch_size: int, work: Work
) -> Tensor:
    """Mean nats of each text in each bucket: float64 [texts, len(edges) - 1] on the CPU, nan where it does not fill it.

    model: anything with `device` and `score(input_ids, targets, state) -> (nats, state)`. A text is read to the end of
    the last bucket that it fills. Texts that go equally far are read together, `batch_size` at a time, a batch a
    process. Raises ValueError when a text fills no bucket, RunError where losses are no numbers.
    """
    reaches = np.array([reach(len(text), edges) for text in texts])
    if (reaches == 0).any():
        short = int(reaches.argmin())
        raise ValueError(f"texts: number {short} has fewer than {edges[1] + 1} tokens: it fills no bucket")
    order = np.argsort(-reaches, kind="stable")
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def losses(batch: np.ndarray) -> list[list[float]]:
        return batch_losses(model, [texts[i] for i in batch], edges, segment, context, work.advance)

    nats = torch.full((len(texts), len(edges) - 1), math.nan, dtype=torch.float64)
    for first in range(0, len(batches), work.world):
        found = batches[first : first + work.world]
        chosen = np.concatenate(found).tolist()
        rows = work.part(f"{context} {chosen}", lambda: work.gather([losses(b) for b in work.mine(found)]))  # noqa: B023
        for i, row in zip(chosen, chain.from_iterable(rows), strict=True):
            nats[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return nats


def batch_losses(
    model, texts: Sequence[np.ndarray], edges: list[int], segment: int, context: str, advance: Callable[[int], object]
) -> list[list[float]]:
    """Of each text its mean nats in the buckets that it fills. Raises RunError where one is not finite."""
    ends = [reach(len(text), edges) for text in texts]
    total = torch.zeros(len(texts), len(edges) - 1, dtype=torch.float64, device=model.device)
    state = None
    for begin, scored, stop in spans(max(ends), segment, context):
        rows, live = segment_rows(texts, ends, begin, scored, stop)
        inputs, targets = rows[:, :-1].to(model.device), rows[:, 1:].masked_fill(~live, IGNORE_INDEX).to(model.device)
        losses, state = model.score(inputs, targets, state if context == "stateful" else None)
        buckets = np.searchsorted(edges, np.arange(begin, stop), side="right") - 1
        total.index_add_(1, torch.from_numpy(buckets).to(model.device), losses.double())
        advance(int(live.sum()))
    means = total.cpu() / torch.tensor(np.diff(edges))
    if broken := (~means.isfinite()).any(0).nonzero().flatten().tolist():
        at = edges[broken[0]]
        raise RunError(
            f"context {context}: from a position after {at} on the losses are not finite: the model's state or logits "
            f"overflow there; extrapolation.max_length={at} reads what is before"
        )
    return [row[: edges.index(end)].tolist() for row, end in zip(means, ends, strict=True)]


def spans(length: int, segment: int, context: str) -> Iterator[tuple[int, int, int]]:
    """(begin, scored, stop): the model reads inputs [begin, stop), and of their targets those from `scored` count."""
    if context != "sliding_window":
        yield from ((a, a, min(a + segment, length)) for a in range(0, length, segment))
        return
    yield 0, 0, min(segment, length)
    stride = max(1, segment // 2)
    for a in range(segment, length, stride):
        stop = min(a + stride, length)
        yield stop - segment, a, stop


def segment_rows(
    texts: Sequence[np.ndarray], ends: Sequence[int], begin: int, scored: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Tokens [begin, stop + 1) of each text, int64 [texts, ...], zeros past its end; and which targets count."""
    rows = np.zeros((len(texts), stop + 1 - begin), dtype=np.int64)
    for row, text in zip(rows, texts, strict=True):
        piece = text[begin : stop + 1]
        row[: len(piece)] = piece
    positions = np.arange(begin, stop)
    live = (positions >= scored) & (positions < np.array(ends)[:, None])
    return torch.from_numpy(rows), torch.from_numpy(live)


def furthest_documents(tokens: TokenSet, edges: list[int], count: int | None) -> list[np.ndarray]:
    """The `count` documents of a split that fill most buckets, in order; the first of those that fill as many.

    So where enough documents reach the end, every bucket is of the same documents; elsewhere the last buckets have
    fewer, or none. ConfigError when no document fills a bucket.
    """
    lengths = tokens.document_lengths
    reaches = np.array([reach(n, edges) for n in lengths])
    order = np.argsort(-reaches, kind="stable")[:count]
    chosen = sorted(int(i) for i in order if reaches[i])
    if not chosen:
        longest = ", ".join(map(str, np.sort(lengths)[::-1][:3])) or "none"
        raise ConfigError(
            f"evals=[extrapolation]: no document of the split {tokens.split} of {tokens.folder} has the "
            f"{edges[1] + 1} tokens that fill one bucket (the longest have {longest}); write a smaller "
            "extrapolation.bucket, or prepare longer documents"
        )
    return [tokens.read_document(i) for i in chosen]


def blocks(tokens: TokenSet, edges: list[int], count: int | None) -> list[np.ndarray]:
    """The first `count` blocks of a split, its documents end to end, that fill every bucket."""
    try:
        windows = Windows(tokens, edges[-1])
    except ValueError as error:
        raise ConfigError(f"evals=[extrapolation]: {error}") from error
    return [windows[i] for i in range(len(windows))[:count]]


# --------------------------------------------------------------------------------------------------------- buckets


def bucket_edges(train_length: int, max_length: int, width: int | None = None) -> list[int]:
    """Every `width` tokens from 0 to max_length, less a last incomplete bucket; None: every half training length.

    An odd one's halves differ by a token, so that every multiple of it is an edge.
    """
    if width is not None:
        return list(range(0, max_length + 1, width))
    return sorted({k * train_length // 2 for k in range(2 * max_length // train_length + 1)})


def reach(tokens: int, edges: list[int]) -> int:
    """The last edge that a text of so many tokens, the first of which is no target, fills: 0 for none."""
    return edges[max(0, int(np.searchsorted(edges, tokens - 1, side="right")) - 1)]


def bucket_of(position: int, edges: list[int]) -> int:
    """Which bucket holds a position: start < position <= end."""
    return int(np.searchsorted(edges, position, side="left")) - 1


def multiples(largest: int) -> list[int]:
    """2, 4, 8, 10, 16, 20, 32, 40, ... up to `largest`, and that."""
    series = {base * 2**k for base in (2, 10) for k in range(largest.bit_length())} | {largest}
    return sorted(n for n in series if 2 <= n <= largest)
