"""Building blocks shared by the kernels: finding a chunk, loading and storing tiles, matmuls in the right precision.

A chunk is CHUNK consecutive tokens of one sequence; the last chunk of a sequence may be shorter. Chunks are numbered
through all sequences in order. The tile of a chunk and a head is stored at index chunk * H + head.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from glalm.kernels.common import CHUNK

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# exp(-104) is 0 in float32, so clamping log gates at -104 changes nothing and makes -inf finite.
MIN_LOG_GATE = tl.constexpr(-104.0)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def count_chunks(B: int, T: int, cu_seqlens: Tensor | None, chunk: int = CHUNK) -> int:
    """Return the number of chunks. With cu_seqlens it is an upper bound, because its values are on the device."""
    return B * ((T + chunk - 1) // chunk) if cu_seqlens is None else T // chunk + cu_seqlens.shape[0] - 1


class Chunks(NamedTuple):
    """The chunks of a batch. For packed sequences, kernels look up a chunk's tokens in tables on the device."""

    sequences: int  # N
    count: int  # number of chunks, or an upper bound (see count_chunks)
    cu_seqlens: Tensor | None = None  # [N + 1]
    offsets: Tensor | None = None  # [N + 1], first chunk of each sequence
    owners: Tensor | None = None  # [count], sequence of each chunk; N for chunks beyond the last

    @classmethod
    def locate(cls, B: int, T: int, cu_seqlens: Tensor | None, chunk: int = CHUNK) -> "Chunks":
        count = count_chunks(B, T, cu_seqlens, chunk)
        if cu_seqlens is None:
            return cls(B, count)
        N = len(cu_seqlens) - 1
        cu_seqlens = cu_seqlens.long().contiguous()
        offsets = torch.zeros_like(cu_seqlens)
        torch.cumsum((cu_seqlens.diff() + chunk - 1) // chunk, 0, out=offsets[1:])
        owners = torch.searchsorted(offsets[1:], torch.arange(count, device=offsets.device), right=True)
        return cls(N, count, cu_seqlens, offsets, owners)

    @property
    def device_tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.cu_seqlens, self.offsets, self.owners


def as_rows(x: Tensor) -> Tensor:
    """Return x [B, T, D] such that its tokens are rows of adjacent channels at equal distances, copied if necessary."""
    evenly_spaced = x.stride(2) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    if evenly_spaced and x.stride(1) >= x.shape[2]:
        return x
    # x.contiguous() would return an x of one token as it is, whatever the distance between its tokens.
    return x.clone(memory_format=torch.contiguous_format)


@triton.jit
def locate_chunk(chunk, N, T, cu_seqlens, offsets, owners, C: tl.constexpr):
    """Return the first of the chunk's rows among all B * T rows, and their number (0 if the chunk does not exist)."""
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
def chunks_of_sequence(n, T, offsets, C: tl.constexpr):
    """Return the first chunk of sequence n, and the sequence's number of chunks."""
    if offsets is None:
        count = tl.cdiv(T, C)
        first = n * count
    else:
        first = tl.load(offsets + n)
        count = (tl.load(offsets + n + 1) - first).to(tl.int32)
    return first, count


@triton.jit
def load_tile(x, stride, rows, cols, R: tl.constexpr, C: tl.constexpr):
    """Load a tile [R, C] at x, with zeros from row `rows` and column `cols` on."""
    i = tl.arange(0, R)[:, None]
    j = tl.arange(0, C)[None, :]
    return tl.load(x + i * stride + j, mask=(i < rows) & (j < cols), other=0)


@triton.jit
def store_tile(x, stride, rows, cols, tile):
    """Store the first `rows` rows and `cols` columns of a tile at x, in x's dtype."""
    i = tl.arange(0, tile.shape[0])[:, None]
    j = tl.arange(0, tile.shape[1])[None, :]
    tl.store(x + i * stride + j, tile.to(x.dtype.element_ty), mask=(i < rows) & (j < cols))


@triton.jit
def mask_channels(inside, d, D: tl.constexpr, BD: tl.constexpr):
    """Return the mask of a row. Where blocks of channels divide D, the compiler drops the comparison of channels."""
    if _INTERPRETED:  # The interpreter of Triton 3.9 loads nothing under a broadcast mask.
        return d < tl.where(inside, D, 0)
    mask = tl.broadcast_to(inside, [BD])
    if D % BD != 0:
        mask = mask & (d < D)
    return mask


@triton.jit
def prefetch_tile(x, stride, rows, cols, R: tl.constexpr, C: tl.constexpr):
    """Start fetching into the L2 cache what load_tile would read, without waiting for it."""
    if not _INTERPRETED:
        # One prefetch for each cache line of 128 bytes. Lines beyond the tile are clamped to its last element.
        LINE: tl.constexpr = 1024 // x.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = (C + LINE - 1) // LINE
        i = tl.arange(0, R)[:, None]
        j = tl.arange(0, LINES)[None, :] * LINE
        p = x + tl.minimum(i, rows - 1) * stride + tl.minimum(j, cols - 1)
        # Inline assembly must return a value: the mov writes a dummy.
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip


@triton.jit
def any_marked(marks, count, BLOCKS: tl.constexpr, ITEMS: tl.constexpr):
    """Return whether any of this program's items is marked.

    The program owns the items id, id + programs, id + 2 * programs, ... below `count`, ITEMS of them.
    BLOCKS consecutive items share one mark.
    """
    items = tl.program_id(0) + tl.num_programs(0) * tl.arange(0, ITEMS)
    return tl.max(tl.load(marks + items // BLOCKS, mask=items < count, other=0).to(tl.uint32), 0) != 0


@triton.jit
def flushed_exp2(x):
    """Return 2^x with denormal results flushed to 0, in a third of the instructions of tl.exp2."""
    if _INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def reciprocal(x):
    """Return 1 / x to the last bit or two, in one instruction; 0 for x above 2^126."""
    if _INTERPRETED:
        return 1 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def dot_add(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a @ b in float32.

    PRECISION matters for float32 operands only: "tf32", "tf32x3" (three tf32 products, with nearly the error of IEEE
    float32) or "ieee".
    """
    if _INTERPRETED:  # The interpreter's matmul does not support bfloat16.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def split_bfloat16(x):
    """Return float32 x as its leading 8 bits, which fit a bfloat16 exactly, and the remainder."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def round_to_tf32(x):
    """Round float32 x to tf32's 10 bits of mantissa; the tensor cores would truncate instead."""
    if _INTERPRETED:
        return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    bits = tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1
    )  # fmt: skip
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def as_operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Return x as the matmuls of this precision take it: rounded to `dtype`, and a float32 to tf32."""
    if dtype == tl.bfloat16 and x.dtype == tl.float32 and not _INTERPRETED:
        # Where x is also used after widen, Triton would round it twice: in pairs and, eight times slower, one by one.
        x = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )  # fmt: skip
    else:
        x = x.to(dtype)
    if dtype == tl.float32 and PRECISION == "tf32":
        x = round_to_tf32(x)
    return x


@triton.jit
def widen(x):
    """Return a result of as_operand in float32."""
    if x.dtype == tl.bfloat16 and not _INTERPRETED:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )  # fmt: skip
    return x.to(tl.float32)


@triton.jit
def rounded_dot_add(a, b, acc, PRECISION: tl.constexpr):
    """Return dot_add of the operands, rounded by as_operand."""
    return dot_add(as_operand(a, a.dtype, PRECISION), as_operand(b, b.dtype, PRECISION), acc, PRECISION)


@triton.jit
def dot_add_both_split(a_high, a_low, x, acc, PRECISION: tl.constexpr):
    """Return acc + a @ x to twice the bits of a bfloat16, for a = a_high + a_low and float32 x.

    If a_high is float32, a_low is ignored.
    """
    if a_high.dtype == tl.bfloat16:
        high, low = split_bfloat16(x)
        high = high.to(tl.bfloat16)
        acc = dot_add(a_high, high, acc, PRECISION)
        acc = dot_add(a_high, low.to(tl.bfloat16), acc, PRECISION)
        acc = dot_add(a_low, high, acc, PRECISION)
    else:
        acc = dot_add(a_high, x, acc, PRECISION)
    return acc


@triton.jit
def dot_add_left_split(a_high, a_low, x, acc, PRECISION: tl.constexpr):
    """Return acc + a @ x for a = a_high + a_low, where x is exact in its dtype, so that it has no low part.

    If a_high is float32, a_low is ignored.
    """
    acc = dot_add(a_high, x, acc, PRECISION)
    if a_high.dtype == tl.bfloat16:
        acc = dot_add(a_low, x, acc, PRECISION)
    return acc


@triton.jit
def round_in_two(x, dtype: tl.constexpr):
    """Return float32 x rounded to `dtype`, and the rounding error in `dtype`."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def compute_log_gates(x, inv_normalizer, FROM_LOGITS: tl.constexpr):
    """Return natural log gates of at least MIN_LOG_GATE.

    x holds log gates or, with FROM_LOGITS, logits l of the log gate logsigmoid(l) * inv_normalizer. From l = 17 on,
    1 + exp(-l) is 1 in float32, and the log gate 0 in place of -4e-8 * inv_normalizer.
    """
    x = x.to(tl.float32)
    if FROM_LOGITS:
        x = (tl.minimum(x, 0.0) - tl.log(1 + tl.exp(-tl.abs(x)))) * inv_normalizer
    return tl.maximum(x, MIN_LOG_GATE, tl.PropagateNan.ALL)


@triton.jit
def gate_derivative(x, inv_normalizer):
    """Return the derivative of the log gate by its logit."""
    return inv_normalizer / (1 + tl.exp(x.to(tl.float32)))


@triton.jit
def store_with_residual(x, tile, C: tl.constexpr, WITH_RESIDUAL: tl.constexpr):
    """Store a tile [C, C], rounded to x's dtype, at x and, if WITH_RESIDUAL, its rounding error right after it."""
    high, low = round_in_two(tile, x.dtype.element_ty)
    store_tile(x, C, C, C, high)
    if WITH_RESIDUAL:
        store_tile(x + C * C, C, C, C, low)


def build_once(build: Callable[[torch.device], Tensor]) -> Callable[[torch.device], Tensor]:
    """Let `build`, which computes a constant on a device, run once for each device, and keep its tensor for all calls.

    The first call may belong to the warm-up or the capture of a CUDA graph, on any stream. What it allocates lies in
    the graph's memory, which other tensors take later, and what it captures has not run yet. So `build` runs in a
    thread of its own, which has neither the memory pool, the stream nor the modes of the caller, and the caller waits
    until the tensor is on the device, where every stream may read it.
    """

    def build_and_wait(device: torch.device) -> Tensor:
        constant = build(device)
        if device.type == "cuda":
            # Stream.synchronize would raise in set_sync_debug_mode("error"), which GraphCapture.rehearse sets.
            torch.cuda.current_stream(device).record_event().synchronize()
        return constant

    @functools.cache
    @functools.wraps(build)
    def get_constant(device: torch.device) -> Tensor:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(build_and_wait, device).result()

    return get_constant


@build_once
def running_sum_matrices(device: torch.device) -> Tensor:
    """Return two matrices, bfloat16 [2, CHUNK, CHUNK], that sum over the tokens of a chunk by a matmul.

    The first has 1 on and below the diagonal and -1 above it: row t sums the tokens up to t and subtracts those after
    t, for the exponents of rescale.py. The second has 1 on and above the diagonal: row t sums the tokens from t on, for
    the gate's gradient; transposed, it sums those up to t. Loading the matrices costs less than computing them.
    """
    lower = torch.ones(CHUNK, CHUNK, device=device).tril()
    return torch.stack([2 * lower - 1, lower.T]).bfloat16()


@triton.jit
def exact_dot(a, b, PARTS: tl.constexpr):
    """Return a @ b computed on tensor cores, where one operand holds small integers in bfloat16.

    The other operand is float32 and is split into PARTS bfloat16 parts: one part is exact if it holds bfloat16 values,
    three parts are exact for any float32.
    """
    acc = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
    for _ in tl.static_range(PARTS - 1):
        if a.dtype == tl.float32:
            part, a = split_bfloat16(a)
            acc = dot_add(part.to(tl.bfloat16), b, acc, "ieee")
        else:
            part, b = split_bfloat16(b)
            acc = dot_add(a, part.to(tl.bfloat16), acc, "ieee")
    return dot_add(a.to(tl.bfloat16), b.to(tl.bfloat16), acc, "ieee")
