"""Packed sequences one after the other, for forms of an operator that read a single one."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


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
