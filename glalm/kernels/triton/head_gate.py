"""One gate a head, the same for every token or not, or none: prepare.py and gradients.py where a chunk's decays are one
number a pair of tokens.

With b_t the running sum of the log gate and `total` its sum over the chunk,

    q_hat_t = scale q_t exp(b_t),   k_hat_t = k_t exp(total - b_t),   A_ij = scale q_i.k_j exp(b_i - b_j)  for i >= j

and every exponent is a sum of gates, taken as such: nothing overflows, no chunk needs another path. The gradients are

    dA' = scale mask(do v^T) exp(b_i - b_j)
    dq = scale exp(b) (do S^T) + dA' k,   dk = exp(total - b) (v dS^T) + dA'^T q

with S and dS the states at the chunk's start and of its end (see scan.py), and the gate's as in gradients.py.
"""

import triton
import triton.language as tl

from glalm.kernels.triton.gradients import through_states
from glalm.kernels.triton.tiles import (
    FLOOR,
    LOG2E,
    chunk_rows,
    dot,
    exact_dot,
    exp2,
    gate_slope,
    load_tile,
    log_gates,
    parts_of,
    prefetch_tile,
    store_parts,
    store_tile,
    two_part_dot,
)


@triton.jit
def load_head_gates(g, t, stride, rows, inverse, LOGITS: tl.constexpr):
    """Log gates of the tokens t, [C], of one head; 0 outside of the chunk's rows."""
    inside = (t >= 0) & (t < rows)
    return tl.where(inside, log_gates(tl.load(g + t * stride, mask=inside, other=0), inverse, LOGITS), 0)


@triton.jit
def decays(
    g, signs, row, rows, h, inverse,
    H: tl.constexpr, C: tl.constexpr, LOGITS: tl.constexpr, PARTS: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """exp of the gates' sums up to and with t, [C], after t, [C], and after j up to and with i, [C, C]; and of
    the sum of all. g: [B, T, H], or [H] where the gate is FIXED; row: the chunk's first token."""
    t = tl.arange(0, C)
    if FIXED:
        gate = log_gates(tl.load(g + h), inverse, LOGITS) * LOG2E
        before, after = exp2((t + 1) * gate), exp2(tl.maximum(rows - 1 - t, 0) * gate)
        return before, after, exp2(tl.maximum(t[:, None] - t[None, :], 0) * gate), exp2(rows * gate)
    g += row * H + h
    gate = load_head_gates(g, t, H, rows, inverse, LOGITS)
    later = load_head_gates(g, t + 1, H, rows, inverse, LOGITS)
    before = tl.cumsum(gate, 0)
    after = tl.cumsum(later, 0, reverse=True)
    up_to = tl.load(signs + C * C + t[None, :] * C + t[:, None])  # 1 on and below the diagonal
    between = exact_dot(tl.where(t[:, None] > t[None, :], later[None, :], 0), up_to, PARTS)
    return exp2(before * LOG2E), exp2(after * LOG2E), exp2(between * LOG2E), exp2(tl.sum(gate, 0) * LOG2E)


@triton.jit(do_not_specialize=["N", "T"])
def prepare_head_kernel(
    q, k, g, signs, q_hat, k_hat, scores, decay, cu_seqlens, offsets, owners, scale, inverse, N, T,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LOGITS: tl.constexpr,
    GATE_PARTS: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one head. g: [B, T, H], [H] where FIXED, or None.

    Writes what prepare_kernel does, and exp(total).
    """
    tile = tl.program_id(0).to(tl.int64)
    chunk, h = tile // H, tile % H
    row, rows = chunk_rows(chunk, N, T, cu_seqlens, offsets, owners, C)
    if rows <= 0:
        return
    t = tl.arange(0, C)
    if g is not None:
        before, after, between, total = decays(
            g, signs, row, rows, h, inverse, H, C, LOGITS, GATE_PARTS, FIXED
        )  # fmt: skip
        tl.store(decay + tile, total)
    A = tl.zeros([C, C], tl.float32)
    for k0 in range(0, KP, BK):
        p = row * H * K + h * K + k0
        x = load_tile(q + p, H * K, rows, K - k0, C, BK)
        y = load_tile(k + p, H * K, rows, K - k0, C, BK)
        A = dot(x, tl.trans(y), A, PRECISION)
        x_hat, y_hat = x.to(tl.float32) * scale, y.to(tl.float32)
        if g is not None:
            x_hat *= before[:, None]
            y_hat *= after[:, None]
        store_tile(q_hat + tile * C * KP + k0, KP, C, BK, x_hat)
        store_tile(k_hat + tile * C * KP + k0, KP, C, BK, y_hat)
    A *= scale
    if g is not None:
        A *= between
    store_parts(scores + tile * (1 + LOW) * C * C, tl.where(t[:, None] >= t[None, :], A, 0), C, LOW)


@triton.jit(do_not_specialize=["N", "T", "tokens"])
def gradients_head_kernel(
    q, k, g, v, do, signs, decay, states, dstates, dq, dk, dg, cu_seqlens, offsets, owners, scale, inverse,
    N, T, tokens,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LOGITS: tl.constexpr,
    GATE_PARTS: tl.constexpr, PRECISION: tl.constexpr, PREFETCH: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """One program: BK channels of one chunk of one head, over all of V.

    dg: float32 [KP / BK, tokens, H], the part of every block of channels; None where g is, or FIXED.
    """
    BLOCKS: tl.constexpr = KP // BK
    tile = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    k0 = block * BK
    chunk, h = tile // H, tile % H
    row, rows = chunk_rows(chunk, N, T, cu_seqlens, offsets, owners, C)
    if rows <= 0:
        return
    p = row * H * K + h * K + k0
    if PREFETCH:
        prefetch_tile(k + p, H * K, rows, K - k0, C, BK)
        prefetch_tile(q + p, H * K, rows, K - k0, C, BK)
    t = tl.arange(0, C)
    dx, dy, dA_high, dA_low, across = through_states(
        v, do, states, dstates, tile, row, rows, h, k0, H, KP, V, VP, BK, BV, C, PRECISION
    )
    dA = (dA_high.to(tl.float32) + dA_low.to(tl.float32)) * scale
    dx *= scale
    if g is not None:
        before, after, between, _ = decays(g, signs, row, rows, h, inverse, H, C, LOGITS, GATE_PARTS, FIXED)
        dA *= between
        dx *= before[:, None]
        dy *= after[:, None]
    dA_high, dA_low = parts_of(dA, states.dtype.element_ty)
    x = load_tile(q + p, H * K, rows, K - k0, C, BK)
    y = load_tile(k + p, H * K, rows, K - k0, C, BK)
    x_operand, y_operand = x.to(states.dtype.element_ty), y.to(states.dtype.element_ty)
    ended = tl.sum(y.to(tl.float32) * dy)
    dx = two_part_dot(dA_high, dA_low, y_operand, dx, PRECISION)
    dy = two_part_dot(tl.trans(dA_high), tl.trans(dA_low), x_operand, dy, PRECISION)
    store_tile(dq + p, H * K, rows, K - k0, dx)
    store_tile(dk + p, H * K, rows, K - k0, dy)
    if dg is not None:
        r = tl.sum(x.to(tl.float32) * dx - y.to(tl.float32) * dy, 1)
        sums = tl.cumsum(r, 0, reverse=True) + tl.sum(across) * tl.load(decay + tile) + ended
        gate = load_head_gates(g + row * H + h, t, H, rows, inverse, LOGITS)
        sums = tl.where(gate > FLOOR, sums, 0)  # below FLOOR nothing passes the gate
        at = (row + t) * H + h
        if LOGITS:
            sums *= gate_slope(tl.load(g + at, mask=t < rows, other=0), inverse)
        tl.store(dg + block.to(tl.int64) * tokens * H + at, sums, mask=t < rows)
