"""The counterparts of delta_prepare.py and delta_gradients.py for one gate per key channel (KDA, arXiv 2510.26692).

The decay between two tokens is now a vector, exp(G(s, t]) with G(s, t] the sum of the log gates after s up to t, and
the products q_t . k_s become sum_c q_tc k_sc exp(G(s, t]_c). The rows rescaled to the ends of the chunk are stored:

    q_hat_t = scale q_t exp(G(start, t]),   k_read_t = k_t exp(G(start, t]),   k_write_t = k_t exp(G(t, end])

With these the scans need no factors. The products inside the chunk are one matmul if the exponents of q and k are
measured from where half of what the chunk forgets is forgotten: with `middle` = exp(G(start, end] / 2),

    q_t exp(G(start, t]) / middle,   k_t exp(G(start, t]) / middle   and   k_s exp(G(s, end]) / middle

have exponents within +-half of what a channel forgets. Where that is MAX_FORGOTTEN or more, the chunk is marked, and a
second kernel processes it in three groups of pairs:

- across the middle of the chunk: with exponents measured from the middle,
- across the middle of its halves: from there,
- inside the blocks of 16 tokens: from where half of what the block forgets is forgotten. If that also exceeds
  MAX_LIFT, as after two gates that forget everything, the block's pairs are computed one by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glalm.kernels.common import CHUNK
from glalm.kernels.triton.delta_gradients import load_normalized, store_beta_gradient
from glalm.kernels.triton.delta_prepare import inverse_norms, load_beta, load_norms, store_norms, store_resolvent
from glalm.kernels.triton.rescale import load_gates
from glalm.kernels.triton.tiles import (
    LOG2E,
    MIN_LOG_GATE,
    any_marked,
    as_operand,
    build_once,
    exact_dot,
    flushed_exp2,
    load_tile,
    locate_chunk,
    prefetch_tile,
    rounded_dot_add,
    store_tile,
    widen,
)

BLOCK = tl.constexpr(16)  # tokens
# The log of what a chunk may forget by one matmul. Half of it leaves float32 room for q, k and the gradients. A chunk
# that forgets less has no clamped gate.
MAX_FORGOTTEN = tl.constexpr(104.0)
# exp(60) leaves this room, too. One gate that forgets everything, among otherwise slow gates, stays below it.
MAX_LIFT = tl.constexpr(60.0)
# Each program of the second kernels owns this many tiles, because most find no mark and starting programs takes time.
ITEMS = tl.constexpr(8)


@build_once
def gate_sum_matrices(device: torch.device) -> Tensor:
    """Return matrices, bfloat16 [6, CHUNK, CHUNK], that sum the gates of a chunk by a matmul. Row t sums

    0: the tokens up to t, minus those after t; 1: the tokens up to t; 2: the tokens after t; 3 and 4: the tokens
    between t and the middle of its chunk, or of its half of the chunk; 5: like 0, inside its block of 16.
    """
    t = torch.arange(CHUNK, device=device)
    up_to = t[:, None] >= t
    signed = torch.where(up_to, 1, -1)
    sums = [signed, up_to, ~up_to]
    for half in (CHUNK // 2, CHUNK // 4):
        later_half = (t // half % 2 == 1)[:, None]
        sums.append((t[:, None] // half == t // half) & (up_to == later_half))
    sums.append(signed * (t[:, None] // BLOCK.value == t // BLOCK.value))
    return torch.stack([x.to(signed.dtype) for x in sums]).bfloat16()


@triton.jit
def sum_gates(sum_matrices, index: tl.constexpr, gate, factor: tl.constexpr, PARTS: tl.constexpr):
    """Return the sums of the gates [C, BK] by one of gate_sum_matrices, times factor * log2(e)."""
    C: tl.constexpr = gate.shape[0]
    return exact_dot(load_tile(sum_matrices + index * C * C, C, C, C, C, C), gate, PARTS) * (factor * LOG2E)


@triton.jit
def are_across_middle(HALF: tl.constexpr, C: tl.constexpr):
    """Return the pairs [C, C] of a read in a second half and a write in the first half of the same 2 HALF tokens."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return (i // HALF == j // HALF + 1) & (i // (2 * HALF) == j // (2 * HALF))


@triton.jit
def are_in_block(C: tl.constexpr):
    """Return the pairs [C, C] of a read and a write at or before it in the same block of 16 tokens."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return (i // BLOCK == j // BLOCK) & (i >= j)


@triton.jit
def add_scores(reads, writes, mask, sums, PRECISION: tl.constexpr):
    """Add reads writes^T to `sums` where `mask` is set. Elsewhere the product may be infinite."""
    return tl.where(mask, rounded_dot_add(reads, tl.trans(writes), sums, PRECISION), sums)


@triton.jit(do_not_specialize=["N", "T", "tiles"])
def prepare_channel_kernel(
    q, k, beta, g, sum_matrices, q_hat, k_read, k_write, resolvent, scores, half_decay, marks, norms,
    cu_seqlens, offsets, owners, scale, N, T, tiles,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    GATE_PARTS: tl.constexpr, PRECISION: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    """Rescale q and k and compute R and A of one chunk of one head at a time.

    g: [B, T, H, K]. Writes q_hat, k_read and k_write [tiles, C, KP], padded with zeros, and half_decay, float32
    [tiles, KP], the `middle` above; for the rest see prepare_kernel.

    The kernel is compiled twice. Without MARKED, each program processes one tile by one matmul and marks it if it
    forgets MAX_FORGOTTEN. With MARKED, each program looks for marks among its tiles and recomputes these tiles. So the
    first need not reserve the registers of the second.
    """
    if MARKED:  # noqa: SIM102 (`and` would load the marks in both kernels)
        if not any_marked(marks, tiles, 1, ITEMS):
            return
    for i in range(ITEMS if MARKED else 1):
        tile = tl.minimum(tl.program_id(0) + i * tl.num_programs(0), tiles - 1).to(tl.int64)
        chunk = tile // H
        h = tile % H
        row, rows = locate_chunk(chunk, N, T, cu_seqlens, offsets, owners, C)
        if MARKED:
            rows = tl.where((tl.program_id(0) + i * tl.num_programs(0) < tiles) & (tl.load(marks + tile) != 0), rows, 0)
        elif rows <= 0:
            tl.store(marks + tile, 0)
        if rows > 0:
            prepare_channel_tile(
                q, k, beta, g, sum_matrices, q_hat, k_read, k_write, resolvent, scores, half_decay, marks, norms,
                tile, h, row, rows, scale, H, K, KP, BK, C, GATE_PARTS, PRECISION, MARKED,
            )  # fmt: skip


@triton.jit
def prepare_channel_tile(
    q, k, beta, g, sum_matrices, q_hat, k_read, k_write, resolvent, scores, half_decay, marks, norms,
    tile, h, row, rows, scale,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    GATE_PARTS: tl.constexpr, PRECISION: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    """Do the work of prepare_channel_kernel for one tile."""
    DTYPE: tl.constexpr = resolvent.dtype.element_ty
    t = tl.arange(0, C)
    b = load_beta(beta + row * H + h, t, H, rows)
    q_norm = None
    k_norm = None
    if norms is not None:
        if MARKED:
            q_norm, k_norm = load_norms(norms, tile, C)
        else:
            q_rows = load_tile(q + row * H * K + h * K, H * K, rows, K, C, KP)
            k_rows = load_tile(k + row * H * K + h * K, H * K, rows, K, C, KP)
            q_norm = inverse_norms(q_rows)
            k_norm = inverse_norms(k_rows)
            store_norms(norms, tile, q_norm, k_norm, C)
    A = tl.zeros([C, C], tl.float32)
    L = tl.zeros([C, C], tl.float32)
    lowest = 0.0
    for k0 in range(0, KP, BK):
        p = row * H * K + h * K + k0
        hat = tile * C * KP + k0
        x = load_normalized(q + p, q_norm, rows, K - k0, H, K, BK, C)
        y = load_normalized(k + p, k_norm, rows, K - k0, H, K, BK, C)
        gate = load_gates(g + p, H * K, rows, K - k0, 1.0, C, BK, False)
        total = tl.sum(gate, 0)
        middle = flushed_exp2(total * (0.5 * LOG2E))
        tl.store(half_decay + tile * KP + k0 + tl.arange(0, BK), middle)
        if MARKED:
            factor = flushed_exp2(sum_gates(sum_matrices, 1, gate, 1, GATE_PARTS))
            store_tile(q_hat + hat, KP, C, BK, x * factor * scale)
            store_tile(k_read + hat, KP, C, BK, y * factor)
            factor = flushed_exp2(sum_gates(sum_matrices, 2, gate, 1, GATE_PARTS))
            store_tile(k_write + hat, KP, C, BK, y * factor)
            A, L = add_scores_by_blocks(
                x, y, gate, k + p, g + p, sum_matrices, k_norm, A, L, rows, K - k0, H, K, BK, C, DTYPE, GATE_PARTS,
                PRECISION,
            )  # fmt: skip
        else:
            lowest = tl.minimum(lowest, tl.min(total, 0))
            exponents = sum_gates(sum_matrices, 0, gate, 0.5, GATE_PARTS)
            middle = middle[None, :]
            read_factor = flushed_exp2(exponents)
            x *= read_factor
            writes = y * flushed_exp2(-exponents)
            y *= read_factor
            store_tile(q_hat + hat, KP, C, BK, x * (middle * scale))
            store_tile(k_read + hat, KP, C, BK, y * middle)
            store_tile(k_write + hat, KP, C, BK, writes * middle)
            keys = tl.trans(writes.to(DTYPE))
            A = rounded_dot_add(x.to(DTYPE), keys, A, PRECISION)
            L = rounded_dot_add(y.to(DTYPE), keys, L, PRECISION)
    if not MARKED:
        tl.store(marks + tile, (lowest <= -MAX_FORGOTTEN).to(tl.int32))
    store_tile(scores + tile * C * C, C, C, C, tl.where(t[:, None] >= t[None, :], A * scale, 0))
    store_resolvent(resolvent, b, tile, L, C)


@triton.jit
def add_scores_by_blocks(
    x, y, gate, k, g, sum_matrices, k_norm, A, L, rows, width,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr,
    GATE_PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the products of q and k and of k and k over BK channels to A and L, by groups of pairs."""
    for level in tl.static_range(2):
        factor = flushed_exp2(sum_gates(sum_matrices, 3 + level, gate, 1, GATE_PARTS))
        mask = are_across_middle(C // 2 ** (level + 1), C)
        keys = (y * factor).to(DTYPE)
        A = add_scores((x * factor).to(DTYPE), keys, mask, A, PRECISION)
        L = add_scores(keys, keys, mask, L, PRECISION)
    exponents = sum_gates(sum_matrices, 5, gate, 0.5, GATE_PARTS)
    if tl.max(tl.abs(exponents)) > MAX_LIFT * LOG2E:
        A, L = add_pairwise_scores(x, y, k, g, k_norm, A, L, rows, width, H, K, BK, C)
    else:
        factor = flushed_exp2(exponents)
        keys = (y * flushed_exp2(-exponents)).to(DTYPE)
        A = add_scores((x * factor).to(DTYPE), keys, are_in_block(C), A, PRECISION)
        L = add_scores((y * factor).to(DTYPE), keys, are_in_block(C), L, PRECISION)
    return A, L


@triton.jit
def load_row_of_block(x, offset, rows, width, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr):
    """Load for each of C tokens the row `offset` of its block of 16, [C, BK], with zeros from row `rows` on."""
    source = tl.arange(0, C) // BLOCK * BLOCK + offset
    c = tl.arange(0, BK)[None, :]
    return tl.load(x + source[:, None] * H * K + c, mask=(source < rows)[:, None] & (c < width), other=0).to(tl.float32)


@triton.jit
def decay_from_row(
    g, offset, between, rows, width, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr
):
    """Update `between` from the row offset + 1 of each block to the row `offset`: the log decays [C, BK] from that row
    to each token after it."""
    gate = load_row_of_block(g, offset + 1, tl.where(offset + 1 < BLOCK, rows, 0), width, H, K, BK, C)
    gate = tl.maximum(gate, MIN_LOG_GATE, tl.PropagateNan.ALL)
    return tl.where((tl.arange(0, C) % BLOCK > offset)[:, None], between + gate, 0)


@triton.jit
def add_pairwise_scores(
    x, y, k, g, k_norm, A, L, rows, width, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr
):
    """Add the products of the pairs inside blocks of 16 tokens to A and L, one write of each block at a time.

    Only gates between the write and the read are summed, so no difference of large sums appears.
    """
    t = tl.arange(0, C)
    between = tl.zeros([C, BK], tl.float32)
    for back in range(BLOCK):
        offset = BLOCK - 1 - back
        between = decay_from_row(g, offset, between, rows, width, H, K, BK, C)
        keys = load_row_of_block(k, offset, rows, width, H, K, BK, C) * tl.exp(between)
        here = (t[None, :] == (t // BLOCK * BLOCK + offset)[:, None]) & (t[:, None] >= t[None, :])
        if k_norm is not None:  # Row `offset` of each block has its own norm.
            keys *= tl.sum(tl.where(here, k_norm[None, :], 0), 1)[:, None]
        A += tl.where(here, tl.sum(x * keys, 1)[:, None], 0)
        L += tl.where(here, tl.sum(y * keys, 1)[:, None], 0)
    return A, L


# Gradients. All tiles are transposed, [BK, C]: their rows fill the warps, and what a channel has for all tokens is one
# number for each row.


@triton.jit
def contract_transposed(
    do, u, dv, states, dstates, rows,
    H: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return S do^T, S dv^T and dS u^T [BK, C], do u^T and dv u^T [C, C], and sum_v S dS [BK], in one pass over V.

    do, u and dv point to the tile's first row; states and dstates to the block's first channel of S^T and dS^T.
    """
    DTYPE: tl.constexpr = states.dtype.element_ty
    S_do = tl.zeros([BK, C], tl.float32)
    S_dv = tl.zeros([BK, C], tl.float32)
    dS_u = tl.zeros([BK, C], tl.float32)
    do_u = tl.zeros([C, C], tl.float32)
    dv_u = tl.zeros([C, C], tl.float32)
    products = tl.zeros([16, BK], tl.float32)  # In the loop, a thread sums its own rows.
    for v0 in range(0, VP, BV):
        S = load_tile(states + v0 * KP, KP, BV, BK, BV, BK)
        dS = load_tile(dstates + v0 * KP, KP, BV, BK, BV, BK)
        do_tile = load_tile(do + v0, H * V, rows, V - v0, C, BV).to(DTYPE)
        u_tile = tl.trans(load_tile(u + v0, H * V, rows, V - v0, C, BV).to(DTYPE))
        dv_tile = load_tile(dv + v0, H * V, rows, V - v0, C, BV).to(DTYPE)
        S_do = rounded_dot_add(tl.trans(S), tl.trans(do_tile), S_do, PRECISION)
        S_dv = rounded_dot_add(tl.trans(S), tl.trans(dv_tile), S_dv, PRECISION)
        dS_u = rounded_dot_add(tl.trans(dS), u_tile, dS_u, PRECISION)
        do_u = rounded_dot_add(do_tile, u_tile, do_u, PRECISION)
        dv_u = rounded_dot_add(dv_tile, u_tile, dv_u, PRECISION)
        products += tl.sum(tl.reshape(S.to(tl.float32) * dS.to(tl.float32), [BV // 16, 16, BK]), 0)
    return S_do, S_dv, dS_u, do_u, dv_u, tl.sum(products, 0)


@triton.jit
def load_transposed(x, norm, rows, width, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr):
    """Load q or k of one tile as float32 [BK, C], times norm [C] if it is not None."""
    tile = tl.trans(load_tile(x, H * K, rows, width, C, BK)).to(tl.float32)
    if norm is not None:
        tile *= norm[None, :]
    return tile


@triton.jit
def load_gates_transposed(g, rows, width, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr):
    """Load the log gates of one tile, [BK, C]."""
    return tl.trans(load_gates(g, H * K, rows, width, 1.0, C, BK, False))


@triton.jit
def sum_gates_transposed(sum_matrices, index: tl.constexpr, gate, factor: tl.constexpr, PARTS: tl.constexpr):
    """Return the sums of the gates [BK, C] by one of gate_sum_matrices, times factor * log2(e)."""
    C: tl.constexpr = gate.shape[1]
    matrix = load_tile(sum_matrices + index * C * C, C, C, C, C, C)
    return exact_dot(gate, tl.trans(matrix), PARTS) * (factor * LOG2E)


@triton.jit
def store_gradient(x, gradient, normalized, norm, rows, width, H: tl.constexpr, K: tl.constexpr):
    """Store the gradient [BK, C] of q or k of one tile. With `norm`, `gradient` is that of the normalized tokens.

    A token's length does not count then, so what its gradient has in its own direction is taken away.
    """
    if norm is not None:
        gradient = (gradient - normalized * tl.sum(normalized * gradient, 0)[None, :]) * norm[None, :]
    store_tile(x, H * K, rows, width, tl.trans(gradient))


@triton.jit(do_not_specialize=["N", "T", "tiles"])
def delta_channel_gradients_kernel(
    q, k, beta, g, do, u, dv, sum_matrices, up_to, half_decay, marks, norms, states, dstates, dq, dk, dbeta, dg,
    cu_seqlens, offsets, owners, scale, N, T, tiles,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, GATE_PARTS: tl.constexpr, SUM_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    MARKED: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of BK channels of one chunk of one head at a time; with norms, BK is KP.

    g, dg: [B, T, H, K]; up_to: the second of running_sum_matrices; for the rest see delta_gradients_kernel. The kernel
    is compiled twice, see prepare_channel_kernel: with MARKED it processes the marked chunks, without it all others.
    """
    BLOCKS: tl.constexpr = KP // BK
    if MARKED:  # noqa: SIM102 (`and` would load the marks in both kernels)
        if not any_marked(marks, tiles * BLOCKS, BLOCKS, ITEMS):
            return
    for i in range(ITEMS if MARKED else 1):
        item = tl.program_id(0) + i * tl.num_programs(0)
        tile = tl.minimum(item // BLOCKS, tiles - 1).to(tl.int64)
        k0 = item % BLOCKS * BK
        chunk = tile // H
        h = tile % H
        row, rows = locate_chunk(chunk, N, T, cu_seqlens, offsets, owners, C)
        if rows > 0 and item < tiles * BLOCKS and (tl.load(marks + tile) != 0) == MARKED:
            store_channel_gradients(
                q, k, beta, g, do, u, dv, sum_matrices, up_to, half_decay, norms, states, dstates, dq, dk, dbeta, dg,
                tile, h, k0, row, rows, scale, H, K, KP, V, VP, BK, BV, C, GATE_PARTS, SUM_PARTS, PRECISION, MARKED,
            )  # fmt: skip


@triton.jit
def store_channel_gradients(
    q, k, beta, g, do, u, dv, sum_matrices, up_to, half_decay, norms, states, dstates, dq, dk, dbeta, dg,
    tile, h, k0, row, rows, scale,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, GATE_PARTS: tl.constexpr, SUM_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    MARKED: tl.constexpr,
):  # fmt: skip
    """Do the work of delta_channel_gradients_kernel for the BK channels of one tile from k0 on."""
    DTYPE: tl.constexpr = states.dtype.element_ty
    t = tl.arange(0, C)
    w = row * H * V + h * V
    at = tile * VP * KP + k0
    p = row * H * K + h * K + k0
    width = K - k0
    b = load_beta(beta + row * H + h, t, H, rows)
    prefetch_tile(g + p, H * K, rows, width, C, BK)
    prefetch_tile(k + p, H * K, rows, width, C, BK)
    prefetch_tile(q + p, H * K, rows, width, C, BK)
    dqueries, dreads, dwrites, P, M, state_products = contract_transposed(
        do + w, u + w, dv + w, states + at, dstates + at, rows, H, KP, V, VP, BK, BV, C, PRECISION
    )
    if k0 == 0:
        store_beta_gradient(dbeta + row * H + h, b, M, rows, H, C)
    P = tl.where(t[:, None] >= t[None, :], P * scale, 0)
    M = tl.where(t[:, None] > t[None, :], -M, 0)

    gate = load_gates_transposed(g + p, rows, width, H, K, BK, C)
    middle = tl.load(half_decay + tile * KP + k0 + tl.arange(0, BK))
    q_norm = None
    k_norm = None
    if norms is not None:
        q_norm, k_norm = load_norms(norms, tile, C)
    y = load_transposed(k + p, k_norm, rows, width, H, K, BK, C)
    if MARKED:
        x = load_transposed(q + p, q_norm, rows, width, H, K, BK, C)
        dx, dy, flow, later = gradients_by_blocks(
            x, y, gate, k + p, g + p, k_norm, sum_matrices, dqueries * scale, -dreads, dwrites, P, M, rows, width,
            H, K, BK, C, DTYPE, GATE_PARTS, PRECISION,
        )  # fmt: skip
        store_gradient(dq + p, dx, x, q_norm, rows, width, H, K)
    else:
        P = as_operand(P, DTYPE, PRECISION)
        M = as_operand(M, DTYPE, PRECISION)
        exponents = sum_gates_transposed(sum_matrices, 0, gate, 0.5, GATE_PARTS)
        writes = as_operand(y * flushed_exp2(-exponents), DTYPE, PRECISION)
        dwrites *= middle[:, None]
        later = tl.sum(widen(writes) * dwrites, 1)
        dreads = rounded_dot_add(writes, tl.trans(M), -dreads * middle[:, None], PRECISION)
        dqueries = rounded_dot_add(writes, tl.trans(P), dqueries * (middle * scale)[:, None], PRECISION)

        factor = flushed_exp2(exponents)
        reads = as_operand(y * factor, DTYPE, PRECISION)
        flow = widen(reads) * dreads
        dy = dreads * factor
        dwrites = rounded_dot_add(reads, M, dwrites, PRECISION)

        x = load_transposed(q + p, q_norm, rows, width, H, K, BK, C)
        queries = as_operand(x * factor, DTYPE, PRECISION)
        flow += widen(queries) * dqueries
        dwrites = rounded_dot_add(queries, P, dwrites, PRECISION)
        store_gradient(dq + p, dqueries * factor, x, q_norm, rows, width, H, K)

        flow -= widen(writes) * dwrites
        dy += dwrites * flushed_exp2(-exponents)
        if norms is not None:  # `y` would take registers until here.
            y = load_transposed(k + p, k_norm, rows, width, H, K, BK, C)
    store_gradient(dk + p, dy, y, k_norm, rows, width, H, K)
    later += state_products * middle * middle
    sums = exact_dot(flow, tl.trans(load_tile(up_to, C, C, C, C, C)), SUM_PARTS) + later[:, None]
    if MARKED:
        gate = load_gates_transposed(g + p, rows, width, H, K, BK, C)
        sums = tl.where(gate > MIN_LOG_GATE, sums, 0)  # The gradient of a clamped gate is 0.
    store_tile(dg + p, H * K, rows, width, tl.trans(sums))


@triton.jit
def add_pair_gradients(
    x, y, P, M, read_factor, write_factor, dx, dy, flow, DTYPE: tl.constexpr, PRECISION: tl.constexpr
):
    """Add the gradients of one group of pairs to dq (dx) and dk (dy), and what they give the gates to `flow`.

    P and M hold the group's pairs and zeros. The sums of `flow` cancel pairs on one side of a gate, so its products are
    those of the rounded operands of the matmuls.
    """
    P = as_operand(P, DTYPE, PRECISION)
    M = as_operand(M, DTYPE, PRECISION)
    queries = as_operand(x * read_factor, DTYPE, PRECISION)
    reads = as_operand(y * read_factor, DTYPE, PRECISION)
    writes = as_operand(y * write_factor, DTYPE, PRECISION)
    zeros = tl.zeros([x.shape[0], x.shape[1]], tl.float32)
    d = rounded_dot_add(writes, tl.trans(P), zeros, PRECISION)
    dx += d * read_factor
    flow += widen(queries) * d
    d = rounded_dot_add(writes, tl.trans(M), zeros, PRECISION)
    dy += d * read_factor
    flow += widen(reads) * d
    d = rounded_dot_add(queries, P, zeros, PRECISION)
    d = rounded_dot_add(reads, M, d, PRECISION)
    dy += d * write_factor
    flow -= widen(writes) * d
    return dx, dy, flow


@triton.jit
def gradients_by_blocks(
    x, y, gate, k, g, k_norm, sum_matrices, dx, dread, dwrite, P, M, rows, width,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr,
    GATE_PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dq, dk, the flow of the gates and the sum of what is written for later chunks, by groups of pairs."""
    factor = flushed_exp2(sum_gates_transposed(sum_matrices, 1, gate, 1, GATE_PARTS))
    dx *= factor
    dy = dread * factor
    flow = x * dx + y * dy
    dwrite *= flushed_exp2(sum_gates_transposed(sum_matrices, 2, gate, 1, GATE_PARTS))
    dy += dwrite
    flow -= y * dwrite
    later = tl.sum(y * dwrite, 1)
    for level in tl.static_range(2):
        factor = flushed_exp2(sum_gates_transposed(sum_matrices, 3 + level, gate, 1, GATE_PARTS))
        mask = are_across_middle(C // 2 ** (level + 1), C)
        dx, dy, flow = add_pair_gradients(
            x, y, tl.where(mask, P, 0), tl.where(mask, M, 0), factor, factor, dx, dy, flow, DTYPE, PRECISION
        )
    P = tl.where(are_in_block(C), P, 0)
    M = tl.where(are_in_block(C), M, 0)
    exponents = sum_gates_transposed(sum_matrices, 5, gate, 0.5, GATE_PARTS)
    if tl.max(tl.abs(exponents)) > MAX_LIFT * LOG2E:
        dx, dy, flow = add_pairwise_gradients(x, y, k, g, k_norm, P, M, dx, dy, flow, rows, width, H, K, BK, C)
    else:
        dx, dy, flow = add_pair_gradients(
            x, y, P, M, flushed_exp2(exponents), flushed_exp2(-exponents), dx, dy, flow, DTYPE, PRECISION
        )
    return dx, dy, flow, later


@triton.jit
def add_pairwise_gradients(
    x, y, k, g, k_norm, P, M, dx, dy, flow, rows, width,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Add the gradients of the pairs inside blocks of 16 tokens, as add_pairwise_scores computes their products."""
    t = tl.arange(0, C)
    between = tl.zeros([C, BK], tl.float32)
    for back in range(BLOCK):
        offset = BLOCK - 1 - back
        between = decay_from_row(g, offset, between, rows, width, H, K, BK, C)
        decays = tl.trans(tl.exp(between))
        here = t[None, :] == (t // BLOCK * BLOCK + offset)[:, None]
        keys = load_row_of_block(k, offset, rows, width, H, K, BK, C)
        if k_norm is not None:  # Row `offset` of each block has its own norm.
            keys *= tl.sum(tl.where(here, k_norm[None, :], 0), 1)[:, None]
        keys = tl.trans(keys)
        p = tl.sum(tl.where(here, P, 0), 1)[None, :] * decays
        m = tl.sum(tl.where(here, M, 0), 1)[None, :] * decays
        dx += p * keys
        dy += m * keys
        flow += (x * p + y * m) * keys
        written = tl.sum(tl.reshape(x * p + y * m, [BK, C // BLOCK, BLOCK]), 2)
        written = tl.reshape(tl.broadcast_to(written[:, :, None], [BK, C // BLOCK, BLOCK]), [BK, C])
        written = tl.where((t % BLOCK == offset)[None, :], written, 0)
        dy += written
        flow -= y * written
    return dx, dy, flow
