"""The counterparts of rescale.py and gradients.py for one gate per head (per token or fixed) or no gate.

The decay between two tokens is one number for all channels. With b_t the running sum of the log gate and `total` its
sum over the chunk,

    q_hat_t = scale q_t exp(b_t),   k_hat_t = k_t exp(total - b_t),   A_ij = scale q_i.k_j exp(b_i - b_j)  for i >= j

Every exponent is a sum of log gates and at most 0, so nothing overflows and no chunk needs a pairwise path. The
gradients are

    dA' = scale mask(do v^T) exp(b_i - b_j)
    dq = scale exp(b) (do S^T) + dA' k,   dk = exp(total - b) (v dS^T) + dA'^T q

with S the state at the chunk's start and dS the gradient of the state at its end (see scan.py). The gate's gradient
is as in gradients.py.
"""

import triton
import triton.language as tl

from glalm.kernels.triton.gradients import contract_reads, contract_states
from glalm.kernels.triton.tiles import (
    LOG2E,
    MIN_LOG_GATE,
    compute_log_gates,
    dot_add,
    dot_add_left_split,
    exact_dot,
    flushed_exp2,
    gate_derivative,
    load_tile,
    locate_chunk,
    prefetch_tile,
    round_in_two,
    store_tile,
    store_with_residual,
)


@triton.jit
def load_head_gates(g, t, stride, rows, inv_normalizer, FROM_LOGITS: tl.constexpr):
    """Load the log gates [C] of tokens t of one head, with zeros outside the chunk's rows."""
    inside = (t >= 0) & (t < rows)
    return tl.where(
        inside, compute_log_gates(tl.load(g + t * stride, mask=inside, other=0), inv_normalizer, FROM_LOGITS), 0
    )


@triton.jit
def compute_decays(
    g, sum_matrices, row, rows, h, inv_normalizer,
    H: tl.constexpr, C: tl.constexpr, FROM_LOGITS: tl.constexpr, PARTS: tl.constexpr, FIXED_GATE: tl.constexpr,
):  # fmt: skip
    """Return the decays of one chunk: before [C], after [C], between [C, C] and total.

    before_t is the product of the gates up to token t, after_t that of the gates after t, between_ij that of the gates
    after j up to i, and total that of all gates. g: [B, T, H], or [H] where FIXED_GATE; row: the chunk's first token.
    """
    t = tl.arange(0, C)
    if FIXED_GATE:
        gate = compute_log_gates(tl.load(g + h), inv_normalizer, FROM_LOGITS) * LOG2E
        before = flushed_exp2((t + 1) * gate)
        after = flushed_exp2(tl.maximum(rows - 1 - t, 0) * gate)
        return before, after, flushed_exp2(tl.maximum(t[:, None] - t[None, :], 0) * gate), flushed_exp2(rows * gate)
    g += row * H + h
    gate = load_head_gates(g, t, H, rows, inv_normalizer, FROM_LOGITS)
    later = load_head_gates(g, t + 1, H, rows, inv_normalizer, FROM_LOGITS)
    before = tl.cumsum(gate, 0)
    after = tl.cumsum(later, 0, reverse=True)
    up_to = tl.load(sum_matrices + C * C + t[None, :] * C + t[:, None])  # 1 on and below the diagonal
    between = exact_dot(tl.where(t[:, None] > t[None, :], later[None, :], 0), up_to, PARTS)
    return (
        flushed_exp2(before * LOG2E),
        flushed_exp2(after * LOG2E),
        flushed_exp2(between * LOG2E),
        flushed_exp2(tl.sum(gate, 0) * LOG2E),
    )


@triton.jit(do_not_specialize=["N", "T"])
def rescale_head_kernel(
    q, k, g, sum_matrices, q_hat, k_hat, scores, decay, cu_seqlens, offsets, owners, scale, inv_normalizer, N, T,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, FROM_LOGITS: tl.constexpr,
    GATE_PARTS: tl.constexpr, PRECISION: tl.constexpr, WITH_RESIDUAL: tl.constexpr, FIXED_GATE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Rescale q and k and compute the gated scores, one chunk of one head of queries in each program.

    g: [B, T, H], [H] where FIXED_GATE, or None. Writes what rescale_kernel writes, with decay = exp(total) [tiles].
    """
    tile = tl.program_id(0).to(tl.int64)
    k_tile = tile // GROUP
    chunk = k_tile // H
    h = k_tile % H
    head = tile % (H * GROUP)
    is_first = tile % GROUP == 0
    row, rows = locate_chunk(chunk, N, T, cu_seqlens, offsets, owners, C)
    if rows <= 0:
        return
    t = tl.arange(0, C)
    if g is not None:
        before, after, between, total = compute_decays(
            g, sum_matrices, row, rows, h, inv_normalizer, H, C, FROM_LOGITS, GATE_PARTS, FIXED_GATE
        )  # fmt: skip
        if is_first:
            tl.store(decay + k_tile, total)
    A = tl.zeros([C, C], tl.float32)
    for k0 in range(0, KP, BK):
        p = row * H * K + h * K + k0
        p_q = row * H * GROUP * K + head * K + k0
        x = load_tile(q + p_q, H * GROUP * K, rows, K - k0, C, BK)
        y = load_tile(k + p, H * K, rows, K - k0, C, BK)
        A = dot_add(x, tl.trans(y), A, PRECISION)
        x_hat = x.to(tl.float32) * scale
        y_hat = y.to(tl.float32)
        if g is not None:
            x_hat *= before[:, None]
            y_hat *= after[:, None]
        store_tile(q_hat + tile * C * KP + k0, KP, C, BK, x_hat)
        if is_first:
            store_tile(k_hat + k_tile * C * KP + k0, KP, C, BK, y_hat)
    A *= scale
    if g is not None:
        A *= between
    store_with_residual(
        scores + tile * (1 + WITH_RESIDUAL) * C * C, tl.where(t[:, None] >= t[None, :], A, 0), C, WITH_RESIDUAL
    )


@triton.jit(do_not_specialize=["N", "T", "tokens"])
def gradients_head_kernel(
    q, k, g, v, do, sum_matrices, decay, states, dstates, dq, dk, dg, cu_seqlens, offsets, owners, scale,
    inv_normalizer, N, T, tokens, H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, FROM_LOGITS: tl.constexpr, GATE_PARTS: tl.constexpr,
    PRECISION: tl.constexpr, PREFETCH: tl.constexpr, FIXED_GATE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute dq, dk and dg for BK channels of one chunk of one head of keys in each program.

    dg: float32 [KP / BK, tokens, H], the share of each block of channels; None without a gate or where FIXED_GATE.
    """
    BLOCKS: tl.constexpr = KP // BK
    tile = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    k0 = block * BK
    chunk = tile // H
    h = tile % H
    row, rows = locate_chunk(chunk, N, T, cu_seqlens, offsets, owners, C)
    if rows <= 0:
        return
    p = row * H * K + h * K + k0
    p_q = row * H * GROUP * K + (h * GROUP + GROUP - 1) * K + k0  # of the last head of queries
    if PREFETCH:
        prefetch_tile(k + p, H * K, rows, K - k0, C, BK)
        prefetch_tile(q + p_q, H * GROUP * K, rows, K - k0, C, BK)
    t = tl.arange(0, C)
    if GROUP > 1:
        dy_of_others, r_of_others = differentiate_other_heads(
            q, k, g, v, do, sum_matrices, states, dq, tile, row, rows, h, k0, scale, inv_normalizer,
            H, K, KP, V, VP, BK, BV, C, FROM_LOGITS, GATE_PARTS, PRECISION, FIXED_GATE, GROUP,
        )  # fmt: skip
    dx, dy, dA_high, dA_low, state_products = contract_states(
        v, do, states, dstates, tile, row, rows, h, GROUP - 1, k0, H, KP, V, VP, BK, BV, C, PRECISION, GROUP
    )
    dA = (dA_high.to(tl.float32) + dA_low.to(tl.float32)) * scale
    dx *= scale
    if g is not None:
        before, after, between, _ = compute_decays(
            g, sum_matrices, row, rows, h, inv_normalizer, H, C, FROM_LOGITS, GATE_PARTS, FIXED_GATE
        )
        dA *= between
        dx *= before[:, None]
        dy *= after[:, None]
    dA_high, dA_low = round_in_two(dA, states.dtype.element_ty)
    x = load_tile(q + p_q, H * GROUP * K, rows, K - k0, C, BK)
    y = load_tile(k + p, H * K, rows, K - k0, C, BK)
    x_operand = x.to(states.dtype.element_ty)
    y_operand = y.to(states.dtype.element_ty)
    # Pairs whose write lies in the chunk and whose read lies after it. Taken before dy gets its share inside the chunk.
    ended_products = tl.sum(y.to(tl.float32) * dy)
    if GROUP > 1:
        dy += dy_of_others
    dx = dot_add_left_split(dA_high, dA_low, y_operand, dx, PRECISION)
    dy = dot_add_left_split(tl.trans(dA_high), tl.trans(dA_low), x_operand, dy, PRECISION)
    store_tile(dq + p_q, H * GROUP * K, rows, K - k0, dx)
    store_tile(dk + p, H * K, rows, K - k0, dy)
    if dg is not None:
        r = tl.sum(x.to(tl.float32) * dx - y.to(tl.float32) * dy, 1)
        if GROUP > 1:
            r += r_of_others
        sums = tl.cumsum(r, 0, reverse=True) + tl.sum(state_products) * tl.load(decay + tile) + ended_products
        gate = load_head_gates(g + row * H + h, t, H, rows, inv_normalizer, FROM_LOGITS)
        sums = tl.where(gate > MIN_LOG_GATE, sums, 0)  # The gradient of a clamped gate is 0.
        at = (row + t) * H + h
        if FROM_LOGITS:
            sums *= gate_derivative(tl.load(g + at, mask=t < rows, other=0), inv_normalizer)
        tl.store(dg + block.to(tl.int64) * tokens * H + at, sums, mask=t < rows)


@triton.jit
def differentiate_other_heads(
    q, k, g, v, do, sum_matrices, states, dq, tile, row, rows, h, k0, scale, inv_normalizer,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, FROM_LOGITS: tl.constexpr, GATE_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    FIXED_GATE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Store dq of all heads of queries of head h but the last.

    Returns the sums over these heads of dA'^T q [C, BK], and of q dq over the block's channels [C].
    """
    DTYPE: tl.constexpr = states.dtype.element_ty
    if g is not None:
        before, _, between, _ = compute_decays(
            g, sum_matrices, row, rows, h, inv_normalizer, H, C, FROM_LOGITS, GATE_PARTS, FIXED_GATE
        )
    y = load_tile(k + row * H * K + h * K + k0, H * K, rows, K - k0, C, BK).to(DTYPE)
    dy = tl.zeros([C, BK], tl.float32)
    r = tl.zeros([C], tl.float32)
    for j in range(GROUP - 1):
        p_q = row * H * GROUP * K + (h * GROUP + j) * K + k0
        dx, dA_high, dA_low = contract_reads(
            v, do, states, tile, row, rows, h, j, k0, H, KP, V, VP, BK, BV, C, PRECISION, GROUP
        )
        dx *= scale
        dA = (dA_high.to(tl.float32) + dA_low.to(tl.float32)) * scale
        if g is not None:
            dx *= before[:, None]
            dA *= between
        dA_high, dA_low = round_in_two(dA, DTYPE)
        x = load_tile(q + p_q, H * GROUP * K, rows, K - k0, C, BK)
        dx = dot_add_left_split(dA_high, dA_low, y, dx, PRECISION)
        dy = dot_add_left_split(tl.trans(dA_high), tl.trans(dA_low), x.to(DTYPE), dy, PRECISION)
        r += tl.sum(x.to(tl.float32) * dx, 1)
        store_tile(dq + p_q, H * GROUP * K, rows, K - k0, dx)
    return dy, r
