"""What every kernel here shares: the chunk a program works on, matmuls in the right precision, running sums.

A chunk is CHUNK consecutive tokens of one sequence (fewer at its end). Chunks are numbered through all sequences in
order; a tile that belongs to a chunk and a head is stored at index chunk * H + head.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64
LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-104.0)  # exp(-104) is 0 in float32: a lower gate is the same gate, -inf included
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def chunk_count(B: int, T: int, cu_seqlens: Tensor | None) -> int:
    """Chunks in all; with cu_seqlens an upper bound, since its values are the device's alone."""
    return B * ((T + CHUNK - 1) // CHUNK) if cu_seqlens is None else T // CHUNK + cu_seqlens.shape[0] - 1


class Chunks(NamedTuple):
    """Where the chunks are. Packed sequences (cu_seqlens) are looked up on the device: the host knows only a bound."""

    sequences: int  # N
    count: int  # see chunk_count
    cu_seqlens: Tensor | None = None  # [N + 1]
    offsets: Tensor | None = None  # [N + 1], first chunk of each sequence
    owners: Tensor | None = None  # [count], sequence of each chunk; N where the bound was not reached

    @classmethod
    def of(cls, B: int, T: int, cu_seqlens: Tensor | None) -> "Chunks":
        count = chunk_count(B, T, cu_seqlens)
        if cu_seqlens is None:
            return cls(B, count)
        N = len(cu_seqlens) - 1
        cu_seqlens = cu_seqlens.long().contiguous()
        offsets = torch.zeros_like(cu_seqlens)
        torch.cumsum((cu_seqlens.diff() + CHUNK - 1) // CHUNK, 0, out=offsets[1:])
        owners = torch.searchsorted(offsets[1:], torch.arange(count, device=offsets.device), right=True)
        return cls(N, count, cu_seqlens, offsets, owners)

    @property
    def table(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.cu_seqlens, self.offsets, self.owners


@triton.jit
def chunk_rows(chunk, N, T, cu_seqlens, offsets, owners, C: tl.constexpr):
    """First row of a chunk among the B * T rows, and how many rows it has (0 for a chunk that does not exist)."""
    if cu_seqlens is None:
        per = tl.cdiv(T, C)
        row = (chunk // per) * T + (chunk % per) * C
        rows = T - (chunk % per) * C
    else:
        n = tl.load(owners + chunk)
        row = tl.load(cu_seqlens + n, mask=n < N, other=0)
        row += (chunk - tl.load(offsets + n, mask=n < N, other=0)) * C
        rows = tl.load(cu_seqlens + n + 1, mask=n < N, other=0) - row
    return row, tl.minimum(rows, C)


@triton.jit
def sequence_chunks(n, T, offsets, C: tl.constexpr):
    """First chunk of sequence n, and how many it has."""
    if offsets is None:
        count = tl.cdiv(T, C)
        first = n * count
    else:
        first = tl.load(offsets + n)
        count = (tl.load(offsets + n + 1) - first).to(tl.int32)
    return first, count


@triton.jit
def load_tile(x, stride, rows, cols, R: tl.constexpr, C: tl.constexpr):
    """Tile [R, C] at x, zero from `rows` and `cols` on."""
    i, j = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    return tl.load(x + i * stride + j, mask=(i < rows) & (j < cols), other=0)


@triton.jit
def store_tile(x, stride, rows, cols, tile):
    i, j = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    tl.store(x + i * stride + j, tile.to(x.dtype.element_ty), mask=(i < rows) & (j < cols))


@triton.jit
def prefetch_tile(x, stride, rows, cols, R: tl.constexpr, C: tl.constexpr):
    """Has what load_tile would load brought into the L2 cache, and does not wait for it."""
    if not _INTERPRETED:
        LINE: tl.constexpr = 1024 // x.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = (C + LINE - 1) // LINE
        i, j = tl.arange(0, R)[:, None], tl.arange(0, LINES)[None, :] * LINE
        p = x + tl.minimum(i, rows - 1) * stride + tl.minimum(j, cols - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip


@triton.jit
def any_marked(marks, count, BLOCKS: tl.constexpr, EACH: tl.constexpr):
    """Whether there is work for a program that looks after items id, id + programs, ... of `count`, EACH in all, where
    BLOCKS items in turn share a mark."""
    items = tl.program_id(0) + tl.num_programs(0) * tl.arange(0, EACH)
    return tl.max(tl.load(marks + items // BLOCKS, mask=items < count, other=0).to(tl.uint32), 0) != 0


@triton.jit
def exp2(x):
    """2^x with denormal results flushed to 0: a third of the instructions of tl.exp2."""
    if _INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b with a float32 accumulator; PRECISION matters to float32 operands only: "tf32", or "tf32x3",
    three of these on tensor cores with nearly the error of IEEE float32."""
    if _INTERPRETED:  # its matmul knows no bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def split(x):
    """float32 x as its leading 8 bits, which a bfloat16 holds, and the rest."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def to_tf32(x):
    """float32 x rounded to the 10 bits of a tf32, which the tensor cores would cut off instead."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def precise_dot(a_high, a_low, x, acc, PRECISION: tl.constexpr):
    """acc + a x for a in two parts (see split) and float32 x, to twice the bits of a bfloat16; a_low is unused else."""
    if a_high.dtype == tl.bfloat16:
        high, low = split(x)
        high = high.to(tl.bfloat16)
        acc = dot(a_high, high, acc, PRECISION)
        acc = dot(a_high, low.to(tl.bfloat16), acc, PRECISION)
        acc = dot(a_low, high, acc, PRECISION)
    else:
        acc = dot(a_high, x, acc, PRECISION)
    return acc


@triton.jit
def two_part_dot(a_high, a_low, x, acc, PRECISION: tl.constexpr):
    """acc + a x for a in two parts and an x that needs no more bits than it has; a_low is unused for float32."""
    acc = dot(a_high, x, acc, PRECISION)
    if a_high.dtype == tl.bfloat16:
        acc = dot(a_low, x, acc, PRECISION)
    return acc


@triton.jit
def parts_of(x, dtype: tl.constexpr):
    """float32 x as its rounding to dtype and what that took from it."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def log_gates(x, inverse, LOGITS: tl.constexpr):
    """Natural log gates, at least FLOOR, from what was given: these, or logits of gates logsigmoid(x) * inverse."""
    x = x.to(tl.float32)
    if LOGITS:
        x = (tl.minimum(x, 0.0) - tl.log(1 + tl.exp(-tl.abs(x)))) * inverse
    return tl.maximum(x, FLOOR, tl.PropagateNan.ALL)  # NaN goes on, as through any arithmetic


@triton.jit
def gate_slope(x, inverse):
    """d log gate / d logit."""
    return inverse / (1 + tl.exp(x.to(tl.float32)))


@triton.jit
def store_parts(x, tile, C: tl.constexpr, LOW: tl.constexpr):
    """Store a tile [C, C] as its rounding to x's type and, where LOW, what that took from it, one after the other."""
    high, low = parts_of(tile, x.dtype.element_ty)
    store_tile(x, C, C, C, high)
    if LOW:
        store_tile(x + C * C, C, C, C, low)


@functools.cache
def signs(device: torch.device) -> Tensor:
    """[2, CHUNK, CHUNK] bfloat16: 1 on and below the diagonal and -1 above; then 1 on and above it and 0 below.

    Running sums over a chunk are matmuls with these; loading them costs less than making them in registers.
    """
    below = torch.ones(CHUNK, CHUNK, device=device).tril()
    return torch.stack([2 * below - 1, below.T]).bfloat16()


@triton.jit
def exact_dot(a, b, PARTS: tl.constexpr):
    """a b on tensor cores, where one is a small-integer bfloat16 matrix: the other, float32, is cut into PARTS bfloat16
    parts.

    One part is exact for what was a bfloat16, three for any float32.
    """
    acc = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
    for _ in tl.static_range(PARTS - 1):
        if a.dtype == tl.float32:
            part, a = split(a)
            acc = dot(part.to(tl.bfloat16), b, acc, "ieee")
        else:
            part, b = split(b)
            acc = dot(a, part.to(tl.bfloat16), acc, "ieee")
    return dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc, "ieee")
