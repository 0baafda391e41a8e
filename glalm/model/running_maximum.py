"""The maximum over all tokens so far, of sequences that may be continued or packed."""

import torch
from torch import Tensor

from glalm.kernels.common import sequence_ids

FLOOR = -1e4  # the maximum of a sequence that has no token yet: far below any logit, and still finite


def running_maximum(x: Tensor, m: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """m_t = max(m, x_0, ..., x_t) of each sequence, and m_{t-1}, which is m_t where a sequence without an m starts.

    x: [B, T, H]; m: [N, H]. Returns two [B, T, H].
    """
    T = x.shape[1]
    if cu_seqlens is None:
        x = x if m is None else torch.cat([m[:, None], x], 1)
        maxima = x.cummax(1).values
        return (maxima, torch.cat([maxima[:, :1], maxima[:, :-1]], 1)) if m is None else (maxima[:, 1:], maxima[:, :-1])
    sequence = sequence_ids(cu_seqlens, T)
    first = cu_seqlens[sequence]
    maxima = x if m is None else x.maximum(m[sequence].to(x.dtype))
    distance = 1
    while distance < T:  # doubling: after each round, the maximum of the last 2 * distance tokens
        earlier = torch.cat([maxima[:, :distance], maxima[:, :-distance]], 1)
        inside = torch.arange(T, device=x.device) - distance >= first
        maxima = torch.where(inside[:, None], maxima.maximum(earlier), maxima)
        distance *= 2
    before = torch.cat([maxima[:, :1], maxima[:, :-1]], 1)
    fresh = maxima if m is None else m[sequence].to(x.dtype)[None]
    return maxima, torch.where((torch.arange(T, device=x.device) == first)[:, None], fresh, before)


def last(m: Tensor, given: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The running maximum [B, T, H] at the end of each sequence, [N, H]; an empty one keeps what it was given."""
    if cu_seqlens is None and m.shape[1] > 0:
        return m[:, -1].clone()  # a view would keep the whole sequence
    N = len(m) if cu_seqlens is None else len(cu_seqlens) - 1
    given = m.new_full((N, m.shape[2]), FLOOR) if given is None else given
    if m.shape[1] == 0:
        return given
    return torch.where(cu_seqlens.diff()[:, None] > 0, m[0, cu_seqlens[1:] - 1], given)
