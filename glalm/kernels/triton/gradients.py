"""dq, dk and dg of every chunk at once, from the stored states of both directions.

With S_hat and dS_hat of a chunk (see prepare.py, scan.py) and dA = mask(do v^T):

    dq_hat = do S_hat^T + dA k_hat,   dq_t = scale exp(b_t - total/2) dq_hat_t
    dk_hat = v dS_hat^T + dA^T q_hat, dk_t = exp(total/2 - b_t) dk_hat_t

The gate's gradient needs no more than that (GLA, arXiv 2312.06635, section 4): a gate acts on every pair of a write
before it and a read from it on, so with r_t = q_t dq_t - k_t dk_t, reads less writes,

    dg_t = sum_{s >= t in the chunk} r_s + (pairs that end after the chunk),
    pairs that end after the chunk = sum_v S_hat dS_hat + sum_s k_hat_s (v_s dS_hat^T).

Pairs on one side of t cancel there, and what is left of their rounding errors is the error of dg. So inside the chunk
q_hat, k_hat and dA are used in two parts, nearly unrounded, and the same numbers in both roles.
"""

import triton
import triton.language as tl

from glalm.kernels.triton.rescale import clamped_exponents, exponents, load_gates
from glalm.kernels.triton.tiles import (
    FLOOR,
    any_marked,
    chunk_rows,
    dot,
    exact_dot,
    exp2,
    gate_slope,
    load_tile,
    log_gates,
    parts_of,
    precise_dot,
    prefetch_tile,
    store_tile,
)


@triton.jit
def through_states(
    v, do, states, dstates, tile, row, rows, h, k0,
    H: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass over V: do S^T and v dS^T [C, BK], dA = mask(do v^T) [C, C] in two parts, sum_v S dS [BK].

    S and dS as the scans stored them.
    """
    states += tile * VP * KP + k0
    dstates += tile * VP * KP + k0
    w = row * H * V + h * V
    dx = tl.zeros([C, BK], tl.float32)
    dy = tl.zeros([C, BK], tl.float32)
    dA = tl.zeros([C, C], tl.float32)
    products = tl.zeros([BV, BK], tl.float32)
    for v0 in range(0, VP, BV):
        S = load_tile(states + v0 * KP, KP, BV, BK, BV, BK)
        dS = load_tile(dstates + v0 * KP, KP, BV, BK, BV, BK)
        do_tile = load_tile(do + w + v0, H * V, rows, V - v0, C, BV).to(S.dtype)
        v_tile = load_tile(v + w + v0, H * V, rows, V - v0, C, BV).to(S.dtype)
        dx = dot(do_tile, S, dx, PRECISION)
        dy = dot(v_tile, dS, dy, PRECISION)
        dA = dot(do_tile, tl.trans(v_tile), dA, PRECISION)
        products += S.to(tl.float32) * dS.to(tl.float32)
    t = tl.arange(0, C)
    dA_high, dA_low = parts_of(tl.where(t[:, None] >= t[None, :], dA, 0), states.dtype.element_ty)
    return dx, dy, dA_high, dA_low, tl.sum(products, axis=0)


@triton.jit(do_not_specialize=["N", "T", "items"])
def gradients_kernel(
    q, k, g, v, do, signs, exact, states, dstates, dq, dk, dg, cu_seqlens, offsets, owners, scale, inverse,
    N, T, items,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LOGITS: tl.constexpr, GATE_PARTS: tl.constexpr,
    SUM_PARTS: tl.constexpr, PRECISION: tl.constexpr, PREFETCH: tl.constexpr, EXACT: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """One program: EACH items, an item being BK channels of one chunk of one head, over all of V.

    With EXACT it takes the chunks marked `exact` and leaves the others, without EXACT the reverse: two kernels from
    one text, so that the pairwise path costs the usual one no registers.
    """
    BLOCKS: tl.constexpr = KP // BK
    if EXACT:  # noqa: SIM102 (and would load first)
        if not any_marked(exact, items, BLOCKS, EACH):
            return
    for i in range(EACH):
        item = tl.program_id(0) + i * tl.num_programs(0)
        tile = (tl.minimum(item, items - 1) // BLOCKS).to(tl.int64)
        k0 = item % BLOCKS * BK
        chunk, h = tile // H, tile % H
        row, rows = chunk_rows(chunk, N, T, cu_seqlens, offsets, owners, C)
        marked = tl.load(exact + tile) != 0
        if EXACT:
            rows = tl.where((item < items) & marked, rows, 0)
        if rows > 0:
            p = row * H * K + h * K + k0
            width = K - k0
            if PREFETCH:
                prefetch_tile(g + p, H * K, rows, width, C, BK)
                prefetch_tile(k + p, H * K, rows, width, C, BK)
                prefetch_tile(q + p, H * K, rows, width, C, BK)
            dx, dy, dA_high, dA_low, across = through_states(
                v, do, states, dstates, tile, row, rows, h, k0, H, KP, V, VP, BK, BV, C, PRECISION
            )
            gate = load_gates(g + p, H * K, rows, width, inverse, C, BK, LOGITS)
            sign = load_tile(signs, C, C, C, C, C)
            for_q = exponents(sign, gate, GATE_PARTS)
            for_k = -for_q
            if EXACT:
                for_q, for_k = clamped_exponents(sign, gate, GATE_PARTS)
            y = load_tile(k + p, H * K, rows, width, C, BK).to(tl.float32) * exp2(for_k)
            across += tl.sum(y * dy, axis=0)
            if not EXACT:
                dx = precise_dot(dA_high, dA_low, y, dx, PRECISION)
            x = load_tile(q + p, H * K, rows, width, C, BK).to(tl.float32) * (exp2(for_q) * scale)
            if not EXACT:
                dy = precise_dot(tl.trans(dA_high), tl.trans(dA_low), x, dy, PRECISION)
            r = x * dx - y * dy
            dy *= exp2(for_k)
            dx *= exp2(for_q) * scale
            if EXACT:
                dA = dA_high.to(tl.float32) + dA_low.to(tl.float32)
                dx, dy = add_pairs(q + p, k + p, g + p, dx, dy, dA, scale, inverse, rows, width, H, K, BK, C, LOGITS)
                r = load_tile(q + p, H * K, rows, width, C, BK).to(tl.float32) * dx
                r -= load_tile(k + p, H * K, rows, width, C, BK).to(tl.float32) * dy
            else:  # not before: to wait for the mark first is 2% of the time
                rows = tl.where(marked, 0, rows)
            store_tile(dq + p, H * K, rows, width, dx)
            store_tile(dk + p, H * K, rows, width, dy)
            sums = exact_dot(load_tile(signs + C * C, C, C, C, C, C), r, SUM_PARTS) + across[None, :]
            if EXACT:  # below FLOOR nothing passes the gate
                sums = tl.where(gate > FLOOR, sums, 0)
            if LOGITS:
                sums *= gate_slope(load_tile(g + p, H * K, rows, width, C, BK), inverse)
            store_tile(dg + p, H * K, rows, width, sums)


@triton.jit
def add_pairs(
    q, k, g, dx, dy, dA, scale, inverse, rows, width,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """dq and dk inside the chunk pair by pair, writes j from the last: sums of the gates between, never differences."""
    t, c = tl.arange(0, C), tl.arange(0, BK)
    between = tl.zeros([C, BK], tl.float32)
    later = tl.zeros([BK], tl.float32)
    x = load_tile(q, H * K, rows, width, C, BK).to(tl.float32) * scale
    for back in range(0, rows):
        j = rows - 1 - back
        y = tl.load(k + j * H * K + c, mask=c < width, other=0).to(tl.float32)
        between = tl.where(t[:, None] > j, between + later[None, :], 0)
        later = log_gates(tl.load(g + j * H * K + c, mask=c < width, other=0), inverse, LOGITS)
        column = tl.sum(tl.where(t[None, :] == j, dA, 0), axis=1)
        pair = column[:, None] * tl.exp(between)
        dx += pair * y[None, :] * scale
        dy += tl.where(t[:, None] == j, tl.sum(pair * x, axis=0)[None, :], 0)
    return dx, dy
