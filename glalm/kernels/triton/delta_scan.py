"""The passes of the delta rule over the chunks of a sequence, which carry the state in registers.

With R, A, e and f = exp(g_{t+1} + ... + g_C) of each chunk (see delta_prepare.py), forward in time:

    u = R (v - e k S),   o = scale e q S + A u,   S <- exp(g_1 + ... + g_C) S + (f k)^T u

Backward in time, with dS the gradient of the state at the chunk's end, and dv that of v - e k S, and so of v:

    du = A^T do + f k dS,   dv = R^T du,   dS <- exp(g_1 + ... + g_C) dS + (scale e q)^T do - (e k)^T dv

A program holds S^T [BV, KP] of one head in float32 registers, the layout in which S^T, u^T and their gradients are left
operands of matmuls without passing through shared memory.
"""

import triton
import triton.language as tl

from glalm.kernels.triton.tiles import chunks_of_sequence, load_tile, locate_chunk, rounded_dot_add, store_tile


@triton.jit
def load_keys(
    x, tile, row, rows, h, H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
    RESCALED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Load q or k [C, KP] of one tile from x: [tiles, C, KP] if RESCALED, else [B, T, H, K]."""
    if RESCALED:
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, KP)[None, :]
        keys = tl.load(x + tile * C * KP + i * KP + j)
    else:
        keys = load_tile(x + row * H * K + h * K, H * K, rows, K, C, KP).to(DTYPE)
    return keys


@triton.jit
def load_square(x, tile, C: tl.constexpr):
    """Load the matrix [C, C] of one tile."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return tl.load(x + tile * C * C + i * C + j)


@triton.jit
def load_decay(decay, tile, KP: tl.constexpr, RESCALED: tl.constexpr):
    """Load the factor of S^T over one tile of tokens: a number, or [1, KP] if RESCALED."""
    if RESCALED:
        half = tl.load(decay + tile * KP + tl.arange(0, KP))
        factor = (half * half)[None, :]
    else:
        factor = tl.load(decay + tile)
    return factor


@triton.jit(do_not_specialize=["N", "T"])
def delta_scan_kernel(
    q, k_read, k_write, v, resolvent, scores, factors, decay, out, updates, states, initial, final,
    cu_seqlens, offsets, owners, scale, N, T,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, RESCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry BV columns of one head's state through one sequence in each program.

    Inputs:
        q, k_read, k_write: q, k and k, [B, T, H, K]; if RESCALED, scale e q, e k and f k, [tiles, C, KP]
        v: [B, T, H, V]
        resolvent, scores: R and A, [tiles, C, C]
        factors: float32 [tiles, 3, C], see prepare_kernel, or None
        decay: exp(g_1 + ... + g_C), float32 [tiles], or its square root [tiles, KP] if RESCALED; None without gates
        initial: float32 [N, H, K, V] or None for zeros
    Outputs, each of which may be None:
        out: [B, T, H, V]
        updates: u, [B, T, H, V]
        states: [tiles, VP, KP], S^T with its padded channels (zeros) at the start of every tile
        final: float32 [N, H, K, V]
    """
    BLOCKS: tl.constexpr = ((V if states is None else VP) + BV - 1) // BV
    DTYPE: tl.constexpr = resolvent.dtype.element_ty
    pid = tl.program_id(0)
    v0 = pid % BLOCKS * BV
    head = (pid // BLOCKS).to(tl.int64)
    h = head % H
    n = head // H
    first, count = chunks_of_sequence(n, T, offsets, C)

    t = tl.arange(0, C)
    kk = tl.arange(0, KP)
    vv = v0 + tl.arange(0, BV)
    state = head * K * V + kk[None, :] * V + vv[:, None]
    inside = (kk < K)[None, :] & (vv < V)[:, None]
    S = tl.zeros([BV, KP], tl.float32)
    if initial is not None:
        S = tl.load(initial + state, mask=inside, other=0)

    for i in range(count):
        chunk = (first + i).to(tl.int64)
        tile = chunk * H + h
        row, rows = locate_chunk(chunk, N, T, cu_seqlens, offsets, owners, C)
        w = row * H * V + h * V + v0
        y = load_keys(k_read, tile, row, rows, h, H, K, KP, C, RESCALED, DTYPE)
        S_operand = S.to(DTYPE)
        if states is not None:
            p = (tile * VP + v0 + tl.arange(0, BV))[:, None] * KP + kk[None, :]
            tl.store(states + p, S_operand)
        u = rounded_dot_add(S_operand, tl.trans(y), tl.zeros([BV, C], tl.float32), PRECISION)
        if factors is not None:
            u *= tl.load(factors + (tile * 3 + 1) * C + t)[None, :]
        u = tl.trans(load_tile(v + w, H * V, rows, V - v0, C, BV)).to(tl.float32) - u
        R = load_square(resolvent, tile, C)
        u = rounded_dot_add(u.to(DTYPE), tl.trans(R), tl.zeros([BV, C], tl.float32), PRECISION)
        if updates is not None:
            store_tile(updates + w, H * V, rows, V - v0, tl.trans(u.to(updates.dtype.element_ty)))
        if out is not None:
            x = load_keys(q, tile, row, rows, h, H, K, KP, C, RESCALED, DTYPE)
            o = rounded_dot_add(S_operand, tl.trans(x), tl.zeros([BV, C], tl.float32), PRECISION)
            if factors is not None:
                o *= tl.load(factors + tile * 3 * C + t)[None, :]
            elif not RESCALED:
                o *= scale
            A = load_square(scores, tile, C)
            o = rounded_dot_add(u.to(DTYPE), tl.trans(A), o, PRECISION)
            store_tile(out + w, H * V, rows, V - v0, tl.trans(o.to(out.dtype.element_ty)))
        if factors is not None:
            u *= tl.load(factors + (tile * 3 + 2) * C + t)[None, :]
        if decay is not None:
            S *= load_decay(decay, tile, KP, RESCALED)
        if RESCALED:
            y = load_keys(k_write, tile, row, rows, h, H, K, KP, C, RESCALED, DTYPE)
        S = rounded_dot_add(u.to(DTYPE), y, S, PRECISION)

    if final is not None:
        tl.store(final + state, S, mask=inside)


@triton.jit(do_not_specialize=["N", "T"])
def delta_reverse_scan_kernel(
    q, k_read, k_write, do, resolvent, scores, factors, decay, dv, dstates, dfinal, dinitial,
    cu_seqlens, offsets, owners, scale, N, T,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, RESCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry BV columns of the gradient of one head's state back through one sequence in each program.

    Inputs:
        q, k_read, k_write, resolvent, scores, factors, decay: as for delta_scan_kernel
        do: [B, T, H, V]
        dfinal: float32 [N, H, K, V] or None for zeros
    Outputs:
        dv: [B, T, H, V]
        dstates: [tiles, VP, KP], dS^T with its padded channels (zeros) at the end of every tile
        dinitial: float32 [N, H, K, V] or None
    """
    BLOCKS: tl.constexpr = VP // BV
    DTYPE: tl.constexpr = resolvent.dtype.element_ty
    pid = tl.program_id(0)
    v0 = pid % BLOCKS * BV
    head = (pid // BLOCKS).to(tl.int64)
    h = head % H
    n = head // H
    first, count = chunks_of_sequence(n, T, offsets, C)

    t = tl.arange(0, C)
    kk = tl.arange(0, KP)
    vv = v0 + tl.arange(0, BV)
    state = head * K * V + kk[None, :] * V + vv[:, None]
    inside = (kk < K)[None, :] & (vv < V)[:, None]
    dS = tl.zeros([BV, KP], tl.float32)
    if dfinal is not None:
        dS = tl.load(dfinal + state, mask=inside, other=0)

    for i in range(count):
        chunk = (first + count - 1 - i).to(tl.int64)
        tile = chunk * H + h
        row, rows = locate_chunk(chunk, N, T, cu_seqlens, offsets, owners, C)
        w = row * H * V + h * V + v0
        y = load_keys(k_write, tile, row, rows, h, H, K, KP, C, RESCALED, DTYPE)
        dS_operand = dS.to(DTYPE)
        p = (tile * VP + v0 + tl.arange(0, BV))[:, None] * KP + kk[None, :]
        tl.store(dstates + p, dS_operand)
        du = rounded_dot_add(dS_operand, tl.trans(y), tl.zeros([BV, C], tl.float32), PRECISION)
        if factors is not None:
            du *= tl.load(factors + (tile * 3 + 2) * C + t)[None, :]
        do_tile = tl.trans(load_tile(do + w, H * V, rows, V - v0, C, BV))
        du = rounded_dot_add(do_tile.to(DTYPE), load_square(scores, tile, C), du, PRECISION)
        dread = rounded_dot_add(du.to(DTYPE), load_square(resolvent, tile, C), tl.zeros([BV, C], tl.float32), PRECISION)
        store_tile(dv + w, H * V, rows, V - v0, tl.trans(dread.to(dv.dtype.element_ty)))
        if decay is not None:
            dS *= load_decay(decay, tile, KP, RESCALED)
        do_scaled = do_tile.to(tl.float32)
        if factors is not None:
            do_scaled *= tl.load(factors + tile * 3 * C + t)[None, :]
            dread *= tl.load(factors + (tile * 3 + 1) * C + t)[None, :]
        elif not RESCALED:
            do_scaled *= scale
        x = load_keys(q, tile, row, rows, h, H, K, KP, C, RESCALED, DTYPE)
        dS = rounded_dot_add(do_scaled.to(DTYPE), x, dS, PRECISION)
        if RESCALED:
            y = load_keys(k_read, tile, row, rows, h, H, K, KP, C, RESCALED, DTYPE)
        dS = rounded_dot_add((-dread).to(DTYPE), y, dS, PRECISION)

    if dinitial is not None:
        tl.store(dinitial + state, dS, mask=inside)
