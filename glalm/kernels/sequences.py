"""Packed sequences: which token is whose, and a form of an operator that reads a single one on each of them."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def sequence_ids(cu_seqlens: Tensor, T: int) -> Tensor:
    """[T]: which of the packed sequences each token belongs to."""
    return torch.searchsorted(
        cu_seqlens[1:], torch.arange(T, dtype=cu_seqlens.dtype, device=cu_seqlens.device), right=True
    )


def each_sequence(
    run: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], initial_state: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """run(*inputs, state) of each sequence of inputs [1, T, ...]: o and the final states [N, ...], each in a row.

    cu_seqlens [N + 1] is read on the host.
    """
    bounds = list(pairwise(cu_seqlens.tolist()))
    given = [None] * len(bounds) if initial_state is None else initial_state.split(1)
    results = [run(*(x[:, a:b] for x in inputs), S) for (a, b), S in zip(bounds, given, strict=True)]
    return torch.cat([o for o, _ in results], 1), torch.cat([S for _, S in results])
