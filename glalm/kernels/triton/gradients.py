"""Compute dq, dk and dg of every chunk in parallel, from the states and their gradients that the scans stored.

With S_hat and dS_hat of a chunk (see rescale.py and scan.py) and dA = mask(do v^T):

    dq_hat = do S_hat^T + dA k_hat,   dq_t = scale exp(b_t - total/2) dq_hat_t
    dk_hat = v dS_hat^T + dA^T q_hat, dk_t = exp(total/2 - b_t) dk_hat_t

The gradient of the gate follows from these (GLA, arXiv 2312.06635, section 4). The gate at t acts on every pair of a
write before t and a read at or after t. With r_t = q_t dq_t - k_t dk_t (reads minus writes),

    dg_t = sum_{s >= t in the chunk} r_s + (pairs whose read lies after the chunk),
    pairs whose read lies after the chunk = sum_v S_hat dS_hat + sum_s k_hat_s (v_s dS_hat^T).

In the sum of r, pairs on one side of t cancel, and only their rounding errors remain, which become the error of dg. So
inside the chunk q_hat, k_hat and dA are used in two parts, nearly unrounded, and with the same values in dq and in dk.

Where GROUP heads of queries share a head of keys and values, dA^T q_hat and q_t dq_t are sums over them, always in the
same order. The program of a head of keys takes one pass over the states for each head of queries.
"""

import triton
import triton.language as tl

from glalm.kernels.triton.rescale import compute_clamped_exponents, compute_exponents, load_gates
from glalm.kernels.triton.tiles import (
    MIN_LOG_GATE,
    any_marked,
    compute_log_gates,
    dot_add,
    dot_add_both_split,
    exact_dot,
    flushed_exp2,
    gate_derivative,
    load_tile,
    locate_chunk,
    prefetch_tile,
    round_in_two,
    store_tile,
)


@triton.jit
def contract_states(
    v, do, states, dstates, tile, row, rows, h, j, k0,
    H: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Return do S^T and v dS^T [C, BK], dA = mask(do v^T) [C, C] in two parts, and sum_v S dS [BK], in one pass over V.

    states and dstates hold S and dS of head h as the scans stored them; do is that of its j-th head of queries. Where
    dstates is None, v dS^T and sum_v S dS are zeros.
    """
    states += tile * VP * KP + k0
    if dstates is not None:
        dstates += tile * VP * KP + k0
    w = row * H * V + h * V
    w_do = row * H * GROUP * V + (h * GROUP + j) * V
    dx = tl.zeros([C, BK], tl.float32)
    dy = tl.zeros([C, BK], tl.float32)
    dA = tl.zeros([C, C], tl.float32)
    products = tl.zeros([BV, BK], tl.float32)
    for v0 in range(0, VP, BV):
        S = load_tile(states + v0 * KP, KP, BV, BK, BV, BK)
        if dstates is not None:
            dS = load_tile(dstates + v0 * KP, KP, BV, BK, BV, BK)
        do_tile = load_tile(do + w_do + v0, H * GROUP * V, rows, V - v0, C, BV).to(S.dtype)
        v_tile = load_tile(v + w + v0, H * V, rows, V - v0, C, BV).to(S.dtype)
        dx = dot_add(do_tile, S, dx, PRECISION)
        if dstates is not None:
            dy = dot_add(v_tile, dS, dy, PRECISION)
        dA = dot_add(do_tile, tl.trans(v_tile), dA, PRECISION)
        if dstates is not None:
            products += S.to(tl.float32) * dS.to(tl.float32)
    t = tl.arange(0, C)
    dA_high, dA_low = round_in_two(tl.where(t[:, None] >= t[None, :], dA, 0), states.dtype.element_ty)
    return dx, dy, dA_high, dA_low, tl.sum(products, axis=0)


@triton.jit(do_not_specialize=["N", "T", "items"])
def gradients_kernel(
    q, k, g, v, do, sum_matrices, pairwise_marks, states, dstates, dq, dk, dg, cu_seqlens, offsets, owners, scale,
    inv_normalizer, N, T, items, H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, FROM_LOGITS: tl.constexpr, GATE_PARTS: tl.constexpr,
    SUM_PARTS: tl.constexpr, PRECISION: tl.constexpr, PREFETCH: tl.constexpr, PAIRWISE: tl.constexpr,
    ITEMS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Process ITEMS items in each program, an item being BK channels of one chunk of one head of keys.

    The kernel is compiled twice: with PAIRWISE it processes the marked chunks, without it all others. As two kernels,
    the fast path need not reserve the registers of the pairwise one.
    """
    BLOCKS: tl.constexpr = KP // BK
    if PAIRWISE:  # noqa: SIM102 (`and` would load the marks in both kernels)
        if not any_marked(pairwise_marks, items, BLOCKS, ITEMS):
            return
    for i in range(ITEMS):
        item = tl.program_id(0) + i * tl.num_programs(0)
        tile = (tl.minimum(item, items - 1) // BLOCKS).to(tl.int64)
        k0 = item % BLOCKS * BK
        chunk = tile // H
        h = tile % H
        row, rows = locate_chunk(chunk, N, T, cu_seqlens, offsets, owners, C)
        marked = tl.load(pairwise_marks + tile) != 0
        if PAIRWISE:
            rows = tl.where((item < items) & marked, rows, 0)
        if rows > 0:
            p = row * H * K + h * K + k0
            p_q = row * H * GROUP * K + (h * GROUP + GROUP - 1) * K + k0  # of the last head of queries
            width = K - k0
            if PREFETCH:
                prefetch_tile(g + p, H * K, rows, width, C, BK)
                prefetch_tile(k + p, H * K, rows, width, C, BK)
                prefetch_tile(q + p_q, H * GROUP * K, rows, width, C, BK)
            if GROUP > 1:
                dy_of_others, r_of_others = differentiate_other_heads(
                    q, k, g, v, do, sum_matrices, states, dq, tile, row, rows, marked, h, k0, scale, inv_normalizer,
                    H, K, KP, V, VP, BK, BV, C, FROM_LOGITS, GATE_PARTS, PRECISION, PAIRWISE, GROUP,
                )  # fmt: skip
            dx, dy, dA_high, dA_low, state_products = contract_states(
                v, do, states, dstates, tile, row, rows, h, GROUP - 1, k0, H, KP, V, VP, BK, BV, C, PRECISION, GROUP
            )
            gate = load_gates(g + p, H * K, rows, width, inv_normalizer, C, BK, FROM_LOGITS)
            sign = load_tile(sum_matrices, C, C, C, C, C)
            for_q = compute_exponents(sign, gate, GATE_PARTS)
            for_k = -for_q
            if PAIRWISE:
                for_q, for_k = compute_clamped_exponents(sign, gate, GATE_PARTS)
            y = load_tile(k + p, H * K, rows, width, C, BK).to(tl.float32) * flushed_exp2(for_k)
            state_products += tl.sum(y * dy, axis=0)
            if not PAIRWISE:
                dx = dot_add_both_split(dA_high, dA_low, y, dx, PRECISION)
            x = load_tile(q + p_q, H * GROUP * K, rows, width, C, BK).to(tl.float32) * (flushed_exp2(for_q) * scale)
            if not PAIRWISE:
                if GROUP > 1:
                    dy += dy_of_others
                dy = dot_add_both_split(tl.trans(dA_high), tl.trans(dA_low), x, dy, PRECISION)
            r = x * dx - y * dy
            dy *= flushed_exp2(for_k)
            dx *= flushed_exp2(for_q) * scale
            if PAIRWISE:
                if GROUP > 1:
                    dy += dy_of_others
                dA = dA_high.to(tl.float32) + dA_low.to(tl.float32)
                dx, dy = add_pairwise_gradients(
                    q + p_q, k + p, g + p, dx, dy, dA, scale, inv_normalizer, rows, width,
                    H, K, BK, C, FROM_LOGITS, GROUP,
                )  # fmt: skip
                r = load_tile(q + p_q, H * GROUP * K, rows, width, C, BK).to(tl.float32) * dx
                r -= load_tile(k + p, H * K, rows, width, C, BK).to(tl.float32) * dy
            else:
                # Marked chunks are dropped here, at the store: waiting for the mark earlier costs 2 % of the time.
                rows = tl.where(marked, 0, rows)
            if GROUP > 1:
                r += r_of_others
            store_tile(dq + p_q, H * GROUP * K, rows, width, dx)
            store_tile(dk + p, H * K, rows, width, dy)
            sums = exact_dot(load_tile(sum_matrices + C * C, C, C, C, C, C), r, SUM_PARTS) + state_products[None, :]
            if PAIRWISE:  # The gradient of a clamped gate is 0.
                sums = tl.where(gate > MIN_LOG_GATE, sums, 0)
            if FROM_LOGITS:
                sums *= gate_derivative(load_tile(g + p, H * K, rows, width, C, BK), inv_normalizer)
            store_tile(dg + p, H * K, rows, width, sums)


@triton.jit
def differentiate_other_heads(
    q, k, g, v, do, sum_matrices, states, dq, tile, row, rows, marked, h, k0, scale, inv_normalizer,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, FROM_LOGITS: tl.constexpr, GATE_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    PAIRWISE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Store dq of all heads of queries of head h but the last.

    Returns the sums over these heads of dA^T q_hat, or of their share of dk with PAIRWISE, and of q dq, [C, BK].
    """
    p = row * H * K + h * K + k0
    width = K - k0
    gate = load_gates(g + p, H * K, rows, width, inv_normalizer, C, BK, FROM_LOGITS)
    sign = load_tile(sum_matrices, C, C, C, C, C)
    for_q = compute_exponents(sign, gate, GATE_PARTS)
    y = load_tile(k + p, H * K, rows, width, C, BK).to(tl.float32) * flushed_exp2(-for_q)
    if PAIRWISE:
        for_q, _ = compute_clamped_exponents(sign, gate, GATE_PARTS)
    factor = flushed_exp2(for_q) * scale
    dy = tl.zeros([C, BK], tl.float32)
    r = tl.zeros([C, BK], tl.float32)
    for j in range(GROUP - 1):
        p_q = row * H * GROUP * K + (h * GROUP + j) * K + k0
        dx, dA_high, dA_low = contract_reads(
            v, do, states, tile, row, rows, h, j, k0, H, KP, V, VP, BK, BV, C, PRECISION, GROUP
        )
        x = load_tile(q + p_q, H * GROUP * K, rows, width, C, BK).to(tl.float32)
        if PAIRWISE:
            dA = dA_high.to(tl.float32) + dA_low.to(tl.float32)
            dx, dy = add_pairwise_gradients(
                q + p_q, k + p, g + p, dx * factor, dy, dA, scale, inv_normalizer, rows, width,
                H, K, BK, C, FROM_LOGITS, GROUP,
            )  # fmt: skip
        else:
            dx = dot_add_both_split(dA_high, dA_low, y, dx, PRECISION) * factor
            dy = dot_add_both_split(tl.trans(dA_high), tl.trans(dA_low), x * factor, dy, PRECISION)
        r += x * dx
        store_tile(dq + p_q, H * GROUP * K, rows if PAIRWISE else tl.where(marked, 0, rows), width, dx)
    return dy, r


@triton.jit
def contract_reads(
    v, do, states, tile, row, rows, h, j, k0,
    H: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Return of contract_states what depends on the head of queries: do S^T, and dA in two parts."""
    dx, _, dA_high, dA_low, _ = contract_states(
        v, do, states, None, tile, row, rows, h, j, k0, H, KP, V, VP, BK, BV, C, PRECISION, GROUP
    )
    return dx, dA_high, dA_low


@triton.jit
def add_pairwise_gradients(
    q, k, g, dx, dy, dA, scale, inv_normalizer, rows, width,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, FROM_LOGITS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Add the gradients of pairs inside the chunk to dq (dx) and dk (dy), one write j at a time, from the last.

    Only gates between the write and the read are summed, so no difference of large sums appears.
    """
    t = tl.arange(0, C)
    c = tl.arange(0, BK)
    between = tl.zeros([C, BK], tl.float32)
    next_gate = tl.zeros([BK], tl.float32)  # log gates of token j + 1
    x = load_tile(q, H * GROUP * K, rows, width, C, BK).to(tl.float32) * scale
    for back in range(0, rows):
        j = rows - 1 - back
        y = tl.load(k + j * H * K + c, mask=c < width, other=0).to(tl.float32)
        between = tl.where(t[:, None] > j, between + next_gate[None, :], 0)
        next_gate = compute_log_gates(tl.load(g + j * H * K + c, mask=c < width, other=0), inv_normalizer, FROM_LOGITS)
        column = tl.sum(tl.where(t[None, :] == j, dA, 0), axis=1)
        pair = column[:, None] * tl.exp(between)
        dx += pair * y[None, :] * scale
        dy += tl.where(t[:, None] == j, tl.sum(pair * x, axis=0)[None, :], 0)
    return dx, dy
