"""Compute dq, dk, dbeta and dg of every chunk in parallel, from the states and their gradients that the scans stored.

With u, dv, S and dS of a chunk (see delta_scan.py), P = mask(do u^T) D and M = mask(dv u^T) D, where the mask keeps
s <= t in P and s < t in M:

    dq = scale (e do S^T + P k)
    dk = [f u dS^T + scale P^T q - M^T k]  where k is written, plus
         -[e dv S^T + M k]                 where k reads the state
    dbeta_t = dv_t . u_t / beta_t^2

The last line holds because R = (diag(1/beta) + N)^-1, where N does not depend on beta, so that dR = R diag(dbeta /
beta^2) R.

The gate of token l acts on every pair of a write before l and a read at or after l. With flow_t = q_t dq_t +
k_t dk_t (where k_t reads) - k_t dk_t (where it is written),

    dg_l = sum_{t >= l in the chunk} flow_t + (pairs whose read lies after the chunk),
    pairs whose read lies after the chunk = exp(g_1 + ... + g_C) sum S dS + sum_t (f k dS^T u)_t

Pairs on one side of l cancel in the sum, to float32's rounding: dq and dk take their products from the same rounded P,
M, q and k.
"""

import triton
import triton.language as tl

from glalm.kernels.triton.delta_prepare import decays_between, load_beta, load_norms, running_gates
from glalm.kernels.triton.head_gate import load_head_gates
from glalm.kernels.triton.tiles import (
    MIN_LOG_GATE,
    as_operand,
    load_tile,
    locate_chunk,
    prefetch_tile,
    rounded_dot_add,
    store_tile,
    widen,
)


@triton.jit
def contract_pairs(
    do, u, dv, rows, scale,
    H: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return scale do u^T where s <= t, else 0, and dv u^T, [C, C]. do, u and dv point to the tile's first row."""
    do_u = tl.zeros([C, C], tl.float32)
    dv_u = tl.zeros([C, C], tl.float32)
    for v0 in range(0, VP, BV):
        u_tile = tl.trans(load_tile(u + v0, H * V, rows, V - v0, C, BV).to(DTYPE))
        do_u = rounded_dot_add(load_tile(do + v0, H * V, rows, V - v0, C, BV).to(DTYPE), u_tile, do_u, PRECISION)
        dv_u = rounded_dot_add(load_tile(dv + v0, H * V, rows, V - v0, C, BV).to(DTYPE), u_tile, dv_u, PRECISION)
    t = tl.arange(0, C)
    return tl.where(t[:, None] >= t[None, :], do_u * scale, 0), dv_u


@triton.jit
def contract_states(
    do, u, dv, states, dstates, rows,
    H: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return do S^T, dv S^T and u dS^T [C, BK], and the sum of S dS if GATED.

    do, u and dv point to the tile's first row; states and dstates to the block's first channel of S^T and dS^T.
    """
    DTYPE: tl.constexpr = states.dtype.element_ty
    do_S = tl.zeros([C, BK], tl.float32)
    dv_S = tl.zeros([C, BK], tl.float32)
    u_dS = tl.zeros([C, BK], tl.float32)
    products = 0.0
    for v0 in range(0, VP, BV):
        S = load_tile(states + v0 * KP, KP, BV, BK, BV, BK)
        dS = load_tile(dstates + v0 * KP, KP, BV, BK, BV, BK)
        do_S = rounded_dot_add(load_tile(do + v0, H * V, rows, V - v0, C, BV).to(DTYPE), S, do_S, PRECISION)
        dv_S = rounded_dot_add(load_tile(dv + v0, H * V, rows, V - v0, C, BV).to(DTYPE), S, dv_S, PRECISION)
        u_dS = rounded_dot_add(load_tile(u + v0, H * V, rows, V - v0, C, BV).to(DTYPE), dS, u_dS, PRECISION)
        if GATED:
            products += tl.sum(S.to(tl.float32) * dS.to(tl.float32))
    return do_S, dv_S, u_dS, products


@triton.jit
def store_beta_gradient(dbeta, beta, dv_u, rows, H: tl.constexpr, C: tl.constexpr):
    """Store dbeta of one tile from beta [C] and dv u^T; dbeta points to the tile's first token and head."""
    t = tl.arange(0, C)
    diagonal = tl.sum(tl.where(t[:, None] == t[None, :], dv_u, 0), 1)
    tl.store(dbeta + t * H, (diagonal / beta / beta).to(dbeta.dtype.element_ty), mask=t < rows)


@triton.jit
def load_normalized(x, norm, rows, width, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr):
    """Load BK channels of rows of q or k [C, BK] as float32, times norm [C] if it is not None."""
    tile = load_tile(x, H * K, rows, width, C, BK).to(tl.float32)
    if norm is not None:
        tile *= norm[:, None]
    return tile


@triton.jit
def load_operand(
    x, norm, rows, width, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return rows of x, normalized if `norm` is not None, rounded to the dtype of matmuls."""
    if norm is None:
        tile = load_tile(x, H * K, rows, width, C, BK).to(DTYPE)
    else:
        tile = as_operand(load_normalized(x, norm, rows, width, H, K, BK, C), DTYPE, PRECISION)
    return tile


@triton.jit
def subtract_along_rows(
    dq, dk, q, k, q_norm, k_norm, q_product, k_product, rows,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Convert the gradients of the normalized rows, which dq and dk hold, to those of the rows of q and k, in place.

    A row's length does not count, so what its gradient has in the row's own direction is taken away. The products [C]
    are those of each normalized row and its gradient. dq and dk hold values rounded to their dtype, so what cancels in
    the difference leaves the error of one rounding. All loads come first, so that they wait together.
    """
    WIDTH: tl.constexpr = min(KP, 128)
    for k0 in range(0, KP, WIDTH):
        dx = load_tile(dq + k0, H * K, rows, K - k0, C, WIDTH)
        dy = load_tile(dk + k0, H * K, rows, K - k0, C, WIDTH)
        x = load_tile(q + k0, H * K, rows, K - k0, C, WIDTH)
        y = load_tile(k + k0, H * K, rows, K - k0, C, WIDTH)
        dx = dx.to(tl.float32) * q_norm[:, None] - x.to(tl.float32) * (q_product * q_norm * q_norm)[:, None]
        dy = dy.to(tl.float32) * k_norm[:, None] - y.to(tl.float32) * (k_product * k_norm * k_norm)[:, None]
        store_tile(dq + k0, H * K, rows, K - k0, dx)
        store_tile(dk + k0, H * K, rows, K - k0, dy)


@triton.jit(do_not_specialize=["N", "T"])
def delta_gradients_kernel(
    q, k, beta, g, do, u, dv, factors, decay, norms, states, dstates, dq, dk, dbeta, dg,
    cu_seqlens, offsets, owners, scale, N, T,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one chunk of one head in each program, BK channels at a time.

    Inputs:
        q, k, beta, g, factors, decay, norms: as for prepare_kernel
        do, u, dv: [B, T, H, V]; states, dstates: [tiles, VP, KP]
    Outputs:
        dq, dk: [B, T, H, K]; dbeta: [B, T, H]; dg: [B, T, H], or None without gates
    """
    tile = tl.program_id(0).to(tl.int64)
    chunk = tile // H
    h = tile % H
    row, rows = locate_chunk(chunk, N, T, cu_seqlens, offsets, owners, C)
    if rows <= 0:
        return
    DTYPE: tl.constexpr = states.dtype.element_ty
    t = tl.arange(0, C)
    w = row * H * V + h * V
    q += row * H * K + h * K
    k += row * H * K + h * K
    dq += row * H * K + h * K
    dk += row * H * K + h * K
    b = load_beta(beta + row * H + h, t, H, rows)
    prefetch_tile(q, H * K, rows, K, C, KP)
    prefetch_tile(k, H * K, rows, K, C, KP)
    q_norm = None
    k_norm = None
    if norms is not None:
        q_norm, k_norm = load_norms(norms, tile, C)
    if factors is not None:
        for_q = tl.load(factors + tile * 3 * C + t)
        for_read = tl.load(factors + (tile * 3 + 1) * C + t)
        for_write = tl.load(factors + (tile * 3 + 2) * C + t)
        if norms is not None:
            for_q /= q_norm
            for_read /= k_norm
            for_write /= k_norm
    P, M = contract_pairs(do + w, u + w, dv + w, rows, scale, H, V, VP, BV, C, DTYPE, PRECISION)
    store_beta_gradient(dbeta + row * H + h, b, M, rows, H, C)
    M = tl.where(t[:, None] > t[None, :], -M, 0)
    if g is not None:
        gate_sums, unit = running_gates(g + row * H + h, rows, H, C)
        between = decays_between(gate_sums[:, None], gate_sums[None, :], unit)
        P *= between
        M *= between
    P = as_operand(P, DTYPE, PRECISION)
    M = as_operand(M, DTYPE, PRECISION)

    if norms is not None:
        q_product = tl.zeros([C], tl.float32)
        k_product = tl.zeros([C], tl.float32)
    flow = tl.zeros([C], tl.float32)
    later = 0.0
    for k0 in range(0, KP, BK):
        at = tile * VP * KP + k0
        dx, dread, dwrite, state_products = contract_states(
            do + w, u + w, dv + w, states + at, dstates + at, rows, H, KP, V, VP, BK, BV, C, g is not None, PRECISION
        )
        if factors is None:
            dx *= scale
            dread = -dread
        else:
            dx *= for_q[:, None]
            dread *= -for_read[:, None]
            dwrite *= for_write[:, None]
        x = load_operand(q + k0, q_norm, rows, K - k0, H, K, BK, C, DTYPE, PRECISION)
        y = load_operand(k + k0, k_norm, rows, K - k0, H, K, BK, C, DTYPE, PRECISION)
        if g is not None:
            later += tl.sum(widen(y) * dwrite) + state_products * tl.load(decay + tile)
        dx = rounded_dot_add(P, y, dx, PRECISION)
        dread = rounded_dot_add(M, y, dread, PRECISION)
        dwrite = rounded_dot_add(tl.trans(M), y, dwrite, PRECISION)
        dwrite = rounded_dot_add(tl.trans(P), x, dwrite, PRECISION)
        if g is not None:
            flow += tl.sum(widen(x) * dx + widen(y) * (dread - dwrite), 1)
        dy = dread + dwrite
        if norms is not None:
            q_product += tl.sum(widen(x) * dx, 1)
            k_product += tl.sum(widen(y) * dy, 1)
        store_tile(dq + k0, H * K, rows, K - k0, dx)
        store_tile(dk + k0, H * K, rows, K - k0, dy)
    if norms is not None:
        tl.debug_barrier()
        subtract_along_rows(dq, dk, q, k, q_norm, k_norm, q_product, k_product, rows, H, K, KP, C)
    if dg is not None:
        sums = tl.cumsum(flow, 0, reverse=True) + later
        gate = load_head_gates(g + row * H + h, t, H, rows, 1.0, False)
        sums = tl.where(gate > MIN_LOG_GATE, sums, 0)  # The gradient of a clamped gate is 0.
        tl.store(dg + (row + t) * H + h, sums.to(dg.dtype.element_ty), mask=t < rows)
