"""Compute what the delta rule needs of each chunk before its state is known: the inverse of its triangular system.

In a chunk that starts from the state S, with D_ts = exp(g_{s+1} + ... + g_t) and e_t = exp(g_1 + ... + g_t), the
updates u of arXiv 2412.06464 (equation 10) solve one triangular system:

    (I + L) u = beta (v - e k S),   L_ts = beta_t D_ts k_t . k_s  for s < t
    u = R (v - e k S),              R = (I + L)^-1 diag(beta)

R and the gated scores A_ts = scale D_ts q_t . k_s (for s <= t) are all that the scans of delta_scan.py need besides q,
k and v. They take CHUNK^2 numbers each, where the usual W = R e k and U = R v would take CHUNK (K + V).

If q and k are normalized, or the gates are one number per head, the factors of their rows are stored instead of the
rescaled rows. With one gate per key channel, see delta_channel_gate.py.
"""

import triton
import triton.language as tl

from glalm.kernels.triton.head_gate import load_head_gates
from glalm.kernels.triton.tiles import (
    LOG2E,
    dot_add,
    flushed_exp2,
    load_tile,
    locate_chunk,
    rounded_dot_add,
    split_bfloat16,
    store_tile,
)

# beta is kept away from 0, so that the backward pass can divide by it. This changes R by less than float32 resolves.
MIN_BETA = tl.constexpr(2.0**-40)
# L2 norms are sqrt(|x|^2 + NORM_EPS), so that a row of zeros stays one.
NORM_EPS = tl.constexpr(1e-6)


@triton.jit
def load_beta(beta, t, stride, rows):
    """Load beta [C] of tokens t of one head, at least MIN_BETA in size, with MIN_BETA from row `rows` on."""
    x = tl.load(beta + t * stride, mask=t < rows, other=0).to(tl.float32)
    return tl.where(tl.abs(x) < MIN_BETA, MIN_BETA, x)


@triton.jit
def running_gates(g, rows, H: tl.constexpr, C: tl.constexpr):
    """Return the running sums [C] of one head's log gates in fixed point, with the unit of the last bit, times log2(e).

    Integers subtract exactly. A difference of two float32 sums would have no low bits left after a gate that forgets
    everything. g points to the gate of the chunk's first token.
    """
    gate = load_head_gates(g, tl.arange(0, C), H, rows, 1.0, False)
    unit = tl.maximum(-tl.sum(gate, 0) * 2.0**-30, 2.0**-60, tl.PropagateNan.ALL)
    return tl.cumsum(tl.floor(gate / unit + 0.5).to(tl.int32), 0), unit * LOG2E


@triton.jit
def decays_between(sums, start_sums, unit):
    """Return the product of the gates between two tokens, from their running sums; at most 1."""
    return flushed_exp2(tl.minimum(sums - start_sums, 0).to(tl.float32) * unit)


@triton.jit
def inverse_norms(x):
    """Return 1 / |x| of each row."""
    x = x.to(tl.float32)
    return 1 / tl.sqrt(tl.sum(x * x, 1) + NORM_EPS)


@triton.jit
def store_norms(norms, tile, q_norm, k_norm, C: tl.constexpr):
    """Store 1 over the norms of q and k of one tile."""
    tl.store(norms + tile * 2 * C + tl.arange(0, C), q_norm)
    tl.store(norms + (tile * 2 + 1) * C + tl.arange(0, C), k_norm)


@triton.jit
def load_norms(norms, tile, C: tl.constexpr):
    """Load what store_norms stored."""
    q_norm = tl.load(norms + tile * 2 * C + tl.arange(0, C))
    return q_norm, tl.load(norms + (tile * 2 + 1) * C + tl.arange(0, C))


@triton.jit
def dot_in_parts(a, b, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + a @ b for float32 a and b. With SPLIT, each is taken as two bfloat16 parts, 16 bits of mantissa."""
    if SPLIT:
        a_high, a_low = split_bfloat16(a)
        b_high, b_low = split_bfloat16(b)
        a_high = a_high.to(tl.bfloat16)
        b_high = b_high.to(tl.bfloat16)
        acc = dot_add(a_low.to(tl.bfloat16), b_high, acc, PRECISION)
        acc = dot_add(a_high, b_low.to(tl.bfloat16), acc, PRECISION)
        acc = dot_add(a_high, b_high, acc, PRECISION)
    else:
        acc = dot_add(a, b, acc, PRECISION)
    return acc


@triton.jit
def double_blocks(X, L, i, j, level, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Return the inverses of the diagonal blocks of size 2^(level + 1) of I + L from those of size 2^level, X."""
    Y = tl.where(((i >> level) == (j >> level) + 1) & ((i >> level + 1) == (j >> level + 1)), L, 0)
    YX = dot_in_parts(-Y, X, tl.zeros_like(X), SPLIT, PRECISION)
    return dot_in_parts(X, YX, X, SPLIT, PRECISION)


@triton.jit
def invert_unit_lower(L, C: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Return (I + L)^-1 for a strictly lower triangular L, float32 [C, C].

    The inverses of the diagonal blocks of size b give those of size 2b: with Y the part of L that lies below the
    diagonal blocks of size b, within those of size 2b,

        X_2b = X_b - X_b Y X_b

    No power of L appears, which could be large. Up to b = 16, the blocks on the diagonal are a batch of small products.
    """
    BLOCKS: tl.constexpr = C // 16
    block = tl.arange(0, BLOCKS)
    on_diagonal = (block[:, None] == block[None, :])[:, None, :, None]
    small = tl.sum(tl.where(on_diagonal, tl.reshape(L, [BLOCKS, 16, BLOCKS, 16]), 0), 2)
    i = tl.arange(0, 16)[None, :, None]
    j = tl.arange(0, 16)[None, None, :]
    t = tl.arange(0, C)
    X = tl.where(i // 2 == j // 2, -small, 0) + tl.where(i == j, 1.0, 0.0)
    if SPLIT:
        for level in tl.static_range(1, 4):
            X = double_blocks(X, small, i, j, level, SPLIT, PRECISION)
        X = tl.reshape(tl.where(on_diagonal, X[:, :, None, :], 0), [C, C])
        # Zeros taken from L make the compiler lay X out as L, in the registers of a matmul's result.
        X = tl.where(t[:, None] < t[None, :], L, X)
        for level in tl.static_range(4, 6):
            X = double_blocks(X, L, t[:, None], t[None, :], level, SPLIT, PRECISION)
    else:  # Unrolled loops of tf32x3 products would take ptxas a minute.
        for level in range(1, 4):
            X = double_blocks(X, small, i, j, level, SPLIT, PRECISION)
        X = tl.reshape(tl.where(on_diagonal, X[:, :, None, :], 0), [C, C])
        for level in range(4, 6):
            X = double_blocks(X, L, t[:, None], t[None, :], level, SPLIT, PRECISION)
    return X


@triton.jit(do_not_specialize=["N", "T"])
def prepare_kernel(
    q, k, beta, g, resolvent, scores, factors, decay, norms, cu_seqlens, offsets, owners, scale, N, T,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute R and the gated scores A of one chunk of one head in each program.

    Inputs:
        q, k: [B, T, H, K]; with `norms`, their rows are divided by their L2 norms
        beta: [B, T, H]; g: log gates [B, T, H] or None
    Outputs:
        resolvent, scores: R and A, [tiles, C, C]
        factors: float32 [tiles, 3, C], the factors of the rows of q (scale e / |q|), of k where it reads the state
            (e / |k|), and of k where it is written (exp(g_{t+1} + ... + g_C) / |k|). None without gates and norms.
        decay: float32 [tiles], exp(g_1 + ... + g_C), or None without gates
        norms: float32 [tiles, 2, C], 1 / |q| and 1 / |k|, or None
    """
    tile = tl.program_id(0).to(tl.int64)
    chunk = tile // H
    h = tile % H
    row, rows = locate_chunk(chunk, N, T, cu_seqlens, offsets, owners, C)
    if rows <= 0:
        return
    t = tl.arange(0, C)
    # What is needed at the end is loaded first, so that nothing waits for it.
    b = load_beta(beta + row * H + h, t, H, rows)
    if g is not None:
        sums, unit = running_gates(g + row * H + h, rows, H, C)
    A = tl.zeros([C, C], tl.float32)
    L = tl.zeros([C, C], tl.float32)
    q_norm = tl.full([C], 1.0, tl.float32)
    k_norm = tl.full([C], 1.0, tl.float32)
    if norms is not None:
        q_norm = tl.full([C], NORM_EPS, tl.float32)
        k_norm = tl.full([C], NORM_EPS, tl.float32)
    for k0 in range(0, KP, BK):
        p = row * H * K + h * K + k0
        x = load_tile(q + p, H * K, rows, K - k0, C, BK)
        y = load_tile(k + p, H * K, rows, K - k0, C, BK)
        A = rounded_dot_add(x, tl.trans(y), A, PRECISION)
        L = rounded_dot_add(y, tl.trans(y), L, PRECISION)
        if norms is not None:
            q_norm += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
            k_norm += tl.sum(y.to(tl.float32) * y.to(tl.float32), 1)
    if norms is not None:
        q_norm = 1 / tl.sqrt(q_norm)
        k_norm = 1 / tl.sqrt(k_norm)
        store_norms(norms, tile, q_norm, k_norm, C)
        A *= q_norm[:, None] * k_norm[None, :]
        L *= k_norm[:, None] * k_norm[None, :]
    before = tl.full([C], 1.0, tl.float32)
    after = tl.full([C], 1.0, tl.float32)
    if g is not None:
        between = decays_between(sums[:, None], sums[None, :], unit)
        A *= between
        L *= between
        total = tl.min(sums, 0)
        before = decays_between(sums, 0, unit)
        after = decays_between(total, sums, unit)
        tl.store(decay + tile, decays_between(total, 0, unit))
    if factors is not None:
        factors += tile * 3 * C + t
        tl.store(factors, scale * before * q_norm)
        tl.store(factors + C, before * k_norm)
        tl.store(factors + 2 * C, after * k_norm)
    A = tl.where(t[:, None] >= t[None, :], A * scale, 0)
    store_tile(scores + tile * C * C, C, C, C, A)
    store_resolvent(resolvent, b, tile, L, C)


@triton.jit
def store_resolvent(resolvent, beta, tile, L, C: tl.constexpr):
    """Store R = (I + diag(beta) L)^-1 diag(beta) of one tile, for beta [C] and the part of L below the diagonal."""
    t = tl.arange(0, C)
    L = tl.where(t[:, None] > t[None, :], L * beta[:, None], 0)
    X = invert_unit_lower(L, C, resolvent.dtype.element_ty == tl.bfloat16, "tf32x3")
    store_tile(resolvent + tile * C * C, C, C, C, X * beta[None, :])
