"""Perplexity by position on text longer than the training length (GLA, arXiv 2312.06635, section 5.1).

Text is read in segments of the training length. How much of the text before it a token sees is its `context`:

    stateful        All of it: each segment starts from the state of the one before. A recurrent state has one size, so
                    memory does not grow with the length; the keys and values of softmax attention do.
    sliding_window  A window of the training length that moves by half of it: each token sees at least the half window
                    before its segment. This takes twice the work.
    reset           Its own segment: the state is emptied every training length.

Stateful shows what a model reaches at a length. The other two show what it would reach without long memory, at the same
positions of the same text: text further in may be easier or harder for any model.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from glalm import IGNORE_INDEX
from glalm.config.strict import ConfigError, RunError, require
from glalm.data.shards import TokenSet
from glalm.evals.eval_model import EvalModel
from glalm.evals.evaluator import EvalContext, Evaluator
from glalm.evals.inputs import describe_data, open_split, open_windows
from glalm.evals.options import EvalConfig
from glalm.evals.perplexity import summarize_losses
from glalm.evals.plot import known_gains, plot_extrapolation, plot_gains, plot_ratios
from glalm.evals.result_files import main_context

Texts = Sequence[np.ndarray]  # token ids of each


class ExtrapolationEvaluator(Evaluator):
    """Perplexity by position of documents, or of blocks of the text end to end, in each of `extrapolation.contexts`."""

    shares_texts = True

    def __init__(self, model: EvalModel, config: EvalConfig):
        super().__init__(model, config)
        options = config.extrapolation
        train_length = model.require_train_length("extrapolation")
        require(
            options.max_length >= train_length,
            f"extrapolation.max_length={options.max_length} is under the training length {train_length}; "
            f"write extrapolation.max_length={10 * train_length} for ten times it",
        )
        require(
            options.bucket is None or train_length % options.bucket == 0,
            f"extrapolation.bucket={options.bucket} does not divide the training length {train_length}; write one of "
            "its divisors, or null for half of it",
        )
        longest_input = options.max_length if "stateful" in options.contexts else train_length
        model.require_length(longest_input, "extrapolation.max_length")
        require(
            options.text == "documents" or model.document_boundaries == "ignore",
            "extrapolation.text=stream reads on from document to document, which a model trained with "
            "data.document_boundaries=reset_state never did; write extrapolation.text=documents",
        )
        tokens = open_split(config, model, options.split)
        self.train_length = train_length
        self.edges = bucket_edges(train_length, options.max_length, options.bucket)
        load_texts = load_longest_documents if options.text == "documents" else load_blocks
        self.texts = load_texts(tokens, self.edges, options.documents)
        self.total_units = len(options.contexts) * sum(last_filled_edge(len(text), self.edges) for text in self.texts)
        self.settings = {**dataclasses.asdict(options), **describe_data(tokens), "train_length": train_length}

    def run(self, context: EvalContext) -> dict:
        nats = {}
        batch_size = self.config.batch_size
        for name in self.config.extrapolation.contexts:
            # A model that does not accept a state must read a text at once.
            segment = self.edges[-1] if name == "stateful" and not self.model.accepts_state else self.train_length
            nats[name] = losses_by_bucket(self.model, self.texts, self.edges, segment, name, batch_size, context)
        return build_results(nats, self.edges, self.train_length)

    def summarize(self, results: dict) -> list[str]:
        lines = []
        for name, found in results["contexts"].items():
            ratios = ", ".join(f"{r['ratio']:.3f} at {n}x" for n, r in found["ratios"].items() if r["documents"])
            lines.append(f"{name}: perplexity relative to that at the training length: {ratios or 'nothing beyond it'}")
            if empty := [bucket for bucket in found["buckets"] if bucket["documents"] == 0]:
                lines.append(f"no document fills the {len(empty)} buckets from position {empty[0]['start']} on")
            for gain in results.get(f"{name}_minus_stateful", []):
                if gain["documents"] > 1:
                    nats = f"{gain['nats_per_token']:.4f} ± {gain['standard_error']:.4f} nats"
                    lines.append(f"{name} minus stateful, positions {gain['start']:,} to {gain['end']:,}: {nats}")
        return lines

    def metrics(self, results: dict) -> dict[str, float | None]:
        """Return the ratios of the context stateful, {"2x": 0.9}, or else of the first, {"2x, reset": 0.9}."""
        context = main_context(results)
        suffix = "" if context == "stateful" else f", {context}"
        ratios = results["contexts"][context]["ratios"]
        return {f"{n}x{suffix}": ratio["ratio"] for n, ratio in ratios.items()}

    def plot_results(self, record: dict, folder: Path) -> list[Path]:
        paths = plot_extrapolation([record], folder / "extrapolation.png")
        paths += plot_ratios([record], folder / "extrapolation_ratio.png")
        if known_gains(record):
            paths += plot_gains([record], folder / "extrapolation_gain.png")
        return paths


# --------------------------------------------------------------------------------------------------------- results


def build_results(nats: dict[str, Tensor], edges: list[int], train_length: int) -> dict:
    """Return the results of `losses_by_bucket`. Warn when the buckets end before ten training lengths.

    Args:
        nats: {context: nats of each text in each bucket, [texts, buckets]}

    Returns:
        `train_length` and, for each context in `contexts`:
            `buckets`, in order: `start` and `end`, for positions start < p <= end where a text's first predicted token
                is at position 1; `summarize_losses` over the texts that fill the bucket; the number of these
                `documents` and of their `tokens` in it.
            `ratios`, {"2": ..., "4": ...}: the perplexity at n training lengths over that at one, as
                `summarize_ratio` returns it.
        With the contexts stateful and reset, `stateful_over_reset` has the ratios of these two at the same position,
        below 1 where long memory helps. With stateful and another context, `NAME_minus_stateful` is what the text is
        worth that the other lacks, as `summarize_gains` returns it.
    """
    if edges[-1] < 10 * train_length:
        warnings.warn(
            f"positions to {edges[-1]} are {edges[-1] / train_length:g} times the training length; "
            f"for ten times, write extrapolation.max_length={10 * train_length}",
            stacklevel=2,
        )
    first = bucket_index(train_length, edges)
    index_of = {n: bucket_index(n * train_length, edges) for n in length_multiples(edges[-1] // train_length)}
    results = {"train_length": train_length, "contexts": {}}
    for name, losses in nats.items():
        ratios = {str(n): summarize_ratio(losses[:, i] - losses[:, first]) for n, i in index_of.items()}
        results["contexts"][name] = {"buckets": summarize_buckets(losses, edges), "ratios": ratios}
    if {"stateful", "reset"} <= nats.keys():
        loss = nats["stateful"] - nats["reset"]
        results["stateful_over_reset"] = {str(n): summarize_ratio(loss[:, i]) for n, i in index_of.items()}
    for name, losses in nats.items():
        if name != "stateful" and "stateful" in nats:
            results[f"{name}_minus_stateful"] = summarize_gains(losses - nats["stateful"], edges, train_length)
    return results


def summarize_buckets(losses: Tensor, edges: list[int]) -> list[dict]:
    """Return `buckets` of `build_results` for one context, given the nats of each text in each bucket."""
    buckets = []
    for i, (start, end) in enumerate(pairwise(edges)):
        filled = losses[:, i][~losses[:, i].isnan()]
        counts = {"documents": len(filled), "tokens": len(filled) * (end - start)}
        buckets.append({"start": start, "end": end, **summarize_losses(filled), **counts})
    return buckets


def summarize_gains(gain: Tensor, edges: list[int], train_length: int) -> list[dict]:
    """Return the mean gain in each range of positions from n training lengths to 2n, for n = 1, 2, 4, ...

    Args:
        gain: Nats of each text in each bucket, [texts, buckets]; NaN where it does not fill the bucket.

    Returns:
        `start` and `end` of each range, for positions start < p <= end, where the last range may be shorter;
        `nats_per_token` with its `standard_error` over the `documents` that fill the range.
    """
    widths = torch.tensor(np.diff(edges), dtype=gain.dtype)
    ranges = []
    start = train_length
    while start < edges[-1]:
        end = min(2 * start, edges[-1])
        inside = slice(edges.index(start), edges.index(end))
        means = (gain[:, inside] * widths[inside]).sum(1) / widths[inside].sum()
        means = means[~means.isnan()]
        summary = summarize_losses(means)
        counts = {name: summary[name] for name in ("nats_per_token", "standard_error")} | {"documents": len(means)}
        ranges.append({"start": start, "end": end, **counts})
        start = end
    return ranges


def summarize_ratio(differences: Tensor) -> dict:
    """Return the ratio of two perplexities from the differences in nats of the same texts, [texts].

    Returns:
        `ratio`, with `low` and `high` one standard error of the paired differences away, and the number of `documents`
        of which both are known: differences that are not NaN.
    """
    known = differences[~differences.isnan()]
    summary = summarize_losses(known)
    bounds = {"low": summary["perplexity_low"], "high": summary["perplexity_high"]}
    return {"ratio": summary["perplexity"], **bounds, "documents": len(known)}


# --------------------------------------------------------------------------------------------------------- reading


def losses_by_bucket(
    model: EvalModel, texts: Texts, edges: list[int], segment: int, name: str, batch_size: int, context: EvalContext
) -> Tensor:
    """Return the mean nats of each text in each bucket that it fills.

    Texts are read `batch_size` at a time, sorted by the buckets that they fill so that little is padding. Each group of
    ranks reads another batch.

    Args:
        texts: Token ids of each. A text is read to the end of the last bucket that it fills.
        edges: The buckets' edges, as `bucket_edges` returns them.
        segment: Tokens read at once.
        name: One of options.Context.

    Returns:
        float64 [texts, len(edges) - 1] on the CPU; NaN where a text does not fill the bucket.

    Raises:
        RunError: Some losses are not finite.
    """
    last_edges = np.array([last_filled_edge(len(text), edges) for text in texts])
    order = np.argsort(-last_edges, kind="stable")
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def read(batch: np.ndarray) -> list[list[float]]:
        return read_batch(model, [texts[i] for i in batch], edges, segment, name, context)

    nats = torch.full((len(texts), len(edges) - 1), math.nan, dtype=torch.float64)
    for first in range(0, len(batches), context.groups):
        one_each = batches[first : first + context.groups]  # a batch for each group
        indices = np.concatenate(one_each).tolist()
        rows = context.load_or_compute(f"{name} {indices}", partial(context.map, read, one_each))
        for i, row in zip(indices, chain.from_iterable(rows), strict=True):
            nats[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return nats


def read_batch(
    model: EvalModel, texts: Texts, edges: list[int], segment: int, name: str, context: EvalContext
) -> list[list[float]]:
    """Return the mean nats of each text in the buckets that it fills. Raise RunError where they are not finite."""
    ends = [last_filled_edge(len(text), edges) for text in texts]
    total = torch.zeros(len(texts), len(edges) - 1, dtype=torch.float64, device=model.device)
    state = None
    for span in iterate_spans(max(ends), segment, name):
        rows, is_scored = load_span(texts, ends, span)
        targets = rows[:, 1:].masked_fill(~is_scored, IGNORE_INDEX)
        is_continued = name == "stateful" and span.stop < max(ends)
        losses, state = model.score_tokens(rows[:, :-1], targets, state, return_state=is_continued, shard=context.shard)
        if not is_continued:
            state = None
        buckets = np.searchsorted(edges, np.arange(span.start, span.stop), side="right") - 1
        total.index_add_(1, torch.from_numpy(buckets).to(model.device), losses.double())
        context.advance(int(is_scored.sum()))
    means = total.cpu() / torch.tensor(np.diff(edges))
    if overflows := (~means.isfinite()).any(0).nonzero().flatten().tolist():
        edge = edges[overflows[0]]
        advice = f"extrapolation.max_length={edge} evaluates the positions before"
        if edge < model.require_train_length("extrapolation"):
            advice = "that is within the training length; evaluate an earlier checkpoint, or write precision=fp32"
        raise RunError(
            f"context {name}: the losses after position {edge} are not finite: the model's state or logits "
            f"overflow there; {advice}"
        )
    return [row[: edges.index(end)].tolist() for row, end in zip(means, ends, strict=True)]


class Span(NamedTuple):
    """Input positions [start, stop) that are read at once. Targets are scored from `first_scored` on."""

    start: int
    first_scored: int
    stop: int


def iterate_spans(length: int, segment: int, name: str) -> Iterator[Span]:
    """Yield the spans by which `length` positions are read. Each position is scored once."""
    if name != "sliding_window":
        for start in range(0, length, segment):
            yield Span(start, start, min(start + segment, length))
        return
    yield Span(0, 0, min(segment, length))
    stride = max(1, segment // 2)
    for first_scored in range(segment, length, stride):
        stop = min(first_scored + stride, length)
        yield Span(stop - segment, first_scored, stop)


def load_span(texts: Texts, ends: Sequence[int], span: Span) -> tuple[Tensor, Tensor]:
    """Return the span's tokens and the one after it, int64 [texts, T + 1], and which targets are scored, [texts, T].

    Tokens past a text's end are 0; targets past its entry in `ends` are not scored.
    """
    rows = np.zeros((len(texts), span.stop + 1 - span.start), dtype=np.int64)
    for row, text in zip(rows, texts, strict=True):
        piece = text[span.start : span.stop + 1]
        row[: len(piece)] = piece
    positions = np.arange(span.start, span.stop)
    is_scored = (positions >= span.first_scored) & (positions < np.array(ends)[:, None])
    return torch.from_numpy(rows), torch.from_numpy(is_scored)


def load_longest_documents(tokens: TokenSet, edges: list[int], count: int | None) -> list[np.ndarray]:
    """Return the `count` documents of a split that fill most buckets, in the split's order; None: all that fill one.

    Where enough documents reach the end, all buckets are of the same documents; elsewhere the last ones have fewer.

    Raises:
        ConfigError: No document fills a bucket.
    """
    lengths = tokens.document_lengths
    last_edges = np.array([last_filled_edge(n, edges) for n in lengths])
    order = np.argsort(-last_edges, kind="stable")[:count]
    indices = sorted(int(i) for i in order if last_edges[i])
    if not indices:
        where = f"evals=[extrapolation]: {tokens.folder}"
        if not len(lengths):
            raise ConfigError(
                f"{where} has no documents in its split {tokens.split}; write extrapolation.split=validation, or "
                "text=FILE to read a file as it lies"
            )
        longest = ", ".join(map(str, np.sort(lengths)[::-1][:3]))
        raise ConfigError(
            f"{where}: no document of the split {tokens.split} has the {edges[1] + 1} tokens that fill one bucket (the "
            f"longest have {longest}); write a smaller extrapolation.bucket, or extrapolation.text=stream to read the "
            "documents end to end"
        )
    return [tokens.read_document(i) for i in indices]


def load_blocks(tokens: TokenSet, edges: list[int], count: int | None) -> list[np.ndarray]:
    """Return the first `count` blocks of a split's documents, end to end, of the length of all buckets; None: all."""
    windows = open_windows(tokens, edges[-1], "extrapolation")
    return [windows[i] for i in range(len(windows))[:count]]


# --------------------------------------------------------------------------------------------------------- buckets


def bucket_edges(train_length: int, max_length: int, width: int | None = None) -> list[int]:
    """Return 0, width, 2 width, ... up to max_length, without a last incomplete bucket. None: half a training length.

    Half of an odd training length alternates between two integers, so that every multiple of it is an edge.
    """
    if width is not None:
        return list(range(0, max_length + 1, width))
    return sorted({k * train_length // 2 for k in range(2 * max_length // train_length + 1)})


def last_filled_edge(tokens: int, edges: list[int]) -> int:
    """Return the last edge that a text of `tokens` tokens reaches, or 0. Its first token is not a target."""
    return edges[max(0, int(np.searchsorted(edges, tokens - 1, side="right")) - 1)]


def bucket_index(position: int, edges: list[int]) -> int:
    """Return the index of the bucket with start < position <= end."""
    return int(np.searchsorted(edges, position, side="left")) - 1


def length_multiples(largest: int) -> list[int]:
    """Return 2, 4, 8, 10, 16, 20, 32, 40, ... up to `largest`, and `largest`."""
    powers = [2**k for k in range(largest.bit_length())]
    series = {*(2 * power for power in powers), *(10 * power for power in powers), largest}
    return sorted(n for n in series if 2 <= n <= largest)
