"""Mamba-2's recurrence on a GPU: linear attention with one gate per head, whose heads share q and k in groups.

    S_t = exp(dt_t A_h) S_{t-1} + B_t^T (dt_t x_t),   o_t = C_t S_t + skip_h x_t

In terms of linear attention, q = C and k = B, the same for all heads of a group. All that differs between these heads
is one number per token, so it is applied to the values and outputs, and q, k and q k^T serve all heads of the group.
Within a chunk, let b_t be the running sum of dt A and `total` its last value. With E_ij = exp(b_i - b_j) for i >= j,

    o_i  = exp(b_i) q_i S + sum_j (q_i.k_j E_ij dt_j) x_j + skip x_i
    S   <- exp(total) S + sum_j k_j^T (dt_j exp(total - b_j) x_j)

and backward in time, with dS the gradient of the state at the chunk's end and u = dt x,

    du_j = exp(total - b_j) k_j dS + sum_i (q_i.k_j E_ij) do_i,   dx_j = dt_j du_j + skip do_j
    dS  <- exp(total) dS + sum_i q_i^T (exp(b_i) do_i)
    dq_i = sum over heads of exp(b_i) do_i S^T + sum_j (sum over heads of (do_i.u_j) E_ij) k_j,   dk alike

The log gate at t acts on every pair of a write before t and a read at or after t. All these pairs are added up
one by one. The usual q dq - k dk, a difference of sums, would round them away after a gate that forgets everything.

Forward:   decays (of every token and head) -> scan (carries the state and computes o)
Backward:  decays -> scan (recomputes the states) -> scan in reverse (dx, and the gradients of the states) -> gradients
           (dq, dk, and sums for the gates), in which a program adds up the heads of a group in one chunk -> gates
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glalm.kernels.common import multiplies_exactly
from glalm.kernels.triton.launch import LaunchConfig, launch, multiprocessors, padded_head_size, ssd_config
from glalm.kernels.triton.segments import join_segments
from glalm.kernels.triton.tiles import (
    LOG2E,
    MIN_LOG_GATE,
    Chunks,
    as_rows,
    chunks_of_sequence,
    dot_add,
    flushed_exp2,
    load_tile,
    locate_chunk,
    prefetch_tile,
    store_tile,
)

# Launching --------------------------------------------------------------------------------------------------


class SSDPlan:
    """The sizes, precision and configuration of one call. Each method launches one stage.

    Args:
        x: [B, T, H, V].
        dt: float32 [B, T, H].
        A: float32 [H].
        k, q: [B, T, G, K], in x's dtype.
        skip: float32 [H], or None.
    """

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, k: Tensor, q: Tensor, skip: Tensor | None, cu_seqlens: Tensor | None
    ):
        self.x, self.k, self.q = (as_rows(y.flatten(2)).unflatten(2, y.shape[2:]) for y in (x, k, q))
        self.dt = dt.contiguous()
        self.A = A.float().contiguous()
        self.skip = None if skip is None else skip.float().contiguous()
        self.B, self.T, self.H, self.V = x.shape
        self.G, self.K = k.shape[2:]
        self.KP = padded_head_size(self.K)
        self.VP = padded_head_size(self.V)
        self.dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        self.config = ssd_config(x.device, self.KP, self.VP, self.dtype.itemsize * 8)
        self.C = self.config.chunk
        self.cu_seqlens = cu_seqlens
        self.chunks = Chunks.locate(self.B, self.T, cu_seqlens, self.C)
        self.precisions = {
            "PRECISION": "tf32x3" if multiplies_exactly(x) else "tf32",
            "DOT_DTYPE": tl.bfloat16 if self.dtype == torch.bfloat16 else tl.float32,
        }
        self.sizes = dict(H=self.H, G=self.G, K=self.K, KP=self.KP, V=self.V, VP=self.VP, C=self.C)
        self.tables = *self.chunks.device_tables, self.chunks.sequences, self.T

    def allocate(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=self.x.device, dtype=dtype)

    def allocate_state(self, segments: int = 1) -> Tensor:
        """Return a buffer for one state of every segment of every sequence, float32 [N * segments, H, K, V]."""
        return self.allocate(self.chunks.sequences * segments, self.H, self.K, self.V)

    def forward(self, initial: Tensor | None, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
        """Return o [B, T, H, V], and the final states [N, H, K, V] or None."""
        o = self.allocate(*self.x.shape, dtype=self.x.dtype)
        final = self.allocate_state() if output_final_state else None
        self.scan(self.compute_decays(), self.x, initial, final, out=o)
        return o, final

    def backward(
        self, initial: Tensor | None, do: Tensor, dfinal: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of x, dt, A, k, q, skip and the initial states.

        The states of all chunks take several times the memory of x, so they are kept for a part of the batch at a time.
        """
        do = do.contiguous()
        dx, dq, dk = (self.allocate(*y.shape, dtype=y.dtype) for y in (self.x, self.q, self.k))
        ddt = torch.empty_like(self.dt)
        dinitial = None if initial is None else self.allocate_state()
        by_sequence = initial, do, dfinal, dx, ddt, dk, dq, dinitial
        sums = []
        parts = self.count_parts()
        for i in range(parts):
            # A packed batch is one part, although it has one row of tokens and a state of every sequence.
            part = slice(i * self.B // parts, (i + 1) * self.B // parts) if parts > 1 else slice(None)
            inputs = self.x[part], self.dt[part], self.A, self.k[part], self.q[part], self.skip, self.cu_seqlens
            sums.append(SSDPlan(*inputs).backward_part(*(x if x is None else x[part] for x in by_sequence)))
        dA, dskip = (torch.stack(shares).sum(0) for shares in zip(*sums, strict=True))
        return dx, ddt, dA, dk, dq, None if self.skip is None else dskip, dinitial

    def count_parts(self) -> int:
        """Return into how many parts of equal size the batch is cut, each of which still fills the GPU."""
        if self.cu_seqlens is not None:
            return 1
        programs_at_once = multiprocessors(self.x.device) * max(1, 8 // self.config.scan_backward.warps)
        blocks = triton.cdiv(self.VP, self.config.scan_backward.tile["BV"])
        parts = 1
        while self.B % (2 * parts) == 0 and self.B // (2 * parts) * self.H * blocks >= programs_at_once:
            parts *= 2
        return parts

    def backward_part(
        self, initial: Tensor | None, do: Tensor, dfinal: Tensor | None, dx: Tensor, ddt: Tensor, dk: Tensor,
        dq: Tensor, dinitial: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Write the gradients of x, dt, k, q and the initial states, and return those of A and skip, float32 [2, H]."""
        decays = self.compute_decays()
        states = self.allocate(self.chunks.count * self.H, self.VP, self.KP, dtype=self.dtype)
        dstates = torch.empty_like(states)
        self.scan(decays, self.x, initial, None, states=states)
        # The shares of the blocks of value channels.
        blocks = triton.cdiv(self.VP, self.config.scan_backward.tile["BV"])
        writes = self.allocate(blocks, self.chunks.count, self.H, 3, self.C)
        self.scan(decays, do, dfinal, dinitial, out=dx, states=dstates, writes=writes, reverse=True)
        reads, through = self.compute_gradients(decays, do, states, dstates, dq, dk)
        by_head = self.allocate(self.chunks.count, 2, self.H)
        args = self.dt, self.A, writes, reads, through, ddt, by_head, *self.tables, self.chunks.count
        self.launch_by_heads(gate_gradients_kernel, args, COLUMN_BLOCKS=len(writes), KEY_BLOCKS=len(reads))
        return by_head.sum(0)

    def compute_decays(self) -> Tensor:
        """Return what decays_kernel computes, float32 [chunks, H, 5, C]."""
        decays = self.allocate(self.chunks.count, self.H, 5, self.C)
        args = self.dt, self.A, decays, *self.tables
        self.launch_by_heads(decays_kernel, args)
        return decays

    def scan(
        self,
        decays: Tensor,
        w: Tensor,
        initial: Tensor | None,
        final: Tensor | None,
        out: Tensor | None = None,
        states: Tensor | None = None,
        writes: Tensor | None = None,
        reverse: bool = False,
    ) -> None:
        """Carry the state through every sequence; see ssd_scan_kernel for the arguments.

        When there are too few sequences and heads to fill the GPU, each sequence is cut into segments that run in
        parallel. Their starting states are computed first.
        """
        config = self.config.scan_backward if reverse else self.config.scan_forward
        if out is None:
            config = self.config.scan_states
        initial = None if initial is None else initial.contiguous()
        segments = self.count_segments(config)
        outputs = dict(out=out, states=states, writes=writes)
        if segments == 1:
            self.launch_scan(1, config, decays, w, initial, final, reverse, **outputs)
            return
        starts = self.allocate_state(segments)
        decay = self.allocate(self.chunks.sequences * segments, self.H, self.KP)
        self.launch_scan(segments, self.config.scan_states, decays, w, None, starts, reverse, segment_decay=decay)
        join_segments(starts, decay, segments, initial, final, reverse=reverse)
        self.launch_scan(segments, config, decays, w, starts, None, reverse, **outputs)

    def count_segments(self, config: LaunchConfig) -> int:
        """Return how many segments each sequence is cut into, so that all programs run at once and fill the GPU."""
        programs = self.chunks.sequences * self.H * triton.cdiv(self.VP, config.tile["BV"])
        programs_at_once = multiprocessors(self.x.device) * max(1, 8 // config.warps)
        chunks_per_sequence = self.chunks.count // max(1, self.chunks.sequences)
        return max(1, min(programs_at_once // max(1, programs), chunks_per_sequence // 4))

    def launch_scan(
        self, segments: int, config: LaunchConfig, decays: Tensor, w: Tensor, initial, final, reverse: bool, out=None,
        states=None, writes=None, segment_decay=None,
    ) -> None:  # fmt: skip
        a, b = (self.k, self.q) if reverse else (self.q, self.k)
        args = (
            a, b, w, self.x if reverse else None, self.skip, decays, out, states, writes, initial, final,
            segment_decay, *self.tables, self.chunks.count, segments,
        )  # fmt: skip
        constants = {
            **self.sizes,
            "STRIDE_A": a.stride(1),
            "STRIDE_B": b.stride(1),
            "STRIDE_W": self.H * self.V if reverse else w.stride(1),
            "STRIDE_X": self.x.stride(1),
            **config.tile,
            "REVERSE": reverse,
            **self.precisions,
        }
        programs = self.chunks.sequences * self.H * segments * triton.cdiv(self.VP, config.tile["BV"])
        launch(ssd_scan_kernel, programs, args, constants, config.options)

    def compute_gradients(
        self, decays: Tensor, do: Tensor, states: Tensor, dstates: Tensor, dq: Tensor, dk: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write dq and dk, and return the sums for the gates that ssd_gradients_kernel computes."""
        config = self.config.gradients
        key_blocks = self.KP // config.tile["BK"]
        heads_per_group = self.H // self.G
        splits = self.count_splits(heads_per_group, key_blocks)
        dq_shares, dk_shares = dq, dk
        if splits > 1:
            dq_shares, dk_shares = (self.allocate(splits, *self.q.shape) for _ in range(2))
        reads = self.allocate(key_blocks, self.chunks.count, self.H, 2, self.C)
        through = self.allocate(key_blocks, self.chunks.count, self.H)
        args = (
            self.q, self.k, self.x, do, decays, states, dstates, dq_shares, dk_shares, reads, through, *self.tables,
            self.B * self.T, self.chunks.count,
        )  # fmt: skip
        constants = {
            **self.sizes,
            "STRIDE_Q": self.q.stride(1),
            "STRIDE_K": self.k.stride(1),
            "STRIDE_X": self.x.stride(1),
            **config.tile,
            "HEADS": heads_per_group // splits,
            **self.precisions,
        }
        programs = self.chunks.count * self.G * splits * key_blocks
        launch(ssd_gradients_kernel, programs, args, constants, config.options)
        if splits > 1:
            dq.copy_(dq_shares.sum(0))
            dk.copy_(dk_shares.sum(0))
        return reads, through

    def launch_by_heads(self, kernel, args: tuple, **constants: int) -> None:
        """Launch a kernel of which each program works on HEADS heads of one chunk."""
        heads = min(8, triton.next_power_of_2(self.H))
        programs = self.chunks.count * triton.cdiv(self.H, heads)
        launch(kernel, programs, args, dict(H=self.H, C=self.C, HEADS=heads) | constants, {"num_warps": 4})

    def count_splits(self, heads: int, key_blocks: int) -> int:
        """Return how many programs share the heads of a group in one chunk, so that there are enough for the GPU."""
        programs = max(1, self.chunks.count * self.G * key_blocks)
        splits = 1
        while (
            splits * 2 <= heads and heads % (splits * 2) == 0 and programs * splits < 4 * multiprocessors(self.x.device)
        ):
            splits *= 2
        return splits


# Decays within a chunk --------------------------------------------------------------------------------------


@triton.jit
def add_exactly(high1, low1, high2, low2):
    """Add two numbers, each the sum of two float32, without losing the low bits of the smaller one."""
    high = high1 + high2
    part = high - high1
    return high, low1 + low2 + ((high1 - (high - part)) + (high2 - part))


@triton.jit
def locate_heads(N, T, cu_seqlens, offsets, owners, H: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr):
    """Return the chunk, its first row, its number of rows, and the heads [HEADS, 1], of which some may be >= H."""
    pid = tl.program_id(0).to(tl.int64)
    BLOCKS: tl.constexpr = (H + HEADS - 1) // HEADS
    chunk = pid // BLOCKS
    row, rows = locate_chunk(chunk, N, T, cu_seqlens, offsets, owners, C)
    return chunk, row, rows, (pid % BLOCKS * HEADS + tl.arange(0, HEADS))[:, None]


@triton.jit
def load_gates(dt, A, row, rows, h, H: tl.constexpr, C: tl.constexpr):
    """Return the time steps of heads h [HEADS, 1] in one chunk, and the clamped log gates, [HEADS, C] each.

    Both are zeros beyond the chunk's rows.
    """
    t = tl.arange(0, C)[None, :]
    step = tl.load(dt + (row + t) * H + h, mask=(t < rows) & (h < H), other=0).to(tl.float32)
    gate = step * tl.load(A + h, mask=h < H, other=0)
    return step, tl.maximum(gate, MIN_LOG_GATE, tl.PropagateNan.ALL)


@triton.jit
def load_between(decays, C: tl.constexpr, READS_FIRST: tl.constexpr, EXACT: tl.constexpr):
    """Return exp(b_i - b_j) for a read i and a write j <= i, else 0, of one chunk and head: [C, C].

    READS_FIRST: whether the rows are the reads, or the writes.
    EXACT: whether to use the low parts of b, without which the error is 7e-4 in the worst case, below bfloat16's.
    """
    r = tl.arange(0, C)[:, None]
    c = tl.arange(0, C)[None, :]
    i = r if READS_FIRST else c
    j = c if READS_FIRST else r
    exponent = tl.load(decays + i) - tl.load(decays + j)
    if EXACT:
        exponent += tl.load(decays + C + i) - tl.load(decays + C + j)
    return flushed_exp2(tl.where(i >= j, exponent, -1000.0))


@triton.jit
def rows_of_sequence(n, T, cu_seqlens):
    """Return the first of the sequence's rows among all B * T rows, and their number."""
    if cu_seqlens is None:
        begin = n * T
        length = T
    else:
        begin = tl.load(cu_seqlens + n)
        length = (tl.load(cu_seqlens + n + 1) - begin).to(tl.int32)
    return begin, length


# Kernels ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "T"])
def decays_kernel(
    dt, A, decays, cu_seqlens, offsets, owners, N, T, H: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr
):
    """Store the decays of one chunk of HEADS heads in each program: float32 [chunks, H, 5, C].

    The five rows are the running sum b of the log gates, in units of log 2 and in two parts, exp(b), exp(total - b) and
    the time step.
    """
    chunk, row, rows, h = locate_heads(N, T, cu_seqlens, offsets, owners, H, C, HEADS)
    if rows <= 0:
        return
    step, gate = load_gates(dt, A, row, rows, h, H, C)
    high, low = tl.associative_scan((gate * LOG2E, tl.zeros([HEADS, C], tl.float32)), 1, add_exactly)
    t = tl.arange(0, C)[None, :]
    after = tl.sum(tl.where(t == C - 1, high, 0), 1)[:, None] - high
    after += tl.sum(tl.where(t == C - 1, low, 0), 1)[:, None] - low
    p = decays + (chunk * H + h) * 5 * C + t
    mask = (h < H) & (t < C)
    tl.store(p, high, mask=mask)
    tl.store(p + C, low, mask=mask)
    tl.store(p + 2 * C, flushed_exp2(high + low), mask=mask)
    tl.store(p + 3 * C, flushed_exp2(after), mask=mask)
    tl.store(p + 4 * C, step, mask=mask)


@triton.jit(do_not_specialize=["N", "T", "chunks", "segments"])
def ssd_scan_kernel(
    a, b, w, x, skip, decays, out, states, writes, initial, final, segment_decay, cu_seqlens, offsets, owners, N, T,
    chunks, segments,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    C: tl.constexpr, STRIDE_A: tl.constexpr, STRIDE_B: tl.constexpr, STRIDE_W: tl.constexpr, STRIDE_X: tl.constexpr,
    BV: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Carry BV columns of one head's state through one segment (a run of chunks) of one sequence in each program.

    Backward in time, with q and k, x and do exchanged, the same lines compute dx and the gradient of the state.

    Inputs:
        a, b: q and k, or k and q backward in time, [tokens, G, K]; w: x, or do backward in time, [tokens, H, V]
        x: backward in time, for `writes`. The tokens of these four are STRIDE_A, STRIDE_B, ... numbers apart.
        skip: float32 [H] or None; decays: float32 [chunks, H, 5, C]
        initial: float32 [N, segments, H, K, V] or None for zeros
    Outputs, each of which may be None:
        out: o, or dx backward in time, [tokens, H, V]
        states: [chunks, H, VP, KP], the state that enters each chunk, or the gradient of that which leaves it
        writes: float32 [VP / BV, chunks, H, 3, C], shares of three sums over channels for each token: the products of
            its write with the reads after the chunk, divided by dt; the gradient of dt through dt x; and that of skip
        final: float32 [N, segments, H, K, V]; segment_decay: float32 [N, segments, H, KP]
    """
    BLOCKS: tl.constexpr = (VP + BV - 1) // BV
    pid = tl.program_id(0)
    block = pid % BLOCKS
    head = (pid // BLOCKS).to(tl.int64)
    h = head % H
    group = h // (H // G)
    segment = (head // H) % segments
    n = head // H // segments
    first, count = chunks_of_sequence(n, T, offsets, C)
    chunks_per_segment = tl.cdiv(count, segments)
    begin = tl.minimum((segment * chunks_per_segment).to(tl.int32), count)
    end = tl.minimum(begin + chunks_per_segment, count)
    t = tl.arange(0, C)
    kk = tl.arange(0, KP)
    vv = block * BV + tl.arange(0, BV)
    state = ((n * segments + segment) * H + h) * K * V + kk[None, :] * V + vv[:, None]
    in_state = (kk < K)[None, :] & (vv < V)[:, None]
    S = tl.zeros([BV, KP], tl.float32)
    if initial is not None:
        S = tl.load(initial + state, mask=in_state, other=0)
    segment_factor = 1.0
    skip_factor = 0.0
    if skip is not None:
        skip_factor = tl.load(skip + h)

    sequence_begin, length = rows_of_sequence(n, T, cu_seqlens)
    for i in range(begin, end):
        position = (begin + end - 1 - i) if REVERSE else i
        chunk = (first + position).to(tl.int64)
        row = sequence_begin + position * C
        rows = tl.minimum(length - position * C, C)
        decay = decays + (chunk * H + h) * 5 * C
        before = tl.load(decay + 2 * C + t)
        after = tl.load(decay + 3 * C + t)
        step = tl.load(decay + 4 * C + t)
        total = tl.load(decay + 3 * C - 1)  # exp(b) of the last token
        if i + 1 < end:  # Triton does not pipeline all loads of the next chunk.
            direction = -1 if REVERSE else 1
            prefetch_tile(decay + direction * H * 5 * C, C, 5, C, 8, C)
            next_rows = tl.minimum(length - (position + direction) * C, C)
            next_row = row + direction * C
            column = h * V + block * BV
            prefetch_tile(w + next_row * STRIDE_W + column, STRIDE_W, next_rows, V - block * BV, C, BV)
            if x is not None:
                prefetch_tile(x + next_row * STRIDE_X + column, STRIDE_X, next_rows, V - block * BV, C, BV)
        mask = (t < rows)[:, None] & (vv < V)[None, :]
        w_tile = tl.load(w + (row + t)[:, None] * STRIDE_W + h * V + vv[None, :], mask=mask, other=0)
        if x is not None:
            x_tile = tl.load(x + (row + t)[:, None] * STRIDE_X + h * V + vv[None, :], mask=mask, other=0)
        b_tile = load_tile(b + row * STRIDE_B + group * K, STRIDE_B, rows, K, C, KP).to(DOT_DTYPE)
        S_rounded = S.to(DOT_DTYPE)
        if states is not None:
            at = ((chunk * H + h) * VP + vv)[:, None] * KP + kk[None, :]
            tl.store(states + at, S_rounded)
        if out is not None:
            a_tile = load_tile(a + row * STRIDE_A + group * K, STRIDE_A, rows, K, C, KP).to(DOT_DTYPE)
            A = dot_add(a_tile, tl.trans(b_tile), tl.zeros([C, C], tl.float32), PRECISION)
            A *= load_between(decay, C, not REVERSE, tl.float32 == DOT_DTYPE)
            o = dot_add(a_tile, tl.trans(S_rounded), tl.zeros([C, BV], tl.float32), PRECISION)
            if REVERSE:
                o *= after[:, None]
                x_tile = x_tile.to(tl.float32)
                share = writes + ((block.to(tl.int64) * chunks + chunk) * H + h) * 3 * C + t
                tl.store(share, tl.sum(o * x_tile, 1))
                tl.store(share + 2 * C, tl.sum(w_tile.to(tl.float32) * x_tile, 1))
                o = dot_add(A.to(DOT_DTYPE), w_tile.to(DOT_DTYPE), o, PRECISION)
                tl.store(share + C, tl.sum(o * x_tile, 1))
                o *= step[:, None]
            else:
                o *= before[:, None]
                o = dot_add((A * step[None, :]).to(DOT_DTYPE), w_tile.to(DOT_DTYPE), o, PRECISION)
            o += w_tile.to(tl.float32) * skip_factor
            p = (row + t)[:, None] * H * V + h * V + vv[None, :]
            tl.store(out + p, o.to(out.dtype.element_ty), mask=mask)
        segment_factor *= total
        factor = before if REVERSE else after * step
        scaled = (tl.trans(w_tile).to(tl.float32) * factor[None, :]).to(DOT_DTYPE)
        S = dot_add(scaled, b_tile, S * total, PRECISION)

    if final is not None:
        tl.store(final + state, S, mask=in_state)
    if segment_decay is not None:  # noqa: SIM102 (a compile-time condition, unlike the next one)
        if block == 0:
            at = ((n * segments + segment) * H + h) * KP + kk
            tl.store(segment_decay + at, tl.zeros([KP], tl.float32) + segment_factor)


@triton.jit(do_not_specialize=["N", "T", "tokens", "chunks"])
def ssd_gradients_kernel(
    q, k, x, do, decays, states, dstates, dq, dk, reads, through, cu_seqlens, offsets, owners, N, T, tokens, chunks,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    C: tl.constexpr, STRIDE_Q: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_X: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Add up dq and dk of BK channels over HEADS heads of one group in one chunk, and sums for the heads' gates.

    Tiles [C, C] hold pairs of a write j (rows) and a read i (columns). The tokens of q, k and x are STRIDE_Q, STRIDE_K
    and STRIDE_X numbers apart.

    states, dstates: as ssd_scan_kernel stores them
    dq, dk: [splits, tokens, G, K]
    reads: float32 [KP / BK, chunks, H, 2, C], shares of two sums for each token: the products of its read with the
        writes before the chunk, and those of all pairs in the chunk of a write before it and a read at or after it
    through: float32 [KP / BK, chunks, H], shares of the products of the writes before the chunk with the reads after it
    """
    KEY_BLOCKS: tl.constexpr = KP // BK
    SPLITS: tl.constexpr = H // G // HEADS
    pid = tl.program_id(0)
    block = pid % KEY_BLOCKS
    k0 = block * BK
    split = pid // KEY_BLOCKS % SPLITS
    tile = (pid // KEY_BLOCKS // SPLITS).to(tl.int64)
    chunk = tile // G
    group = tile % G
    row, rows = locate_chunk(chunk, N, T, cu_seqlens, offsets, owners, C)
    if rows <= 0:
        return
    t = tl.arange(0, C)
    q_tile = load_tile(q + row * STRIDE_Q + group * K + k0, STRIDE_Q, rows, K - k0, C, BK).to(DOT_DTYPE)
    k_tile = load_tile(k + row * STRIDE_K + group * K + k0, STRIDE_K, rows, K - k0, C, BK).to(DOT_DTYPE)
    # Each block of channels has its own share of q k^T, and so of the sums for the gates.
    scores = dot_add(k_tile, tl.trans(q_tile), tl.zeros([C, C], tl.float32), PRECISION).to(DOT_DTYPE)
    at_or_after = tl.where(t[:, None] >= t[None, :], 1.0, 0.0).to(DOT_DTYPE)
    sum_dq = tl.zeros([C, BK], tl.float32)
    sum_dk = tl.zeros([C, BK], tl.float32)
    for i in range(HEADS):
        h = group * (H // G) + split * HEADS + i
        decay = decays + (chunk * H + h) * 5 * C
        at = (block.to(tl.int64) * chunks + chunk) * H + h
        before = tl.load(decay + 2 * C + t)
        step = tl.load(decay + 4 * C + t)
        write_factor = tl.load(decay + 3 * C + t) * step
        dA = tl.zeros([C, C], tl.float32)
        from_states = tl.zeros([C], tl.float32)
        products = 0.0
        for v0 in tl.static_range(0, VP, BV):
            state = ((chunk * H + h) * VP + v0) * KP + k0
            S = load_tile(states + state, KP, BV, BK, BV, BK)
            dS = load_tile(dstates + state, KP, BV, BK, BV, BK)
            do_tile = load_tile(do + (row * H + h) * V + v0, H * V, rows, V - v0, C, BV)
            x_tile = load_tile(x + row * STRIDE_X + h * V + v0, STRIDE_X, rows, V - v0, C, BV)
            products += tl.sum(S.to(tl.float32) * dS.to(tl.float32))
            scaled_do = do_tile.to(tl.float32) * before[:, None]
            read = dot_add(q_tile, tl.trans(S), tl.zeros([C, BV], tl.float32), PRECISION)
            from_states += tl.sum(scaled_do * read, 1)
            sum_dq = dot_add(scaled_do.to(DOT_DTYPE), S, sum_dq, PRECISION)
            scaled_x = x_tile.to(tl.float32) * write_factor[:, None]
            sum_dk = dot_add(scaled_x.to(DOT_DTYPE), dS, sum_dk, PRECISION)
            dA = dot_add(x_tile.to(DOT_DTYPE), tl.trans(do_tile.to(DOT_DTYPE)), dA, PRECISION)
        tl.store(through + at, products * tl.load(decay + 3 * C - 1))
        tl.store(reads + at * 2 * C + t, from_states)
        dA *= load_between(decay, C, False, tl.float32 == DOT_DTYPE) * step[:, None]
        pairs = (dA * scores.to(tl.float32)).to(DOT_DTYPE)
        # Summed over heads, dA would take registers that the sums of dq and dk need.
        dA = dA.to(DOT_DTYPE)
        sum_dk = dot_add(dA, q_tile, sum_dk, PRECISION)
        sum_dq = dot_add(tl.trans(dA), k_tile, sum_dq, PRECISION)
        later = dot_add(pairs, at_or_after, tl.zeros([C, C], tl.float32), PRECISION)
        tl.store(reads + at * 2 * C + C + t, tl.sum(tl.where(t[:, None] < t[None, :], later, 0.0), 0))

    p = ((split.to(tl.int64) * tokens + row) * G + group) * K + k0
    store_tile(dq + p, G * K, rows, K - k0, sum_dq)
    store_tile(dk + p, G * K, rows, K - k0, sum_dk)


@triton.jit(do_not_specialize=["N", "T", "chunks"])
def gate_gradients_kernel(
    dt, A, writes, reads, through, ddt, by_head, cu_seqlens, offsets, owners, N, T, chunks,
    H: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr, KEY_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of dt, A and skip in one chunk of HEADS heads in each program.

    writes: as ssd_scan_kernel stores them; reads, through: as ssd_gradients_kernel stores them
    ddt: float32 [tokens, H]; by_head: float32 [chunks, 2, H], the gradients of A and of skip
    """
    chunk, row, rows, h = locate_heads(N, T, cu_seqlens, offsets, owners, H, C, HEADS)
    rows = tl.maximum(rows, 0)
    t = tl.arange(0, C)[None, :]
    is_head = h < H
    inside = is_head & (t < rows)
    is_later = inside & (t > 0)
    step, gate = load_gates(dt, A, row, rows, h, H, C)
    write = tl.zeros([HEADS, C], tl.float32)
    dstep = tl.zeros([HEADS, C], tl.float32)
    dskip = tl.zeros([HEADS, C], tl.float32)
    for block in tl.static_range(COLUMN_BLOCKS):
        p = writes + ((block * chunks.to(tl.int64) + chunk) * H + h) * 3 * C + t
        write += tl.load(p - 1, mask=is_later, other=0)
        dstep += tl.load(p + C, mask=inside, other=0)
        dskip += tl.load(p + 2 * C, mask=inside, other=0)
    write *= tl.load(dt + (row + t - 1) * H + h, mask=is_later, other=0)
    dgate = tl.cumsum(write, 1)  # of the writes before t
    read = tl.zeros([HEADS, C], tl.float32)
    for block in tl.static_range(KEY_BLOCKS):
        at = (block * chunks.to(tl.int64) + chunk) * H + h
        read += tl.load(reads + at * 2 * C + t, mask=inside, other=0)
        dgate += tl.load(reads + at * 2 * C + C + t, mask=inside, other=0)
        dgate += tl.load(through + at, mask=is_head, other=0)
    dgate += tl.cumsum(read, 1, reverse=True)
    dgate = tl.where((gate > MIN_LOG_GATE) & inside, dgate, 0)  # The gradient of a clamped gate is 0.
    tl.store(ddt + (row + t) * H + h, dgate * tl.load(A + h, mask=is_head, other=0) + dstep, mask=inside)
    at = by_head + chunk * 2 * H + h
    tl.store(at, tl.sum(dgate * step, 1)[:, None], mask=is_head)
    tl.store(at + H, tl.sum(dskip, 1)[:, None], mask=is_head)
