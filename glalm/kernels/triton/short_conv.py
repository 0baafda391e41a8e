"""A causal depthwise convolution of a few taps with a SiLU on a GPU: one kernel forward and one backward.

    u_t = bias + sum_{i < TAPS} weight_i x_{t - TAPS + 1 + i},   y_t = silu(u_t)
    g_t = dy_t silu'(u_t),   dx_t = sum_i weight_i g_{t + TAPS - 1 - i},   dweight_i = sum_t g_t x_{t - TAPS + 1 + i}

A program owns BD channels of C consecutive tokens, and walks along them, through the parts of all sequences in there. A
row, the BD channels of a token, lies in registers, as do the last TAPS - 1 rows before it: every number is loaded once,
but for TAPS - 1 rows where chunks meet, and the gradients of the weights are sums within a thread. ROWS rows are loaded
at a time, one such tile ahead.

The backward pass also walks from the first token to the last. Once it knows g_t, it stores dx_{t - TAPS + 1}. So for
its part of a sequence it also needs g of the TAPS - 1 tokens after it. The first TAPS - 1 results of a sequence belong
to the inputs before it: they are the gradient of the initial state. Each program writes its share of the weights'
gradients; a sum in fixed order follows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glalm.kernels.triton.launch import LaunchConfig, conv_config, launch, multiprocessors
from glalm.kernels.triton.tiles import LN2, LOG2E, as_rows, flushed_exp2, mask_channels, reciprocal


class ConvPlan:
    """The sizes and configuration of one call.

    Args:
        x: [B, T, D].
        weight: [D, TAPS].
        bias: [D] or None.
        initial: [N, TAPS - 1, D] or None.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, cu_seqlens: Tensor | None
    ):
        self.B, self.T, self.D = x.shape
        self.taps = weight.shape[1]
        self.x = as_rows(x)
        self.weight = weight.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.initial = None if initial is None else initial.contiguous()
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.long().contiguous()
        self.sequences = self.B if cu_seqlens is None else len(cu_seqlens) - 1

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return y [B, T, D] and the last TAPS - 1 inputs of every sequence, [N, TAPS - 1, D]."""
        config = conv_config(self.x.device).forward
        y = torch.empty((self.B, self.T, self.D), device=self.x.device, dtype=self.x.dtype)
        constants = self.cut(config)
        final = self.allocate_state(self.initial)
        args = (
            self.x, self.weight, self.bias, self.initial, y, final, self.cu_seqlens, self.sequences, self.T,
            self.B * self.T,
        )  # fmt: skip
        launch(conv_kernel, self.chunks(constants) * self.blocks(constants), args, constants, config.options)
        return y, final

    def backward(self, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of x, weight, bias and the initial states."""
        config = conv_config(self.x.device).backward
        dx = torch.empty((self.B, self.T, self.D), device=self.x.device, dtype=self.x.dtype)
        dy = as_rows(dy)
        dfinal = None if dfinal is None else dfinal.contiguous()
        constants = self.cut(config)
        chunks = self.chunks(constants)
        dinitial = None if self.initial is None else self.allocate_state(dfinal)
        shares = torch.empty((chunks, self.taps + 1, self.D), device=self.x.device, dtype=torch.float32)
        args = (
            self.x, self.weight, self.bias, self.initial, dy, dfinal, dx, shares, dinitial, self.cu_seqlens,
            self.sequences, self.T, self.B * self.T,
        )  # fmt: skip
        options = {"STRIDE_DY": dy.stride(1)}
        launch(
            conv_backward_kernel, chunks * self.blocks(constants), args, {**constants, **options}, config.options
        )  # fmt: skip
        dweight = torch.empty_like(self.weight)
        dbias = None if self.bias is None else torch.empty_like(self.bias)
        sizes = dict(D=self.D, TAPS=self.taps, BD=64, ROWS=64)
        programs = (self.taps + 1) * triton.cdiv(self.D, sizes["BD"])
        launch(sum_shares_kernel, programs, (shares, dweight, dbias, chunks), sizes, {"num_warps": 4})
        return dx, dweight, dbias, dinitial

    def cut(self, config: LaunchConfig) -> dict[str, int]:
        """Return the kernels' constants. Where there is little work, C is smaller than in the configuration."""
        BD, C = config.tile["BD"], config.tile["C"]
        wanted = 12 * multiprocessors(self.x.device) // config.warps
        while C > 64 and self.B * self.T // C * triton.cdiv(self.D, BD) < wanted:
            C //= 2
        return dict(D=self.D, TAPS=self.taps, ROWS=config.tile["ROWS"], BD=BD, C=C, STRIDE=self.x.stride(1))

    def chunks(self, constants: dict[str, int]) -> int:
        return triton.cdiv(self.B * self.T, constants["C"])

    def blocks(self, constants: dict[str, int]) -> int:
        return triton.cdiv(self.D, constants["BD"])

    def allocate_state(self, like: Tensor | None) -> Tensor:
        """Return a buffer for states. If sequences may be empty, it holds `like` or zeros, which are their states."""
        shape = self.sequences, self.taps - 1, self.D
        if self.cu_seqlens is None and self.T > 0:
            return torch.empty(shape, device=self.x.device, dtype=self.x.dtype)
        return self.x.new_zeros(shape) if like is None else like.to(self.x.dtype, copy=True)


# Building blocks --------------------------------------------------------------------------------------------


@triton.jit
def find_sequence(t, N, T, cu_seqlens):
    """Return the sequence that holds token t: the last one that begins at or before t, so never an empty one."""
    if cu_seqlens is None:
        n = t // T
    else:
        n = t * 0
        after = n + N
        while after - n > 1:
            middle = (n + after) // 2
            starts_before = tl.load(cu_seqlens + middle) <= t
            n = tl.where(starts_before, middle, n)
            after = tl.where(starts_before, after, middle)
    return n


@triton.jit
def find_bounds(n, T, cu_seqlens):
    """Return the first token of a sequence, and its last + 1."""
    if cu_seqlens is None:
        begin = n * T
        end = begin + T
    else:
        begin = tl.load(cu_seqlens + n).to(tl.int32)
        end = tl.load(cu_seqlens + n + 1).to(tl.int32)
    return begin, end


@triton.jit
def load_channel(p, d, D: tl.constexpr):
    return tl.load(p, mask=d < D, other=0).to(tl.float32)


@triton.jit
def load_parameters(weight, bias, d, D: tl.constexpr, TAPS: tl.constexpr):
    """Return the weights of the taps and the bias, times -log2(e)."""
    weights = ()
    for i in tl.static_range(TAPS):
        weights = weights + (load_channel(weight + d * TAPS + i, d, D) * -LOG2E,)  # noqa: RUF005 (here and below,
        # Triton has no starred expressions)
    offset = tl.zeros(d.shape, tl.float32)
    if bias is not None:
        offset = load_channel(bias + d, d, D) * -LOG2E
    return weights, offset


@triton.jit
def load_input(x, initial, n, t, begin, d, D: tl.constexpr, TAPS: tl.constexpr, BD: tl.constexpr, STRIDE: tl.constexpr):
    """Load the input at token t in float32: before the sequence it is that of the initial state, or 0."""
    row = tl.load(x + t.to(tl.int64) * STRIDE + d, mask=mask_channels(t >= begin, d, D, BD), other=0).to(tl.float32)
    if initial is not None:
        p = initial + (n.to(tl.int64) * (TAPS - 1) + TAPS - 1 + t - begin) * D + d
        row += tl.load(p, mask=mask_channels(t < begin, d, D, BD), other=0).to(tl.float32)
    return row


@triton.jit
def load_past(x, initial, n, t, begin, d, D: tl.constexpr, TAPS: tl.constexpr, BD: tl.constexpr, STRIDE: tl.constexpr):
    """Return the TAPS - 1 inputs before token t, the oldest first."""
    past = ()
    for i in tl.static_range(TAPS - 1):
        row = load_input(x, initial, n, t - (TAPS - 1) + i, begin, d, D, TAPS, BD, STRIDE)
        past = past + (row,)  # noqa: RUF005
    return past


@triton.jit
def load_rows(p, count, d, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, STRIDE: tl.constexpr):
    """Load ROWS rows from p on, with zeros from row `count` on."""
    rows = ()
    for r in tl.static_range(ROWS):
        rows = rows + (tl.load(p + r * STRIDE, mask=mask_channels(r < count, d, D, BD), other=0),)  # noqa: RUF005
    return rows


@triton.jit
def convolve(window, weights, offset, TAPS: tl.constexpr):
    """Return v = -log2(e) u of the window's last token, and sigmoid(u) = 1 / (1 + 2^v)."""
    v = offset
    for i in tl.static_range(TAPS):
        v += window[i] * weights[i]
    return v, reciprocal(1 + flushed_exp2(v))


# Kernels ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "T", "tokens"])
def conv_kernel(
    x, weight, bias, initial, y, final, cu_seqlens, N, T, tokens,
    D: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Convolve BD channels of C tokens in each program. The last token of a sequence also brings its final state.

    x: rows of D channels at distance STRIDE; weight: [D, TAPS]; bias: [D] or None
    initial: [N, TAPS - 1, D] or None; y: [tokens, D]; final: [N, TAPS - 1, D]
    """
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    d = tl.program_id(0) % BLOCKS * BD + tl.arange(0, BD)
    t = tl.program_id(0) // BLOCKS * C
    stop = tl.minimum(t + C, tokens)
    weights, offset = load_parameters(weight, bias, d, D, TAPS)
    n = find_sequence(t, N, T, cu_seqlens)
    while (t < stop) & (n < N):
        begin, end = find_bounds(n, T, cu_seqlens)
        rows = tl.minimum(end, stop) - t
        past = load_past(x, initial, n, t, begin, d, D, TAPS, BD, STRIDE)
        x_part = x + t.to(tl.int64) * STRIDE + d
        y_part = y + t.to(tl.int64) * D + d
        ahead = load_rows(x_part, rows, d, D, ROWS, BD, STRIDE)
        for i in range(0, rows, ROWS):
            tile = ahead
            ahead = load_rows(x_part + (i + ROWS) * STRIDE, rows - i - ROWS, d, D, ROWS, BD, STRIDE)
            for r in tl.static_range(ROWS):
                window = past + (tile[r].to(tl.float32),)  # noqa: RUF005
                past = window[1:]
                v, sigmoid = convolve(window, weights, offset, TAPS)
                mask = mask_channels(i + r < rows, d, D, BD)
                tl.store(y_part + (i + r) * D, (v * (sigmoid * -LN2)).to(y.dtype.element_ty), mask=mask)
        if t + rows == end:
            for m in range(TAPS - 1):
                last = load_input(x, initial, n, end - (TAPS - 1) + m, begin, d, D, TAPS, BD, STRIDE)
                p = final + (n.to(tl.int64) * (TAPS - 1) + m) * D + d
                tl.store(p, last.to(final.dtype.element_ty), mask=d < D)
        t += rows
        n += 1


@triton.jit(do_not_specialize=["N", "T", "tokens"])
def conv_backward_kernel(
    x, weight, bias, initial, dy, dfinal, dx, shares, dinitial, cu_seqlens, N, T, tokens,
    D: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr,
    STRIDE_DY: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of BD channels of C tokens in each program.

    dy: rows at distance STRIDE_DY; dfinal, dinitial: [N, TAPS - 1, D] or None; dx: [tokens, D]
    shares: float32 [programs / blocks of channels, TAPS + 1, D], shares of the gradients of the weights and the bias
    """
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    LAG: tl.constexpr = TAPS - 1
    d = tl.program_id(0) % BLOCKS * BD + tl.arange(0, BD)
    chunk = tl.program_id(0) // BLOCKS
    t = chunk * C
    stop = tl.minimum(t + C, tokens)
    weights, offset = load_parameters(weight, bias, d, D, TAPS)
    n = find_sequence(t, N, T, cu_seqlens)
    sums = make_zeros(TAPS + 1, BD)
    while (t < stop) & (n < N):
        begin, end = find_bounds(n, T, cu_seqlens)
        rows = tl.minimum(end, stop) - t
        past = load_past(x, initial, n, t, begin, d, D, TAPS, BD, STRIDE)
        x_part = x + t.to(tl.int64) * STRIDE + d
        dy_part = dy + t.to(tl.int64) * STRIDE_DY + d
        dx_part = dx + t.to(tl.int64) * D + d
        state_gradients = n.to(tl.int64) * LAG * D + d
        x_first = load_rows(x_part, end - t, d, D, LAG, BD, STRIDE)
        dy_first = load_rows(dy_part, end - t, d, D, LAG, BD, STRIDE_DY)
        # From here on, pointers and loads are LAG tokens ahead. The program adds these tokens' products to the weights'
        # gradients, in place of those of its own first LAG tokens. Beyond the sequence dy is loaded as 0, so g is 0.
        x_part += LAG * STRIDE
        dy_part += LAG * STRIDE_DY
        later = tl.minimum(end - t - LAG, rows)
        x_ahead = load_rows(x_part, later, d, D, ROWS, BD, STRIDE)
        dy_ahead = load_rows(dy_part, later, d, D, ROWS, BD, STRIDE_DY)

        g = make_zeros(LAG, BD)
        new_sums = sums
        for r in tl.static_range(LAG):
            window = past + (x_first[r].to(tl.float32),)  # noqa: RUF005
            past = window[1:]
            g = g + (differentiate_activation(window, weights, offset, dy_first[r], TAPS),)  # noqa: RUF005
            new_sums = add_products(new_sums, g[LAG], window, TAPS)
            if dinitial is not None:
                row = convolve_gradients(g, weights, TAPS)
                row = add_final_gradient(row, dfinal, state_gradients, t + r - end, d, D, TAPS, BD)
                p = dinitial + state_gradients + r * D
                tl.store(p, row.to(dinitial.dtype.element_ty), mask=mask_channels(t == begin, d, D, BD))
            g = g[1:]
        # Within a sequence, the program before this one has counted them.
        sums = choose(t == begin, new_sums, sums, TAPS + 1)

        for i in range(0, rows, ROWS):
            x_tile = x_ahead
            dy_tile = dy_ahead
            x_ahead = load_rows(x_part + (i + ROWS) * STRIDE, later - i - ROWS, d, D, ROWS, BD, STRIDE)
            dy_ahead = load_rows(dy_part + (i + ROWS) * STRIDE_DY, later - i - ROWS, d, D, ROWS, BD, STRIDE_DY)
            for r in tl.static_range(ROWS):
                window = past + (x_tile[r].to(tl.float32),)  # noqa: RUF005
                past = window[1:]
                g = g + (differentiate_activation(window, weights, offset, dy_tile[r], TAPS),)  # noqa: RUF005
                sums = add_products(sums, g[LAG], window, TAPS)
                row = convolve_gradients(g, weights, TAPS)
                row = add_final_gradient(row, dfinal, state_gradients, t + LAG + i + r - end, d, D, TAPS, BD)
                mask = mask_channels(i + r < rows, d, D, BD)
                tl.store(dx_part + (i + r) * D, row.to(dx.dtype.element_ty), mask=mask)
                g = g[1:]
        t += rows
        n += 1
    for i in tl.static_range(TAPS + 1):
        tl.store(shares + (chunk.to(tl.int64) * (TAPS + 1) + i) * D + d, sums[i] * -LOG2E, mask=d < D)


@triton.jit
def make_zeros(COUNT: tl.constexpr, BD: tl.constexpr):
    rows = ()
    for _ in tl.static_range(COUNT):
        rows = rows + (tl.zeros([BD], tl.float32),)  # noqa: RUF005
    return rows


@triton.jit
def differentiate_activation(window, weights, offset, dy, TAPS: tl.constexpr):
    """Return g times -ln(2), because `weights` and `offset` are times -log2(e)."""
    v, sigmoid = convolve(window, weights, offset, TAPS)
    # silu'(u) = sigmoid (1 + u (1 - sigmoid)), u = -ln(2) v
    return (dy.to(tl.float32) * sigmoid) * (v * (LN2 * LN2 - sigmoid * (LN2 * LN2)) - LN2)


@triton.jit
def add_products(sums, g, window, TAPS: tl.constexpr):
    """Add the products of g with the rows of a window to the gradients of the weights, and g to that of the bias."""
    added = ()
    for i in tl.static_range(TAPS):
        added = added + (sums[i] + g * window[i],)  # noqa: RUF005
    return added + (sums[TAPS] + g,)  # noqa: RUF005


@triton.jit
def convolve_gradients(g, weights, TAPS: tl.constexpr):
    """Return dx of the token of g[0], from its g and the g of the TAPS - 1 tokens after it."""
    row = g[0] * weights[TAPS - 1]
    for i in tl.static_range(1, TAPS):
        row += g[i] * weights[TAPS - 1 - i]
    return row


@triton.jit
def add_final_gradient(row, dfinal, state_gradients, m, d, D: tl.constexpr, TAPS: tl.constexpr, BD: tl.constexpr):
    """Add row m of the gradient of the final state, which holds the last inputs, if there is such a row."""
    if dfinal is not None:
        mask = mask_channels((m >= 0) & (m < TAPS - 1), d, D, BD)
        row += tl.load(dfinal + state_gradients + m * D, mask=mask, other=0).to(tl.float32)
    return row


@triton.jit
def choose(condition, these, others, COUNT: tl.constexpr):
    """Return these rows if a scalar condition holds, and the others if not."""
    chosen = ()
    for i in tl.static_range(COUNT):
        chosen = chosen + (tl.where(condition, these[i], others[i]),)  # noqa: RUF005
    return chosen


@triton.jit(do_not_specialize=["chunks"])
def sum_shares_kernel(
    shares, dweight, dbias, chunks, D: tl.constexpr, TAPS: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr
):
    """Sum the shares [chunks, TAPS + 1, D] of one tap, or of the bias, and BD channels in each program.

    dweight: [D, TAPS]; dbias: [D] or None
    """
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    d = tl.program_id(0) % BLOCKS * BD + tl.arange(0, BD)
    tap = tl.program_id(0) // BLOCKS
    r = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BD], tl.float32)
    for first in range(0, chunks, ROWS):
        chunk = (first + r).to(tl.int64)[:, None]
        mask = (chunk < chunks) & (d < D)[None, :]
        total += tl.load(shares + (chunk * (TAPS + 1) + tap) * D + d[None, :], mask=mask, other=0)
    summed = tl.sum(total, 0)
    if tap < TAPS:
        tl.store(dweight + d * TAPS + tap, summed.to(dweight.dtype.element_ty), mask=d < D)
    elif dbias is not None:
        tl.store(dbias + d, summed.to(dbias.dtype.element_ty), mask=d < D)
