"""Rescale q and k and compute the gated scores inside each chunk, so that the other kernels are plain matmuls.

Inside a chunk, let b_t be the running sum of the log gates and `total` their sum over the chunk. Measured from the
middle of that range, the rescaled q_hat_t = scale q_t exp(b_t - total/2) and k_hat_t = k_t exp(total/2 - b_t) serve
three products at once:

    A = mask(q_hat k_hat^T)                      the gated scores of the chunk (GLA, arXiv 2312.06635, eq. 4)
    o = q_hat S_hat + A v                        S_hat = half_decay * S, with S the state at the chunk's start
    S_next = half_decay * (S_hat + k_hat^T v)    the state at the chunk's end, with half_decay = exp(total/2)

All exponents lie within +-|total|/2. Where a channel forgets more than exp(-2 MAX_LIFT) = 2e-35 over the chunk, the
factor exp(-total/2) is clamped to exp(MAX_LIFT). That changes nothing between the chunk's ends, but A would be wrong.
Such a chunk is marked in `pairwise_marks`; its A and its gradients are computed from pairwise sums of the gates
instead.

GROUP heads of queries share a head of keys and gates. Each of their programs computes the same k_hat; the first stores
it.
"""

import triton
import triton.language as tl

from glalm.kernels.triton.tiles import (
    LOG2E,
    any_marked,
    compute_log_gates,
    dot_add,
    exact_dot,
    flushed_exp2,
    load_tile,
    locate_chunk,
    round_to_tf32,
    store_tile,
    store_with_residual,
)

# Two factors of exp(40) leave float32 room for q, k and the sums over them.
MAX_LIFT = tl.constexpr(40.0)


@triton.jit
def load_gates(g, stride, rows, cols, inv_normalizer, R: tl.constexpr, C: tl.constexpr, FROM_LOGITS: tl.constexpr):
    """Load a tile [R, C] of log gates, with zeros from row `rows` and column `cols` on."""
    gate = compute_log_gates(load_tile(g, stride, rows, cols, R, C), inv_normalizer, FROM_LOGITS)
    if FROM_LOGITS:  # A padded logit of 0 is not a log gate of 0.
        i = tl.arange(0, R)[:, None]
        j = tl.arange(0, C)[None, :]
        gate = tl.where((i < rows) & (j < cols), gate, 0)
    return gate


@triton.jit
def compute_exponents(sum_matrices, gate, PARTS: tl.constexpr):
    """Return (b_t - total/2) log2(e), which is half of: the gates up to token t minus the gates after it."""
    return exact_dot(sum_matrices, gate, PARTS) * (0.5 * LOG2E)


@triton.jit
def compute_clamped_exponents(sum_matrices, gate, PARTS: tl.constexpr):
    """Return log2 of the factors of q and of k, with the lift by -total/2 clamped to MAX_LIFT.

    Each is a sum of gates on one side of the token. A difference of running sums would lose the low bits of the gates
    on the other side of a gate that forgets everything.
    """
    before = ((sum_matrices.to(tl.float32) + 1) * 0.5).to(tl.bfloat16)
    after = ((1 - sum_matrices.to(tl.float32)) * 0.5).to(tl.bfloat16)
    lift = tl.minimum(-0.5 * tl.sum(gate, axis=0), MAX_LIFT)[None, :]
    return (exact_dot(before, gate, PARTS) + lift) * LOG2E, (exact_dot(after, gate, PARTS) + lift) * LOG2E


@triton.jit(do_not_specialize=["N", "T", "tiles"])
def rescale_kernel(
    q, k, g, sum_matrices, q_hat, k_hat, scores, half_decay, pairwise_marks, cu_seqlens, offsets, owners, scale,
    inv_normalizer, N, T, tiles,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, FROM_LOGITS: tl.constexpr,
    GATE_PARTS: tl.constexpr, PRECISION: tl.constexpr, WITH_RESIDUAL: tl.constexpr, PAIRWISE: tl.constexpr,
    ITEMS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Process ITEMS tiles in each program, a tile being one chunk of one head of queries.

    Writes q_hat and k_hat [C, KP], padded with zeros, and A [C, C]; with WITH_RESIDUAL, A's rounding error behind it.
    H is the number of heads of keys.

    The kernel is compiled twice. Without PAIRWISE it processes every tile by the fast path and marks those that need
    the pairwise path. With PAIRWISE it recomputes the marked tiles. As two kernels, the fast path need not reserve the
    registers of the pairwise one.
    """
    t = tl.arange(0, C)
    if PAIRWISE:  # noqa: SIM102 (`and` would load the marks in both kernels)
        if not any_marked(pairwise_marks, tiles, GROUP, ITEMS):
            return
    for i in range(ITEMS):
        item = tl.program_id(0) + i * tl.num_programs(0)
        tile = tl.minimum(item, tiles - 1).to(tl.int64)
        k_tile = tile // GROUP
        chunk = k_tile // H
        h = k_tile % H
        head = tile % (H * GROUP)
        is_first = tile % GROUP == 0
        row, rows = locate_chunk(chunk, N, T, cu_seqlens, offsets, owners, C)
        if PAIRWISE:
            rows = tl.where((item < tiles) & (tl.load(pairwise_marks + k_tile) != 0), rows, 0)
        if rows > 0:
            sign = load_tile(sum_matrices, C, C, C, C, C)
            A = tl.zeros([C, C], tl.float32)
            lowest = 0.0
            for k0 in range(0, KP, BK):
                p = row * H * K + h * K + k0
                p_q = row * H * GROUP * K + head * K + k0
                if KP == BK:
                    # A loop of one iteration is not pipelined: load q and k with the gates, to wait once, not thrice.
                    x_tile = load_tile(q + p_q, H * GROUP * K, rows, K - k0, C, BK)
                    y_tile = load_tile(k + p, H * K, rows, K - k0, C, BK)
                gate = load_gates(g + p, H * K, rows, K - k0, inv_normalizer, C, BK, FROM_LOGITS)
                total = tl.sum(gate, axis=0)
                lowest = tl.minimum(lowest, tl.min(total, axis=0))
                if is_first:
                    tl.store(
                        half_decay + k_tile * KP + k0 + tl.arange(0, BK),
                        flushed_exp2(tl.maximum(0.5 * total, -MAX_LIFT) * LOG2E),
                    )
                for_q = compute_exponents(sign, gate, GATE_PARTS)
                for_k = -for_q
                if PAIRWISE:
                    for_q, for_k = compute_clamped_exponents(sign, gate, GATE_PARTS)
                if KP != BK:
                    x_tile = load_tile(q + p_q, H * GROUP * K, rows, K - k0, C, BK)
                    y_tile = load_tile(k + p, H * K, rows, K - k0, C, BK)
                x = x_tile.to(tl.float32) * (flushed_exp2(for_q) * scale)
                y = y_tile.to(tl.float32) * flushed_exp2(for_k)
                store_tile(q_hat + tile * C * KP + k0, KP, C, BK, x)
                if is_first:
                    store_tile(k_hat + k_tile * C * KP + k0, KP, C, BK, y)
                if not PAIRWISE:
                    # A is rounded once, after the sum, so its operands stay float32 rather than the stored bfloat16.
                    if PRECISION == "tf32":
                        x, y = round_to_tf32(x), round_to_tf32(y)
                    A = dot_add(x, tl.trans(y), A, PRECISION)
            if PAIRWISE:
                A = pairwise_scores(
                    q, k, g, row, rows, head, scale, inv_normalizer, H, K, KP, 16, C, FROM_LOGITS, GROUP
                )
            elif is_first:
                tl.store(pairwise_marks + k_tile, (lowest < -2 * MAX_LIFT).to(tl.int32))
            store_with_residual(
                scores + tile * (1 + WITH_RESIDUAL) * C * C, tl.where(t[:, None] >= t[None, :], A, 0), C, WITH_RESIDUAL
            )


@triton.jit
def pairwise_scores(
    q, k, g, row, rows, head, scale, inv_normalizer,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, FROM_LOGITS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Return A_ij = scale * sum_k q_ik k_jk exp(g_{j+1,k} + ... + g_ik), column by column.

    Only gates between j and i are summed, so no difference of large sums appears.
    """
    t = tl.arange(0, C)
    A = tl.zeros([C, C], tl.float32)
    for k0 in range(0, KP, BK):
        cols = k0 + tl.arange(0, BK)
        inside = cols < K
        p_q = row * H * GROUP * K + head * K + k0
        x = load_tile(q + p_q, H * GROUP * K, rows, K - k0, C, BK).to(tl.float32) * scale
        between = tl.zeros([C, BK], tl.float32)
        next_gate = tl.zeros([BK], tl.float32)  # log gates of token j + 1
        for back in range(0, rows):
            j = rows - 1 - back
            p = (row + j) * H * K + head // GROUP * K + cols
            y = tl.load(k + p, mask=inside, other=0).to(tl.float32)
            between = tl.where(t[:, None] > j, between + next_gate[None, :], 0)
            next_gate = compute_log_gates(tl.load(g + p, mask=inside, other=0), inv_normalizer, FROM_LOGITS)
            column = tl.sum(x * y[None, :] * tl.exp(between), axis=1)
            A += tl.where(t[None, :] == j, column[:, None], 0)
    return A
