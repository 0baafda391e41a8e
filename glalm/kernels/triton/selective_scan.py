"""Mamba's selective scan on a GPU: one kernel forward, and one backward that recomputes the states.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,   y_t = C_t . h_t + skip x_t,   o_t = y_t silu(z_t)

A program owns BD channels and walks along one sequence token by token. A thread owns one channel, with all N numbers of
its state, [NP, BD] in a program, in registers. So the recurrence and the sums over N need no communication, and a state
never goes through memory on the way. ROWS tokens are loaded at a time.

Tiles of ROWS tokens are aligned to multiples of ROWS among the B * T tokens, not to the starts of sequences. Where two
sequences meet in a tile, each sees the other's tokens with dt = 0, which leaves a finite state unchanged. (A NaN or inf
in B or C of one spreads to the other.)

The forward pass saves the state before every cell of CELL tokens, of the sequence that the cell's first token belongs
to. The backward pass takes the cells from the last to the first. In each, a program runs forward from the saved state
and stores the states that enter the tiles; then it takes the tiles from the last to the first, and recomputes the
states of a tile's tokens in registers. With c_t = C_t dy_t:

    dh_t = c_t + exp(dt_{t+1} A) dh_{t+1},   dB_t = sum_d dh_t dt_t x_t,   dC_t = sum_d dy_t h_t

For bfloat16, the sums over channels are matmuls with a matrix of zeros and ones. Each program writes its share of them,
and of the gradients of A, skip and dt's bias, which are sums over tokens; a sum in fixed order follows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glalm.kernels.triton.launch import launch, multiprocessors, selective_scan_config
from glalm.kernels.triton.tiles import LN2, LOG2E, as_rows, dot_add, flushed_exp2, mask_channels, reciprocal

# A thread must own all numbers of a channel's state. Triton would give it several neighbouring channels, if it knew
# that these are aligned in memory. So it is not told the alignment of the pointers to channels.
UNALIGNED = [
    "x", "dt", "A", "skip", "z", "dt_bias", "y", "do", "initial", "final", "checkpoints", "segment_dt", "dfinal",
    "starts", "dx", "ddt", "dz", "dA", "dskip", "ddt_bias", "dstate",
]  # fmt: skip


# Launching --------------------------------------------------------------------------------------------------


class ScanPlan:
    """The sizes, strides and configuration of one call. `forward` and `backward` launch its kernels.

    Args:
        x: [B, T, D].
        dt: [B, T, D], or logits of it if dt_bias is not None.
        A: [D, N].
        B, C: [B, T, N].
        skip, dt_bias: [D] or None.
        z: [B, T, D] or None.
    """

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        skip: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        cu_seqlens: Tensor | None,
    ):
        self.rows, self.T, self.D = x.shape
        self.N = A.shape[1]
        self.NP = max(16, triton.next_power_of_2(self.N))
        self.tokens = self.rows * self.T
        self.config = selective_scan_config(x.device, self.N)
        self.x = as_rows(x)
        self.dt = as_rows(dt)
        self.z = None if z is None else as_rows(z)
        # The strides are the elements between two tokens.
        stride_z = self.D if self.z is None else self.z.stride(1)
        self.strides = {"STRIDE_X": self.x.stride(1), "STRIDE_DT": self.dt.stride(1), "STRIDE_Z": stride_z}
        self.A = (A.float() * LOG2E.value).T.contiguous()
        self.skip = None if skip is None else skip.float().contiguous()
        self.dt_bias = None if dt_bias is None else dt_bias.float().contiguous()
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.long().contiguous()
        self.sequences = self.rows if cu_seqlens is None else len(cu_seqlens) - 1
        self.BC = B, C

    def allocate(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=self.x.device, dtype=dtype)

    def arrange_coefficients(self) -> Tensor:
        """Return B and C, float32 [tokens + CELL, 2, NP]. The rows after the tokens are zeros for the last tile."""
        coefficients = self.allocate(self.tokens + self.config.forward.tile["CELL"], 2, self.NP)
        for i, x in enumerate(self.BC):
            coefficients[: self.tokens, i, : self.N] = x.reshape(self.tokens, self.N)
        coefficients[: self.tokens, :, self.N :] = 0
        coefficients[self.tokens :] = 0
        return coefficients

    def forward(self, initial: Tensor | None, save_for_backward: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return o [B, T, D], the final states [n, D, N], and the checkpoints if `save_for_backward`."""
        config = self.config.forward
        o = self.allocate(self.rows, self.T, self.D, dtype=self.x.dtype)
        checkpoints = self.allocate(*checkpoint_shape(self.x, self.A.mT)) if save_for_backward else None
        initial = self.transpose_state(initial)
        segments = self.count_segments(config)
        if segments == 1:
            final = self.launch_scan(1, initial, o, checkpoints)
            return o, final.mT.contiguous(), checkpoints
        starts, final = self.find_segment_starts(segments, initial, None)
        self.launch_scan(segments, starts, o, checkpoints)
        return o, final.mT.contiguous(), checkpoints

    def transpose_state(self, state: Tensor | None) -> Tensor | None:
        """Return float32 states [n, D, N] as the kernels store them, [n, N, D]."""
        return None if state is None else state.mT.contiguous()

    def count_segments(self, config) -> int:
        """Return how many segments a sequence of the mean length is cut into, so that enough programs fill the GPU."""
        programs = self.sequences * triton.cdiv(self.D, config.tile["BD"])
        wanted = multiprocessors(self.x.device) * max(1, 12 // config.warps)
        cells = self.tokens // max(1, self.sequences) // config.tile["CELL"]
        return max(1, min(wanted // max(1, programs), cells // 4))

    def find_segment_starts(self, segments: int, initial: Tensor | None, do: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the states that enter the segments [n * segments, N, D], and those that leave the last ones [n, N, D].

        With `do`, the walk is backward: these are the gradients of the states that leave the segments, and those of the
        initial states. Every segment runs from a zero state, in parallel; then the results are joined.
        """
        sums = self.allocate(self.sequences * segments, self.D)
        starts = self.launch_scan(segments, None, None, None, do=do, segment_dt=sums)
        final = self.allocate(self.sequences, self.N, self.D)
        constants = dict(D=self.D, N=self.N, BD=128, REVERSE=do is not None)
        programs = self.sequences * self.N * triton.cdiv(self.D, 128)
        args = starts, sums, self.A, initial, final, segments
        launch(selective_join_kernel, programs, args, constants, {"num_warps": 4})
        return starts, final

    def launch_scan(
        self,
        segments: int,
        initial: Tensor | None,
        o: Tensor | None,
        checkpoints: Tensor | None,
        do: Tensor | None = None,
        segment_dt: Tensor | None = None,
    ) -> Tensor:
        """Run selective_scan_kernel, and return the states that leave the segments, [n * segments, N, D]."""
        config = self.config.forward
        final = self.allocate(self.sequences * segments, self.N, self.D)
        args = (
            self.x, self.dt, self.A, self.arrange_coefficients(), self.skip, self.z, self.dt_bias,
            o, do, initial, final, checkpoints, segment_dt, self.cu_seqlens, self.T, segments,
        )  # fmt: skip
        constants = dict(
            D=self.D, N=self.N, NP=self.NP, **config.tile, **self.strides, STRIDE_DO=0 if do is None else do.stride(1)
        )
        programs = self.sequences * segments * triton.cdiv(self.D, config.tile["BD"])
        launch(selective_scan_kernel, programs, args, constants, config.options)
        return final

    def backward(
        self, initial: Tensor | None, checkpoints: Tensor, do: Tensor, dfinal: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, dt, A, B, C, skip, z, dt_bias and the initial states."""
        config = self.config.backward
        ROWS, BD, CELL = (config.tile[name] for name in ("ROWS", "BD", "CELL"))
        do = as_rows(do)
        initial = self.transpose_state(initial)
        dfinal = self.transpose_state(dfinal)
        segments = self.count_segments(config)
        dinitial = None
        if segments > 1:
            dfinal, dinitial = self.find_segment_starts(segments, dfinal, do)
        blocks = triton.cdiv(self.D, BD)
        walks = self.sequences * segments
        dx, ddt = (self.allocate(self.rows, self.T, self.D, dtype=like.dtype) for like in (self.x, self.dt))
        dz = None if self.z is None else self.allocate(self.rows, self.T, self.D, dtype=self.z.dtype)
        dBC = self.allocate(blocks, self.tokens, 2, self.NP)
        dA = self.allocate(walks, self.N, self.D)
        dskip = None if self.skip is None else self.allocate(walks, self.D)
        ddt_bias = None if self.dt_bias is None else self.allocate(walks, self.D)
        dstate = self.allocate(walks, self.N, self.D)
        starts = self.allocate(walks * blocks, CELL // ROWS, self.NP, BD)
        args = (
            self.x, self.dt, self.A, self.arrange_coefficients(), self.skip, self.z, self.dt_bias, do, initial,
            checkpoints, dfinal, starts, dx, ddt, dz, dBC, dA, dskip, ddt_bias, dstate, self.cu_seqlens, self.T,
            self.tokens, segments,
        )  # fmt: skip
        # For bfloat16, the products are rounded to bfloat16 before they are summed over channels in float32.
        half = self.x.dtype == torch.bfloat16
        constants = dict(
            D=self.D, N=self.N, NP=self.NP, **config.tile, **self.strides, STRIDE_DO=do.stride(1), HALF=half,
        )  # fmt: skip
        launch(selective_scan_backward_kernel, walks * blocks, args, constants, config.options)
        dB, dC = (y[:, : self.N].reshape(self.rows, self.T, self.N).clone() for y in dBC.sum(0).unbind(1))
        dskip, ddt_bias = (None if y is None else y.sum(0) for y in (dskip, ddt_bias))
        dinitial = dstate if dinitial is None else dinitial
        return dx, ddt, dA.sum(0).T, dB, dC, dskip, dz, ddt_bias, dinitial.mT


def checkpoint_shape(x: Tensor, A: Tensor) -> tuple[int, int, int]:
    """Return the shape of the states that are saved for the backward pass, without reading a value."""
    cell = selective_scan_config(x.device, A.shape[1]).forward.tile["CELL"]
    tokens = x.shape[0] * x.shape[1]
    return (tokens + cell - 1) // cell, A.shape[1], A.shape[0]


# Building blocks --------------------------------------------------------------------------------------------


@triton.jit
def load_rows(
    x, t0, begin, end, d,
    STRIDE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, REVERSE: tl.constexpr = False,
):  # fmt: skip
    """Load ROWS tokens from t0 on, or the same from the last one to the first, with zeros outside of the sequence."""
    x += t0.to(tl.int64) * STRIDE + d
    rows = ()
    for i in tl.static_range(ROWS):
        r = ROWS - 1 - i if REVERSE else i
        inside = (t0 + r >= begin) & (t0 + r < end)
        rows = rows + (tl.load(x + r * STRIDE, mask=mask_channels(inside, d, D, BD), other=0),)  # noqa: RUF005
    return rows


@triton.jit
def store_row(y, t0, r: tl.constexpr, inside, d, row, D: tl.constexpr, BD: tl.constexpr):
    """Store the channels of token t0 + r in rows of D channels."""
    p = y + t0.to(tl.int64) * D + d + r * D
    tl.store(p, row.to(y.dtype.element_ty), mask=mask_channels(inside, d, D, BD))


@triton.jit
def locate_state(d, D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    """Return the offsets of the states of channels d, [NP, BD], in a matrix [N, D], and their mask."""
    n = tl.arange(0, NP)[:, None]
    return n * D + d[None, :], (n < N) & (d < D)[None, :]


@triton.jit
def load_coefficients(coefficients, t0, r: tl.constexpr, i: tl.constexpr, NP: tl.constexpr):
    """Load B (i = 0) or C (i = 1) of token t0 + r, [NP, 1]."""
    return tl.load(coefficients + t0.to(tl.int64) * (2 * NP) + (2 * r + i) * NP + tl.arange(0, NP))[:, None]


@triton.jit
def compute_time_step(dt, bias, inside):
    """Return dt [BD], 0 outside of the sequence, and its derivative by the logits.

    dt holds logits of the time step if there is a bias [BD], and the time step itself otherwise.
    """
    dt = dt.to(tl.float32)
    slope = tl.full(dt.shape, 1.0, tl.float32)
    if bias is not None:
        logit = dt + bias
        e = flushed_exp2(-tl.abs(logit) * LOG2E)
        # log(1 + e) by the series of 2 artanh(e / (2 + e)), to the last bits of float32 also where e is small.
        s = e * reciprocal(2 + e)
        w = s * s
        series = 1 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13))))))
        dt = tl.where(inside, tl.maximum(logit, 0.0) + 2 * s * series, 0)
        slope = tl.where(logit > 0, 1.0, e) * reciprocal(1 + e)
    return dt, slope


@triton.jit
def compute_sigmoid(z):
    return reciprocal(1 + flushed_exp2(-z * LOG2E))


@triton.jit
def locate_walk(walk, T, segments, cu_seqlens, CELL: tl.constexpr):
    """Return the bounds of a program's sequence, and the first and last + 1 cell of its segment of it."""
    n = walk // segments
    segment = walk % segments
    if cu_seqlens is None:
        begin = (n * T).to(tl.int32)
        end = begin + T
    else:
        begin = tl.load(cu_seqlens + n).to(tl.int32)
        end = tl.load(cu_seqlens + n + 1).to(tl.int32)
    first = begin // CELL
    cells = tl.where(end > begin, tl.cdiv(end, CELL) - first, 0)
    per_segment = tl.cdiv(cells, segments)
    start = tl.minimum(segment * per_segment, cells)
    stop = tl.minimum(start + per_segment, cells)
    return begin, end, first + start, first + stop


@triton.jit
def advance(h, A, dt, w, coefficients, t0, r: tl.constexpr, NP: tl.constexpr):
    """Return the states after token t0 + r, and the factor of the states before it, [NP, BD]."""
    a = flushed_exp2(A * dt[None, :])
    return a * h + w[None, :] * load_coefficients(coefficients, t0, r, 0, NP), a


# Kernels ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "segments"], do_not_specialize_on_alignment=UNALIGNED)
def selective_scan_kernel(
    x, dt, A, coefficients, skip, z, dt_bias, y, do, initial, final, checkpoints, segment_dt, cu_seqlens, T, segments,
    D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, CELL: tl.constexpr,
    STRIDE_X: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_Z: tl.constexpr, STRIDE_DO: tl.constexpr,
):  # fmt: skip
    """Carry the states of BD channels through one segment (a run of cells) of one sequence in each program.

    Inputs:
        x, dt, z: rows of D channels at their strides; A: float32 [N, D], times log2(e)
        coefficients: float32 [tokens, 2, NP], B and C; skip, dt_bias: float32 [D] or None
        initial: float32 [sequences * segments, N, D] or None for zeros
        do: None; or the gradient of the output, to carry the gradients of states backward in time instead
    Outputs, of which all but `final` may be None:
        y: [tokens, D]; checkpoints: float32 [cells, N, D], the state before the first token of each cell
        final: float32 [sequences * segments, N, D]
        segment_dt: float32 [sequences * segments, D], the sum of dt

    Backward in time (do is not None), the carried gradient is that of the state before a token,
    g_t = exp(dt_t A) (g_{t+1} + C_t dy_t), and y is None.
    """
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    REVERSE: tl.constexpr = do is not None
    TILES: tl.constexpr = CELL // ROWS
    walk = tl.program_id(0) // BLOCKS
    d = tl.program_id(0) % BLOCKS * BD + tl.arange(0, BD)
    channel = d < D
    begin, end, first_cell, last_cell = locate_walk(walk, T, segments, cu_seqlens, CELL)
    at, valid = locate_state(d, D, N, NP)
    of_walk = walk.to(tl.int64) * N * D
    A_tile = tl.load(A + at, mask=valid, other=0)
    h = tl.zeros([NP, BD], tl.float32)
    if initial is not None:
        h = tl.load(initial + of_walk + at, mask=valid, other=0)
    bias = None if dt_bias is None else tl.load(dt_bias + d, mask=channel, other=0)
    skip_factor = None if skip is None else tl.load(skip + d, mask=channel, other=0)
    total_dt = tl.zeros([BD], tl.float32)

    first = tl.maximum(first_cell * TILES, begin // ROWS)
    last = tl.minimum(last_cell * TILES, tl.cdiv(end, ROWS)) - 1
    STEP: tl.constexpr = -ROWS if REVERSE else ROWS
    t0 = (last if REVERSE else first) * ROWS
    dt_ahead = load_rows(dt, t0, begin, end, d, STRIDE_DT, D, ROWS, BD, REVERSE)
    if REVERSE:
        x_ahead = load_rows(do, t0, begin, end, d, STRIDE_DO, D, ROWS, BD, REVERSE)
    else:
        x_ahead = load_rows(x, t0, begin, end, d, STRIDE_X, D, ROWS, BD, REVERSE)
    z_ahead = ()
    if z is not None:
        z_ahead = load_rows(z, t0, begin, end, d, STRIDE_Z, D, ROWS, BD, REVERSE)
    for _ in range(first, last + 1):
        dt_rows = dt_ahead
        x_rows = x_ahead
        z_rows = z_ahead
        dt_ahead = load_rows(dt, t0 + STEP, begin, end, d, STRIDE_DT, D, ROWS, BD, REVERSE)
        if REVERSE:
            x_ahead = load_rows(do, t0 + STEP, begin, end, d, STRIDE_DO, D, ROWS, BD, REVERSE)
        else:
            x_ahead = load_rows(x, t0 + STEP, begin, end, d, STRIDE_X, D, ROWS, BD, REVERSE)
        if z is not None:
            z_ahead = load_rows(z, t0 + STEP, begin, end, d, STRIDE_Z, D, ROWS, BD, REVERSE)
        if checkpoints is not None:  # noqa: SIM102 (a compile-time condition)
            if (t0 % CELL == 0) & (t0 >= begin):
                tl.store(checkpoints + (t0 // CELL).to(tl.int64) * N * D + at, h, mask=valid)
        for i in tl.static_range(ROWS):
            t = t0 + (ROWS - 1 - i if REVERSE else i)
            inside = (t >= begin) & (t < end)
            dt_t, _ = compute_time_step(dt_rows[i], bias, inside)
            if segment_dt is not None:
                total_dt += dt_t
            x_t = x_rows[i].to(tl.float32)
            if REVERSE:
                if z is not None:
                    gate = z_rows[i].to(tl.float32)
                    x_t *= gate * compute_sigmoid(gate)
                C = load_coefficients(coefficients, t0, ROWS - 1 - i, 1, NP)
                h = flushed_exp2(A_tile * dt_t[None, :]) * (h + x_t[None, :] * C)
            else:
                h, _ = advance(h, A_tile, dt_t, x_t * dt_t, coefficients, t0, i, NP)
            if y is not None:
                y_t = tl.sum(h * load_coefficients(coefficients, t0, i, 1, NP), 0)
                if skip is not None:
                    y_t += x_t * skip_factor
                if z is not None:
                    gate = z_rows[i].to(tl.float32)
                    y_t *= gate * compute_sigmoid(gate)
                store_row(y, t0, i, inside, d, y_t, D, BD)
        t0 += STEP
    tl.store(final + of_walk + at, h, mask=valid)
    if segment_dt is not None:
        tl.store(segment_dt + walk.to(tl.int64) * D + d, total_dt, mask=channel)


@triton.jit(do_not_specialize=["segments"])
def selective_join_kernel(
    local, segment_dt, A, initial, final, segments,
    D: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Replace each segment's final state, computed from a zero initial state, by its true initial state.

    local: float32 [sequences * segments, N, D], overwritten; segment_dt: float32 [sequences * segments, D]. `final`
    receives the state after the last segment. One program handles one of the N states of BD channels.
    """
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    d = tl.program_id(0) % BLOCKS * BD + tl.arange(0, BD)
    n = tl.program_id(0) // BLOCKS % N
    sequence = (tl.program_id(0) // BLOCKS // N).to(tl.int64)
    mask = d < D
    at = (sequence * N + n) * D + d
    A_n = tl.load(A + n * D + d, mask=mask, other=0)
    h = tl.zeros([BD], tl.float32)
    if initial is not None:
        h = tl.load(initial + at, mask=mask, other=0)
    for i in range(segments):
        walk = sequence * segments + (segments - 1 - i if REVERSE else i)
        p = local + (walk * N + n) * D + d
        local_end = tl.load(p, mask=mask, other=0)
        tl.store(p, h, mask=mask)
        h = h * tl.exp2(A_n * tl.load(segment_dt + walk * D + d, mask=mask, other=0)) + local_end
    tl.store(final + at, h, mask=mask)


@triton.jit(do_not_specialize=["T", "tokens", "segments"], do_not_specialize_on_alignment=UNALIGNED)
def selective_scan_backward_kernel(
    x, dt, A, coefficients, skip, z, dt_bias, do, initial, checkpoints, dfinal, starts, dx, ddt, dz, dcoefficients, dA,
    dskip, ddt_bias, dstate, cu_seqlens, T, tokens, segments,
    D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, CELL: tl.constexpr,
    STRIDE_X: tl.constexpr, STRIDE_DT: tl.constexpr, STRIDE_Z: tl.constexpr, STRIDE_DO: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of BD channels in one segment of one sequence in each program, from its last cell on.

    Inputs: as for selective_scan_kernel; do at its stride; dfinal: float32 [sequences * segments, N, D] or None, the
    gradient of the states that leave the segments. `initial` has one state per sequence, [sequences, N, D].
    Scratch: starts, float32 [programs, CELL / ROWS, NP, BD], the states that enter the tiles of a cell.
    Outputs:
        dx, ddt, dz: [tokens, D]
        dcoefficients: float32 [blocks of channels, tokens, 2, NP], the shares of dB and dC
        dA: float32 [sequences * segments, N, D]; dskip, ddt_bias: float32 [sequences * segments, D]
        dstate: as `dA`, the gradient of the states that enter the segments
    """
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    TILES: tl.constexpr = CELL // ROWS
    walk = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    d = block * BD + tl.arange(0, BD)
    channel = d < D
    begin, end, first_cell, last_cell = locate_walk(walk, T, segments, cu_seqlens, CELL)
    at, valid = locate_state(d, D, N, NP)
    of_walk = walk.to(tl.int64) * N * D
    of_sequence = (walk // segments).to(tl.int64) * N * D
    starts += tl.program_id(0).to(tl.int64) * (TILES * NP * BD)
    in_scratch = tl.arange(0, NP)[:, None] * BD + tl.arange(0, BD)[None, :]
    dcoefficients += block.to(tl.int64) * tokens * (2 * NP)
    A_tile = tl.load(A + at, mask=valid, other=0)
    g = tl.zeros([NP, BD], tl.float32)  # the gradient of the state before the last token seen
    if dfinal is not None:
        g = tl.load(dfinal + of_walk + at, mask=valid, other=0)
    sum_dA = tl.zeros([NP, BD], tl.float32)
    bias = None if dt_bias is None else tl.load(dt_bias + d, mask=channel, other=0)
    skip_factor = None if skip is None else tl.load(skip + d, mask=channel, other=0)
    sum_dskip = tl.zeros([BD], tl.float32)
    sum_ddt = tl.zeros([BD], tl.float32)

    for back in range(last_cell - first_cell):
        cell = last_cell - 1 - back
        # The state comes from the checkpoint, or from before the sequence if that starts within this cell.
        saved = (d < tl.where(cell * CELL >= begin, D, 0))[None, :]
        h = tl.load(checkpoints + cell.to(tl.int64) * N * D + at, mask=valid & saved, other=0)
        if initial is not None:
            h += tl.load(initial + of_sequence + at, mask=valid & (saved == 0), other=0)
        first = tl.maximum(cell * TILES, begin // ROWS)
        last = tl.minimum((cell + 1) * TILES, tl.cdiv(end, ROWS)) - 1
        dt_ahead = load_rows(dt, first * ROWS, begin, end, d, STRIDE_DT, D, ROWS, BD)
        x_ahead = load_rows(x, first * ROWS, begin, end, d, STRIDE_X, D, ROWS, BD)
        for i in range(last - first):
            tl.store(starts + i * (NP * BD) + in_scratch, h)
            t0 = (first + i) * ROWS
            dt_rows = dt_ahead
            x_rows = x_ahead
            dt_ahead = load_rows(dt, t0 + ROWS, begin, end, d, STRIDE_DT, D, ROWS, BD)
            x_ahead = load_rows(x, t0 + ROWS, begin, end, d, STRIDE_X, D, ROWS, BD)
            for r in tl.static_range(ROWS):
                t = t0 + r
                dt_t, _ = compute_time_step(dt_rows[r], bias, t >= begin)
                h, _ = advance(h, A_tile, dt_t, x_rows[r].to(tl.float32) * dt_t, coefficients, t0, r, NP)
        tl.debug_barrier()  # The states that the threads stored are loaded below.

        t0 = last * ROWS
        dt_ahead = load_rows(dt, t0, begin, end, d, STRIDE_DT, D, ROWS, BD)
        x_ahead = load_rows(x, t0, begin, end, d, STRIDE_X, D, ROWS, BD)
        do_ahead = load_rows(do, t0, begin, end, d, STRIDE_DO, D, ROWS, BD)
        z_ahead = ()
        if z is not None:
            z_ahead = load_rows(z, t0, begin, end, d, STRIDE_Z, D, ROWS, BD)
        for i in range(last + 1 - first):
            if i > 0:
                h = tl.load(starts + (last - first - i) * (NP * BD) + in_scratch)
            dt_rows = dt_ahead
            x_rows = x_ahead
            do_rows = do_ahead
            z_rows = z_ahead
            dt_ahead = load_rows(dt, t0 - ROWS, begin, end, d, STRIDE_DT, D, ROWS, BD)
            x_ahead = load_rows(x, t0 - ROWS, begin, end, d, STRIDE_X, D, ROWS, BD)
            do_ahead = load_rows(do, t0 - ROWS, begin, end, d, STRIDE_DO, D, ROWS, BD)
            if z is not None:
                z_ahead = load_rows(z, t0 - ROWS, begin, end, d, STRIDE_Z, D, ROWS, BD)
            states = (h,)
            factors = ()
            for r in tl.static_range(ROWS):
                t = t0 + r
                dt_t, _ = compute_time_step(dt_rows[r], bias, (t >= begin) & (t < end))
                h, a = advance(h, A_tile, dt_t, x_rows[r].to(tl.float32) * dt_t, coefficients, t0, r, NP)
                states = states + (h,)  # noqa: RUF005
                factors = factors + (a,)  # noqa: RUF005
            # Columns 2 r and 2 r + 1 are dB and dC of token t0 + r.
            shares = tl.zeros([BD // 32 if HALF else 1, NP, 8], tl.float32)
            for r in tl.static_range(ROWS - 1, -1, -1):
                t = t0 + r
                inside = (t >= begin) & (t < end)
                dt_t, slope = compute_time_step(dt_rows[r], bias, inside)
                x_t = x_rows[r].to(tl.float32)
                do_t = do_rows[r].to(tl.float32)
                dy = do_t
                if z is not None:
                    gate = z_rows[r].to(tl.float32)
                    sigmoid = compute_sigmoid(gate)
                    dy = do_t * (gate * sigmoid)
                B = load_coefficients(coefficients, t0, r, 0, NP)
                C = load_coefficients(coefficients, t0, r, 1, NP)
                dh = g + dy[None, :] * C
                shares = insert_sums_over_channels(
                    shares, dh * (x_t * dt_t)[None, :], states[r + 1] * dy[None, :], r, NP, BD, HALF
                )  # fmt: skip
                dw = tl.sum(dh * B, 0)
                g = factors[r] * dh
                da = g * states[r]  # of log a
                sum_dA += da * dt_t[None, :]
                ddt_t = (dw * x_t + tl.sum(da * A_tile, 0) * LN2) * slope
                store_row(ddt, t0, r, inside, d, ddt_t, D, BD)
                sum_ddt += tl.where(inside, ddt_t, 0)
                dx_t = dw * dt_t
                if skip is not None:
                    dx_t += dy * skip_factor
                    sum_dskip += dy * x_t
                store_row(dx, t0, r, inside, d, dx_t, D, BD)
                if z is not None:
                    y_t = tl.sum(states[r + 1] * C, 0)
                    if skip is not None:
                        y_t += x_t * skip_factor
                    store_row(dz, t0, r, inside, d, do_t * y_t * (sigmoid * (1 + gate * (1 - sigmoid))), D, BD)
            column = tl.arange(0, 8)[None, :]
            t = t0 + column // 2
            p = t0.to(tl.int64) * (2 * NP) + column * NP + tl.arange(0, NP)[:, None]
            mask = (column < 2 * ROWS) & (t >= begin) & (t < end)
            tl.store(dcoefficients + p, tl.sum(shares, 0), mask=mask)
            t0 -= ROWS
        tl.debug_barrier()
    tl.store(dA + of_walk + at, sum_dA, mask=valid)
    tl.store(dstate + of_walk + at, g, mask=valid)
    if dskip is not None:
        tl.store(dskip + walk.to(tl.int64) * D + d, sum_dskip, mask=channel)
    if ddt_bias is not None:
        tl.store(ddt_bias + walk.to(tl.int64) * D + d, sum_ddt, mask=channel)


@triton.jit
def insert_sums_over_channels(
    shares, for_B, for_C, r: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Set columns 2 r and 2 r + 1 of `shares` to the sums over channels of two tiles [NP, BD].

    `shares` is [BD / 32, NP, 8] if HALF, sums over 32 channels each, and else [1, NP, 8].
    """
    column = tl.arange(0, 8)[None, None, :]
    if HALF:
        # One matmul takes both, as neighbours in a thread's registers, times a matrix that tells them apart.
        pairs = pair_up(for_B, for_C, NP, BD).to(tl.bfloat16)
        pairs = tl.permute(tl.reshape(pairs, [NP, BD // 32, 64]), [1, 0, 2])
        chosen = tl.where(column % 2 == tl.arange(0, 64)[None, :, None] % 2, 1.0, 0.0).to(tl.bfloat16)
        chosen = tl.broadcast_to(chosen, [BD // 32, 64, 8])
        sums = dot_add(pairs, chosen, tl.zeros(shares.shape, tl.float32), "ieee")
    else:
        sums = tl.where(column % 2 == 0, tl.sum(for_B, 1)[None, :, None], tl.sum(for_C, 1)[None, :, None])
    return tl.where(column // 2 == r, sums, shares)


@triton.jit
def pair_up(x, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return [ROWS, COLUMNS, 2]. For tl.join, Triton would choose a slower layout of a matmul's operands."""
    x = tl.broadcast_to(tl.reshape(x, [ROWS, COLUMNS, 1]), [ROWS, COLUMNS, 2])
    y = tl.broadcast_to(tl.reshape(y, [ROWS, COLUMNS, 1]), [ROWS, COLUMNS, 2])
    return tl.where(tl.arange(0, 2)[None, None, :] == 0, x, y)
