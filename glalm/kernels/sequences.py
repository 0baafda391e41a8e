"""Packed sequences: which token is whose, and a form of an operator that reads a single one on each of them."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_ids(cu_seqlens: Tensor, T: int) -> Tensor:
    """[T]: which of the packed sequences each token belongs to."""
    return torch.searchsorted(
        cu_seqlens[1:], torch.arange(T, dtype=cu_seqlens.dtype, device=cu_seqlens.device), right=True
    )


def each_sequence(
    run: Callable[..., tuple[Tensor, Tensor]],
    inputs: list[Tensor],
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """o and, if asked for, the final states [N, ...] of a batch, or of packed sequences [1, T, ...], by
    run(*inputs, state, sequence) -> (o, state).

    Packed sequences are one run, to which `sequence` [T] says whose each token is, where no states go in or out; else
    each is one with its own row of the states, and cu_seqlens [N + 1] is read on the host.
    """
    if cu_seqlens is None or (initial_state is None and not output_final_state):
        sequence = None if cu_seqlens is None else sequence_ids(cu_seqlens, inputs[0].shape[1])
        o, state = run(*inputs, initial_state, sequence)
        return o, state if output_final_state else None
    bounds = list(pairwise(cu_seqlens.tolist()))
    given = [None] * len(bounds) if initial_state is None else initial_state.split(1)
    results = [run(*(x[:, a:b] for x in inputs), S, None) for (a, b), S in zip(bounds, given, strict=True)]
    return torch.cat([o for o, _ in results], 1), torch.cat([S for _, S in results]) if output_final_state else None


def same_sequence(sequence: Tensor, C: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens of a chunk of C are of one sequence [n, C, C]; of the one that enters the chunk, [n, C, 1]; of the
    one that leaves it. sequence [T]: as sequence_ids gives it.
    """
    ids = F.pad(sequence, (0, -len(sequence) % C), value=-1).view(-1, C, 1)
    ends = ids[:, -1:]
    starts = torch.cat([ids[:1, :1], ends[:-1]])
    return ids == ids.mT, ids == starts, ids == ends
