"""Rescaled q and k, and the gated scores inside chunks: after this the other kernels are plain matmuls.

Inside a chunk let b_t be the running sum of the log gate and `total` its sum over the chunk. With a reference half
way, q_hat_t = scale q_t exp(b_t - total/2) and k_hat_t = k_t exp(total/2 - b_t) serve three products at once:

    A = mask(q_hat k_hat^T)                the gated scores of the chunk (GLA, arXiv 2312.06635, eq. 4)
    o = q_hat S_hat + A v                  S_hat = half * S, S the state at the chunk's start, half = exp(total/2)
    S_next = half * (S_hat + k_hat^T v)    the state at its end

All exponents lie within +-|total|/2. A channel that forgets more than exp(-2 LIMIT) over the chunk has its lift by
-total/2 clamped to LIMIT: from end to end exp(-2 LIMIT) = 2e-35 is as good as nothing, but A would be wrong, so such
a chunk is marked `exact`, and its A comes from pairwise differences, as do its gradients.
"""

import triton
import triton.language as tl

from glalm.kernels.triton.tiles import (
    LOG2E,
    any_marked,
    chunk_rows,
    dot,
    exact_dot,
    exp2,
    load_tile,
    log_gates,
    store_parts,
    store_tile,
    to_tf32,
)

LIMIT = tl.constexpr(40.0)  # exp(+-80), of two lifts at once, leaves float32 room for q, k and sums over them


@triton.jit
def load_gates(g, stride, rows, cols, inverse, R: tl.constexpr, C: tl.constexpr, LOGITS: tl.constexpr):
    """A tile [R, C] of log gates, 0 from `rows` and `cols` on, where a logit of 0 would not do."""
    gate = log_gates(load_tile(g, stride, rows, cols, R, C), inverse, LOGITS)
    if LOGITS:
        i, j = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
        gate = tl.where((i < rows) & (j < cols), gate, 0)
    return gate


@triton.jit
def exponents(signs, gate, PARTS: tl.constexpr):
    """(b_t - total/2) log2 e: half of the sums up to and with t less those after t."""
    return exact_dot(signs, gate, PARTS) * (0.5 * LOG2E)


@triton.jit
def clamped_exponents(signs, gate, PARTS: tl.constexpr):
    """log2 of the factors of q and k when the lift is clamped. No differences: a sum over a gate that forgets all
    would take the low bits of the tokens on the other side of it along."""
    before = ((signs.to(tl.float32) + 1) * 0.5).to(tl.bfloat16)
    after = ((1 - signs.to(tl.float32)) * 0.5).to(tl.bfloat16)
    lift = tl.minimum(-0.5 * tl.sum(gate, axis=0), LIMIT)[None, :]
    return (exact_dot(before, gate, PARTS) + lift) * LOG2E, (exact_dot(after, gate, PARTS) + lift) * LOG2E


@triton.jit(do_not_specialize=["N", "T", "tiles"])
def prepare_kernel(
    q, k, g, signs, q_hat, k_hat, scores, half, exact, cu_seqlens, offsets, owners, scale, inverse, N, T, tiles,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LOGITS: tl.constexpr,
    GATE_PARTS: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr, EXACT: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """One program: EACH tiles, a tile being one chunk of one head. Writes tiles [C, KP] of q_hat and k_hat, padded with
    zeros, and a tile [C, C] of A; with LOW one [2, C, C], A and what rounding took from it.

    With EXACT it does over what the kernel without found to need the pairwise path, and nothing else: two kernels from
    one text, so that the pairwise path costs the usual one no registers.
    """
    t = tl.arange(0, C)
    if EXACT:  # noqa: SIM102 (and would load first)
        if not any_marked(exact, tiles, 1, EACH):
            return
    for i in range(EACH):
        item = tl.program_id(0) + i * tl.num_programs(0)
        tile = tl.minimum(item, tiles - 1).to(tl.int64)
        chunk, h = tile // H, tile % H
        row, rows = chunk_rows(chunk, N, T, cu_seqlens, offsets, owners, C)
        if EXACT:
            rows = tl.where((item < tiles) & (tl.load(exact + tile) != 0), rows, 0)
        if rows > 0:
            sign = load_tile(signs, C, C, C, C, C)
            A = tl.zeros([C, C], tl.float32)
            lowest = 0.0
            for k0 in range(0, KP, BK):
                p = row * H * K + h * K + k0
                if KP == BK:  # nothing loads ahead for a single iteration: three waits for memory in one
                    x_tile = load_tile(q + p, H * K, rows, K - k0, C, BK)
                    y_tile = load_tile(k + p, H * K, rows, K - k0, C, BK)
                gate = load_gates(g + p, H * K, rows, K - k0, inverse, C, BK, LOGITS)
                total = tl.sum(gate, axis=0)
                lowest = tl.minimum(lowest, tl.min(total, axis=0))
                tl.store(half + tile * KP + k0 + tl.arange(0, BK), exp2(tl.maximum(0.5 * total, -LIMIT) * LOG2E))
                for_q = exponents(sign, gate, GATE_PARTS)
                for_k = -for_q
                if EXACT:
                    for_q, for_k = clamped_exponents(sign, gate, GATE_PARTS)
                if KP != BK:
                    x_tile = load_tile(q + p, H * K, rows, K - k0, C, BK)
                    y_tile = load_tile(k + p, H * K, rows, K - k0, C, BK)
                x = x_tile.to(tl.float32) * (exp2(for_q) * scale)
                y = y_tile.to(tl.float32) * exp2(for_k)
                store_tile(q_hat + tile * C * KP + k0, KP, C, BK, x)
                store_tile(k_hat + tile * C * KP + k0, KP, C, BK, y)
                if not EXACT:  # A is rounded once, at its end: it wants more of q_hat and k_hat than a bfloat16 keeps
                    if PRECISION == "tf32":
                        x, y = to_tf32(x), to_tf32(y)
                    A = dot(x, tl.trans(y), A, PRECISION)
            if EXACT:
                A = exact_scores(q, k, g, row, rows, h, scale, inverse, H, K, KP, 16, C, LOGITS)
            else:
                tl.store(exact + tile, (lowest < -2 * LIMIT).to(tl.int32))
            store_parts(scores + tile * (1 + LOW) * C * C, tl.where(t[:, None] >= t[None, :], A, 0), C, LOW)


@triton.jit
def exact_scores(
    q, k, g, row, rows, h, scale, inverse,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """A_ij = scale sum_k q_ik k_jk exp(g_{j+1,k} + ... + g_ik): column by column, sums of the gates between only."""
    t = tl.arange(0, C)
    A = tl.zeros([C, C], tl.float32)
    for k0 in range(0, KP, BK):
        cols = k0 + tl.arange(0, BK)
        inside = cols < K
        x = load_tile(q + row * H * K + h * K + k0, H * K, rows, K - k0, C, BK).to(tl.float32) * scale
        between = tl.zeros([C, BK], tl.float32)
        later = tl.zeros([BK], tl.float32)  # the gate of token j + 1
        for back in range(0, rows):
            j = rows - 1 - back
            p = (row + j) * H * K + h * K + cols
            y = tl.load(k + p, mask=inside, other=0).to(tl.float32)
            between = tl.where(t[:, None] > j, between + later[None, :], 0)
            later = log_gates(tl.load(g + p, mask=inside, other=0), inverse, LOGITS)
            column = tl.sum(x * y[None, :] * tl.exp(between), axis=1)
            A += tl.where(t[None, :] == j, column[:, None], 0)
    return A
