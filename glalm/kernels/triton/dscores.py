"""dA = mask(do v^T), the gradient of the gated scores inside every chunk, once for all channel blocks."""

import triton
import triton.language as tl

from glalm.kernels.triton.blocks import chunk_rows, dot, load_tile, store_parts


@triton.jit(do_not_specialize=["N", "T"])
def dscores_kernel(
    do, v, dscores, cu_seqlens, offsets, owners, N, T,
    H: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one head, a tile [2, C, C]: dA and what rounding took from it."""
    tile = tl.program_id(0).to(tl.int64)
    chunk, h = tile // H, tile % H
    row, rows = chunk_rows(chunk, N, T, cu_seqlens, offsets, owners, C)
    if rows <= 0:
        return
    t = tl.arange(0, C)
    dtype: tl.constexpr = dscores.dtype.element_ty
    dA = tl.zeros([C, C], tl.float32)
    for v0 in range(0, VP, BV):
        p = row * H * V + h * V + v0
        do_tile = load_tile(do + p, H * V, rows, V - v0, C, BV).to(dtype)
        v_tile = load_tile(v + p, H * V, rows, V - v0, C, BV).to(dtype)
        dA = dot(do_tile, tl.trans(v_tile), dA, PRECISION)
    store_parts(dscores + tile * 2 * C * C, tl.where(t[:, None] >= t[None, :], dA, 0), C, True)
