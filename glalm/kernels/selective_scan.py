"""Mamba's selective scan in PyTorch (Gu and Dao, arXiv 2312.00752, section 3.3).

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = h_t C_t

Each channel has a state of N numbers, and channels share nothing that a matmul could use. To give a GPU enough work at
a time, the sequence is cut into about sqrt(T) chunks. All chunks run the recurrence from 0 side by side, and the
effect of the states that enter them is added afterwards: 2 sqrt(T) steps instead of T. The scan holds a few times
[B, T, D, N] numbers.
"""

import math
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels.common import check_cu_seqlens, check_values, empty_output, wide_dtype
from glalm.kernels.context_parallel import ContextShard, check_context, exchange_states


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    context: ContextShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the selective scan on any device. Derivatives of any order and mode come from autograd.

    Args:
        x: [batch, T, D], floating point.
        dt: [batch, T, D], > 0.
        A: [D, N], < 0.
        B, C: [batch, T, N].
        initial_state: h_0, [n, D, N], float32 (float64 for float64 inputs); zeros if None.
        cu_seqlens: [n + 1], the bounds of n sequences packed into one row (batch = 1). Without it, n is the batch.
        context: this process's shard of sequences that several processes share; see ContextShard. Of packed sequences,
            the final states are then not those of single sequences, and mean nothing.

    Returns:
        y [batch, T, D] in x's dtype, and the final states [n, D, N] in initial_state's.

    Raises:
        ValueError: cu_seqlens has the wrong shape or dtype, or, on the CPU, does not rise from 0 to T.
    """
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, len(x))
        check_values(None, x, cu_seqlens)
    if context is not None:
        check_context(context, initial_state, False, cu_seqlens)
        return scan_over_processes(x, dt, A, B, C, initial_state, cu_seqlens, context)
    dtype = wide_dtype(x)
    T = x.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        if T == 0:
            n = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
            final_state = x.new_zeros(n, *A.shape, dtype=dtype) if initial_state is None else initial_state
            return empty_output(x, dt, A, B, C), final_state
        decay = (dt.to(dtype)[..., None] * A.to(dtype)).exp()
        update = (dt.to(dtype) * x.to(dtype))[..., None] * B.to(dtype)[:, :, None]
        if cu_seqlens is None:
            h = scan_states(decay, update, initial_state)
            final_state = h[:, -1]
        else:
            bounds = cu_seqlens.long()
            first = bounds[:-1].clamp(max=T - 1)
            last = bounds[1:] - 1
            has_tokens = bounds.diff()[:, None, None] > 0
            if initial_state is not None:
                # `first` of an empty sequence is a token of another sequence, to which it adds 0.
                entering = torch.where(has_tokens, decay[0, first] * initial_state, 0)
                update = update.index_add(1, first, entering[None])
            starts = torch.isin(torch.arange(T, device=x.device), bounds[:-1])
            h = scan_states(decay.masked_fill(starts[:, None, None], 0), update, None)
            final_state = torch.where(has_tokens, h[0, last], 0 if initial_state is None else initial_state)
        return torch.einsum("btdn,btn->btd", h, C.to(dtype)).to(x.dtype), final_state


def scan_over_processes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    context: ContextShard,
) -> tuple[Tensor, Tensor]:
    """Scan the shard from states of zeros, exchange the states, and add the effect of those that enter."""
    y, local = selective_scan(x, dt, A, B, C, cu_seqlens=cu_seqlens)
    dtype = wide_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        steps, reads = (context.unpack_rows(z).to(dtype) for z in (dt, C))
        decay = (steps.cumsum(1)[..., None] * A.to(dtype)).exp()
        total = context.place_first(decay[:, -1], len(local))
        entering, final = exchange_states(local, total, initial_state, context)
        effect = torch.einsum("btdn,bdn,btn->btd", decay, context.select_first(entering), reads)
        effect = effect * context.is_in_first(effect, cu_seqlens)
        return (y + effect.reshape(y.shape)).to(y.dtype), final


def scan_states(decay: Tensor, update: Tensor, h: Tensor | None) -> Tensor:
    """Return all states of h_t = decay_t h_{t-1} + update_t, [B, T, D, N], from h [B, D, N] or zeros."""
    T = decay.shape[1]
    # On the CPU, one token is enough work at a time, and its operands stay in the cache.
    chunk = T if decay.device.type == "cpu" else math.ceil(math.sqrt(T))
    padding = (0, 0, 0, 0, 0, -T % chunk)
    # The backward pass of unbind writes one gradient. That of indexing would allocate a full one for every token.
    decays = F.pad(decay, padding, value=1.0).unflatten(1, (-1, chunk)).unbind(2)
    updates = F.pad(update, padding).unflatten(1, (-1, chunk)).unbind(2)
    from_zero = [updates[0]]
    for decay_t, update_t in zip(decays[1:], updates[1:], strict=True):
        from_zero.append(torch.addcmul(update_t, decay_t, from_zero[-1]))
    if h is None and chunk == T > 1:  # One token takes the general path, in which its decay has a gradient (of 0).
        return torch.cat(from_zero, 1)
    products = [*accumulate(decays, torch.mul)]
    entering = [torch.zeros_like(update[:, 0]) if h is None else h]
    for end, product in zip(from_zero[-1].unbind(1)[:-1], products[-1].unbind(1)[:-1], strict=True):
        entering.append(torch.addcmul(end, product, entering[-1]))
    entering_all = torch.stack(entering, 1)
    states = [torch.addcmul(start, product, entering_all) for start, product in zip(from_zero, products, strict=True)]
    return torch.stack(states, 2).flatten(1, 2)[:, :T]
