"""Causal convolutions whose filters are as long as the text, by the fast Fourier transform (FFT).

    y_t = sum_{0 <= i < L} h_i x_{t - i},   x = 0 before the sequence that token t belongs to

A batch takes one FFT over T + L tokens. An FFT knows no bounds of packed sequences, so these are convolved by divide
and conquer: the text is cut into two halves, and what the first half adds to the second comes from one sequence alone,
the one that the cut divides. So one masked FFT computes it exactly, and both halves are cut again until one token is
left. This takes O(T log^2 T), waits for no length on the host, and breaks no compiled graph.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels.common import (
    check_cu_seqlens,
    check_values,
    empty_output,
    sequence_ids,
    wide_dtype,
    without_autocast,
)


def long_convolution(x: Tensor, h: Tensor, *, outputs: int | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Convolve the tokens of every channel with a filter, in float32 (float64 if x is float64) on any device.

    Rounding errors are relative to the largest inputs and taps, because an FFT adds all of them up. Through these
    errors, a token's output also depends on the tokens after it. Derivatives of any order and mode come from autograd.

    Args:
        x: [B, T, ...], floating point.
        h: [L, ...], the taps; h[0] weighs the token itself. Its other axes are as many as those of x, and broadcast.
        outputs: at most T, to return the outputs of the last so many tokens; one needs no FFT. None: return all.
        cu_seqlens: [N + 1], the bounds of N sequences packed into one row (B = 1), for which `outputs` must be None.

    Returns:
        y [B, T or outputs, ...], float32 or float64.

    Raises:
        ValueError: `outputs` is not from 0 to T, or is given with cu_seqlens. cu_seqlens has the wrong shape or dtype,
            or, on the CPU, does not rise from 0 to T.
    """
    dtype = wide_dtype(x)
    T = x.shape[1]
    if outputs is not None and (cu_seqlens is not None or not 0 <= outputs <= T):
        raise ValueError(f"outputs={outputs}: expected 0 to T = {T} without cu_seqlens, or None")
    x = x.to(dtype)
    h = h[:T].to(dtype)
    if T == 0 or x.shape[0] == 0:  # The FFT library refuses an empty batch.
        return empty_output(x if outputs is None else x[:, T - outputs :], h)
    with without_autocast(x):
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, len(x))
            check_values(None, x, cu_seqlens)
            return h[0] * x + convolve_between_blocks(x, h, sequence_ids(cu_seqlens, T), block=1)
        if outputs == 1:
            return (x[:, T - len(h) :] * h.flip(0)).sum(1, keepdim=True)
        # FFTs over a prime number of tokens, or a multiple of a large prime, take several times as long.
        period = -(-(T + len(h)) // 64) * 64
        y = convolve_circularly(x, h, period)
        return y[:, T - (T if outputs is None else outputs) : T]


def convolve_circularly(x: Tensor, h: Tensor, period: int) -> Tensor:
    """Return the circular convolution [B, period, ...] of x [B, T, ...] and h [L, ...], cut or padded to `period`."""
    spectrum = torch.fft.rfft(x, period, dim=1) * torch.fft.rfft(h, period, dim=0)
    return torch.fft.irfft(spectrum, period, dim=1)


def convolve_between_blocks(x: Tensor, h: Tensor, sequence: Tensor, block: int) -> Tensor:
    """Return the part of the convolution [B, T, ...] that comes from tokens in earlier blocks than the token's own.

    Args:
        x: [B, T, ...], float32 or float64.
        h: [L, ...], in the dtype of x.
        sequence: [T], the sequence that each token belongs to.
        block: tokens in a block. With 1, only h_0 x_t is missing.
    """
    T = x.shape[1]
    size = block
    while size < len(h):
        size *= 2
    surplus = -T % size
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, surplus))
    sequence = F.pad(sequence, (0, surplus), value=-1)
    y = torch.zeros_like(x)
    if size < T:  # Blocks of at least L tokens reach the next block only, so the first cuts are those between them.
        blocks = x.unflatten(1, (-1, size))
        ids = sequence.view(-1, size)
        added = convolve_into_next_block(blocks[:, :-1], ids[:-1], ids[1:], h)
        y = y + torch.cat([torch.zeros_like(y[:, :size]), added.flatten(1, 2)], 1)
    while size > block:
        size //= 2
        halves = x.unflatten(1, (-1, 2, size))
        ids = sequence.view(-1, 2, size)
        added = convolve_into_next_block(halves[:, :, 0], ids[:, 0], ids[:, 1], h)
        y = y + torch.stack([torch.zeros_like(added), added], 2).flatten(1, 3)
    return y[:, :T]


def convolve_into_next_block(x: Tensor, ids: Tensor, next_ids: Tensor, h: Tensor) -> Tensor:
    """Return what the tokens of each block add to the outputs of the block after it, [B, blocks, size, ...].

    Args:
        x: [B, blocks, size, ...].
        ids: [blocks, size], the sequences of the blocks' tokens.
        next_ids: [blocks, size], the sequences of the tokens in the blocks after these.
        h: [L, ...].
    """
    last = ids[:, -1:]  # No other sequence continues in the next block.
    is_read = (ids == last).view(*ids.shape, *[1] * (x.dim() - 3))
    is_reached = (next_ids == last).view(*ids.shape, *[1] * (x.dim() - 3))
    size = ids.shape[1]
    # Only taps below 2 * size are read, and what they add beyond the period wraps around to the first `size` outputs.
    y = convolve_circularly(x.where(is_read, 0).flatten(0, 1), h, 2 * size)[:, size:]
    return y.unflatten(0, x.shape[:2]).where(is_reached, 0)
