"""Mamba's selective scan in plain PyTorch, with autograd (Gu and Dao, arXiv 2312.00752, section 3.3).

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = h_t C_t

for each channel a state of N numbers, with nothing shared between channels that a matmul could use. So that a GPU has
enough to do at once, the sequence is cut into about sqrt(T) chunks, which all run the recurrence from 0 side by side,
and what enters each is added after: 2 sqrt(T) steps instead of T. Holds a few times [B, T, D, N] numbers.
"""

import math
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels.common import check_cu_seqlens, check_values, wide_dtype


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x, dt: [batch, T, D], dt > 0; A: [D, N], < 0; B, C: [batch, T, N]; initial_state: [n, D, N], float32.

    cu_seqlens [n + 1]: the bounds of n sequences packed into one row; without it, n is the batch.
    Returns y [batch, T, D] in x's dtype and the final states [n, D, N], float32 (both float64 for float64 inputs).
    """
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, len(x))
        check_values(None, x, cu_seqlens)
    dtype = wide_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        decay = (dt.to(dtype)[..., None] * A.to(dtype)).exp()
        update = (dt.to(dtype) * x.to(dtype))[..., None] * B.to(dtype)[:, :, None]
        if x.shape[1] == 0:
            N = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
            given = x.new_zeros(N, *A.shape, dtype=dtype) if initial_state is None else initial_state
            return torch.empty_like(x), given
        if cu_seqlens is None:
            h = states(decay, update, initial_state)
            return torch.einsum("btdn,btn->btd", h, C.to(dtype)).to(x.dtype), h[:, -1]
        T, bounds = x.shape[1], cu_seqlens.long()
        first, last, filled = bounds[:-1].clamp(max=T - 1), bounds[1:] - 1, bounds.diff()[:, None, None] > 0
        if initial_state is not None:  # an empty sequence has no first token: another's, which gets nothing
            update = update.index_add(1, first, torch.where(filled, decay[0, first] * initial_state, 0)[None])
        starting = torch.isin(torch.arange(T, device=x.device), bounds[:-1])
        h = states(decay.masked_fill(starting[:, None, None], 0), update, None)
        final = torch.where(filled, h[0, last], 0 if initial_state is None else initial_state)
        return torch.einsum("btdn,btn->btd", h, C.to(dtype)).to(x.dtype), final


def states(decay: Tensor, update: Tensor, h: Tensor | None) -> Tensor:
    """h_t = decay_t h_{t-1} + update_t: all of them, [B, T, D, N]."""
    T = decay.shape[1]
    # A CPU is busy enough with one token, and faster while all it needs stays in its cache.
    chunk = T if decay.device.type == "cpu" else math.ceil(math.sqrt(T))
    pad = (0, 0, 0, 0, 0, -T % chunk)
    # unbind and not indexing, whose gradients would each be as large as the whole.
    a = F.pad(decay, pad, value=1.0).unflatten(1, (-1, chunk)).unbind(2)
    b = F.pad(update, pad).unflatten(1, (-1, chunk)).unbind(2)
    inside = [b[0]]
    for decay_t, update_t in zip(a[1:], b[1:], strict=True):
        inside.append(torch.addcmul(update_t, decay_t, inside[-1]))
    if h is None and chunk == T:
        return torch.cat(inside, 1)
    passed = [*accumulate(a, torch.mul)]
    entering = [torch.zeros_like(update[:, 0]) if h is None else h]
    for end, through in zip(inside[-1].unbind(1)[:-1], passed[-1].unbind(1)[:-1], strict=True):
        entering.append(torch.addcmul(end, through, entering[-1]))
    entering = torch.stack(entering, 1)
    h = [torch.addcmul(start, through, entering) for start, through in zip(inside, passed, strict=True)]
    return torch.stack(h, 2).flatten(1, 2)[:, :T]
