"""Perplexity by position on documents longer than the training length (GLA, arXiv 2312.06635, section 5.1).

A document is read in segments of the training length, each from the state that the one before left. The state is all
that is carried, so memory does not depend on how far is read.
"""

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from glalm.data.shards import TokenSet
from glalm.evals.perplexity import summarise
from glalm.model import GLALMForCausalLM
from glalm.strict import ConfigError


def extrapolation(
    model: GLALMForCausalLM,
    documents: Sequence[np.ndarray],
    train_length: int,
    max_length: int,
    batch_size: int,
    advance: Callable[[int], object] = int,
) -> dict:
    """Perplexity by position, in buckets of half the training length, over documents of max_length + 1 tokens or more.

    Returns `buckets`, in order, each with `start` and `end` (positions start < p <= end, the first predicted token
    of a document being at 1), what `perplexity.summarise` gives over documents, and counts of `documents` and
    `tokens`; and `ratios` {"2": perplexity of the bucket ending at 2 training lengths over that of the bucket ending
    at 1, "4": ...} with `ratio_bands`, one standard error down and up. Every bucket is read of the same documents, so
    the ratios' errors are those of paired differences. A last, incomplete bucket is not read.

    Text may be easier or harder further into a document, whatever the model. So the same positions are read a second
    time with the state emptied every training length: `reset` are those buckets, and `carried_over_reset` {"2": ...}
    the ratios of the two perplexities at the same position: below 1 where the carried state helps.

    Raises ValueError when a document is too short; warns when max_length is less than ten training lengths.
    """
    if short := [i for i, d in enumerate(documents) if len(d) < max_length + 1]:
        raise ValueError(f"documents: number {short[0]} has fewer than max_length + 1 = {max_length + 1} tokens")
    if max_length < 10 * train_length:
        warnings.warn(
            f"max_length={max_length} reads to {max_length / train_length:g} times the training length; "
            f"for ten times, write extrapolation.max_length={10 * train_length}",
            stacklevel=2,
        )
    edges = bucket_edges(train_length, max_length)
    batches = [documents[i : i + batch_size] for i in range(0, len(documents), batch_size)]
    carried, reset = (
        torch.cat([bucket_losses(model, batch, edges, train_length, carry, advance) for batch in batches])
        for carry in (True, False)
    )
    at = {end: i for i, end in enumerate(edges[1:])}
    lengths = {n: at[n * train_length] for n in multiples(edges[-1] // train_length)}
    ratios = {n: summarise(carried[:, i] - carried[:, at[train_length]]) for n, i in lengths.items()}
    against = {n: summarise(carried[:, i] - reset[:, i]) for n, i in lengths.items()}
    return {
        "train_length": train_length,
        "buckets": describe_buckets(carried, edges),
        "reset": describe_buckets(reset, edges),
        "ratios": {str(n): r["perplexity"] for n, r in ratios.items()},
        "ratio_bands": {str(n): [r["perplexity_low"], r["perplexity_high"]] for n, r in ratios.items()},
        "carried_over_reset": {str(n): r["perplexity"] for n, r in against.items()},
    }


def describe_buckets(nats: Tensor, edges: list[int]) -> list[dict]:
    """A record for each bucket; nats: [documents, buckets]."""
    count = len(nats)
    return [
        {"start": a, "end": b, **summarise(nats[:, i]), "documents": count, "tokens": count * (b - a)}
        for i, (a, b) in enumerate(pairwise(edges))
    ]


def long_documents(tokens: TokenSet, max_length: int, count: int) -> list[np.ndarray]:
    """The first `count` documents of a split with more than max_length tokens; ConfigError when it has none."""
    lengths = tokens.document_lengths
    chosen = np.flatnonzero(lengths > max_length)[:count]
    if len(chosen) == 0:
        longest = np.sort(lengths)[::-1][:3].tolist()
        raise ConfigError(
            f"extrapolation.max_length={max_length} needs documents of {max_length + 1} tokens; the longest of the "
            f"split {tokens.split} of {tokens.folder} have {', '.join(map(str, longest)) or 'none'}. "
            f"Write extrapolation.max_length={max(longest, default=1) - 1} or less, or prepare longer documents"
        )
    return [tokens.document(int(i)) for i in chosen]


def bucket_edges(train_length: int, max_length: int) -> list[int]:
    """Every half training length from 0 to max_length. An odd one's halves differ by a token; n T is always an edge."""
    return sorted({k * train_length // 2 for k in range(2 * max_length // train_length + 1)})


def bucket_losses(
    model: GLALMForCausalLM,
    documents: Sequence[np.ndarray],
    edges: list[int],
    segment: int,
    carry: bool = True,
    advance: Callable[[int], object] = int,
) -> Tensor:
    """Mean nats of each document in each bucket: float64 [documents, len(edges) - 1], on the CPU.

    The documents are one batch, read `segment` tokens at a time. With `carry` each segment goes on from the state of
    the one before, and the result does not depend on their length; without, each starts from an empty state.
    """
    total = torch.zeros(len(documents), len(edges) - 1, dtype=torch.float64, device=model.device)
    state = None
    for start in range(0, edges[-1], segment):
        stop = min(start + segment, edges[-1])
        rows = torch.from_numpy(np.stack([d[start : stop + 1] for d in documents]).astype(np.int64))
        rows = rows.to(model.device)
        losses, state = model.score(rows[:, :-1], rows[:, 1:], state if carry else None)
        bucket = np.searchsorted(edges, np.arange(start, stop), side="right") - 1
        total.index_add_(1, torch.from_numpy(bucket).to(model.device), losses.double())
        advance(losses.numel())
    return (total / torch.as_tensor(np.diff(edges), device=model.device)).cpu()


def multiples(largest: int) -> list[int]:
    """2, 4, 8, 10, 16, 20, 32, 40, ... up to `largest`, and that."""
    series = {base * 2**k for base in (2, 10) for k in range(largest.bit_length())} | {largest}
    return sorted(n for n in series if 2 <= n <= largest)
