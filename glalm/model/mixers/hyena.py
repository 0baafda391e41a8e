"""Hyena (Poli et al., arXiv 2302.10866)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm.config.strict import require, require_positive
from glalm.kernels import long_convolution
from glalm.kernels.common import at_least_float32, sequence_ids, without_autocast
from glalm.model.layers import ParameterUses, SumOver
from glalm.model.mixers.base import Mixer, append_inputs, convolution_flops, keep_last, mix_unpacked

# The taps of a channel are multiplied by exp(-rate t), where t is 1 at the last tap. The rates of the channels lie
# between those that bring the taps down to DECAY_TARGET at these two values of t.
DECAY_TARGET = 1e-2
FASTEST_REACH = 0.3
SLOWEST_REACH = 1.5
# The lowest frequency of the positions' sines, so that none is constant.
LOWEST_BAND = 1e-4

State = tuple[Tensor, Tensor]


@dataclass
class HyenaOptions:
    """The keys model.hyena.*."""

    filter_length: int = 2048  # taps of the long filter: a token sees itself and the filter_length - 1 tokens before it
    filter_width: int = 64  # hidden width of the network that computes the taps
    filter_features: int = 33  # odd; the network reads a tap's position, and its sine and cosine at so many frequencies
    filter_frequency: float = 14.0  # initial factor in the sines that are the network's nonlinearity
    short_conv: int = 3  # taps of the causal convolution over q, k and v

    def __post_init__(self):
        require_positive(
            self, "model.hyena", "filter_length", "filter_width", "filter_frequency", "short_conv", finite=True
        )
        require(
            self.filter_features > 1 and self.filter_features % 2 == 1,
            f"model.hyena.filter_features must be odd and at least 3, not {self.filter_features}: a position, and a "
            "sine and a cosine for each frequency",
        )


class Hyena(Mixer):
    """The Hyena operator of order 2: two gates around a long convolution h of each channel.

        q, k, v = short_conv(x W + b),   u = k * v,   o_t = D * u_t + sum_{0 <= i < L} h_i * u_{t-i}
        y_t = (q_t * o_t) W_o + b_o

    A small network computes the taps h_i from their positions i (ImplicitFilter). As in the authors' code, the first of
    the paper's two convolutions is the short one. Taps end at L = model.hyena.filter_length, in the paper the training
    length, so texts of any length can be read.

    The state is a tuple of the last inputs of the short convolution [N, taps - 1, 3 d], and of the long one, u
    [N, S, d], both in the dtype they were computed in. S is the number of tokens so far, but at most L - 1. A decoding
    step computes S + 1 taps and sums u by them: O(S) operations, in contrast to a recurrent state.
    """

    options_name = "hyena"
    Options = HyenaOptions
    state_grows = True
    sums_over: ClassVar[ParameterUses] = {"short_filter": None, "short_bias": None, "D": None}
    output_layer = "out_proj"

    def __init__(self, config):
        super().__init__()
        options: HyenaOptions = config.hyena
        d = config.hidden_size
        self.filter_length = options.filter_length
        self.in_proj = nn.Linear(d, 3 * d)
        self.short_filter = nn.Parameter(torch.empty(options.short_conv, 3 * d))
        self.short_bias = nn.Parameter(torch.empty(3 * d))
        self.filter = ImplicitFilter(options, d, config.initializer_range)
        self.D = nn.Parameter(torch.empty(d))
        self.out_proj = nn.Linear(d, d)

    def init_parameters(self) -> None:
        """Initialize the short convolution as nn.Conv1d does, but its bias to 0, and D from a normal distribution."""
        bound = len(self.short_filter) ** -0.5
        nn.init.uniform_(self.short_filter, -bound, bound)
        nn.init.zeros_(self.short_bias)
        nn.init.normal_(self.D)

    def forward(
        self,
        x: Tensor,
        *,
        state: State | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        if cu_seqlens is not None and (return_state or state is not None):
            return mix_unpacked(self, x, cu_seqlens, state=state, return_state=return_state, padding=padding)
        past_z, past_u = (None, None) if state is None else state
        history = len(self.short_filter) - 1
        z = self.in_proj(x)
        if padding is not None:
            z = z * padding.to(z.dtype)  # The bias has made padding nonzero.
        z = F.pad(z, (0, 0, history, 0)) if past_z is None else append_inputs(past_z, z, padding)
        q, k, v = convolve_short(z, self.short_filter, self.short_bias, cu_seqlens).chunk(3, -1)
        u = k * v
        if padding is not None:
            u = u * padding.to(u.dtype)
        inputs = append_inputs(past_u, u, padding)
        h = self.filter(min(self.filter_length, inputs.shape[1]))
        outputs = None if past_u is None else x.shape[1]
        o = long_convolution(inputs, h, outputs=outputs, cu_seqlens=cu_seqlens) + u * at_least_float32(self.D)
        new_state = (keep_last(z, history), keep_last(inputs, self.filter_length - 1)) if return_state else None
        return self.out_proj(q * o.to(q.dtype)), new_state

    def flops(self, T: int) -> int:
        """Count the convolutions, and the network of the taps as for a batch of one sequence."""
        taps = min(self.filter_length, T)
        channels = self.D.numel()
        matrices = (self.filter.W_in, self.filter.W_hidden, self.filter.W_out)
        network = taps * 2 * sum(W.numel() for W in matrices) // T
        return 2 * self.short_filter.numel() + network + convolution_flops(T, taps, None, channels, filters=channels)


def convolve_short(z: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Convolve z [B, taps - 1 + T, C], whose first taps - 1 rows are past inputs, to [B, T, C], in the dtype of z.

    Args:
        weight: [taps, C], beginning with the tap of the token itself.
        bias: [C].
        cu_seqlens: [N + 1], the bounds of sequences that are packed into T tokens, without past inputs, or None.
    """
    history = len(weight) - 1
    T = z.shape[1] - history
    wide = at_least_float32(z)  # The gradient of z sums over the taps, and half precision would round every term.
    sequence = None if cu_seqlens is None else sequence_ids(cu_seqlens, T)
    y = at_least_float32(bias) + wide[:, history:] * at_least_float32(weight[0])
    for i in range(1, len(weight)):
        read = wide[:, history - i : history - i + T]
        if sequence is not None:
            is_same = sequence == F.pad(sequence, (i, 0), value=-1)[:T]
            read = read.where(is_same[:, None], 0)
        y = y + read * at_least_float32(weight[i])
    return y.to(z.dtype)


class ImplicitFilter(nn.Module):
    """Taps as a function of their position: an MLP with sines, times an exponential decay of each channel's own rate.

        z_0 = [t, cos(2 pi f_b i / L), -sin(2 pi f_b i / L)],   t = i / (L - 1),   frequencies f_b
        z_n = sin(w * (z_{n-1} W_n + b_n)),  n = 1, 2, 3,      h_i = exp(-rate t) * (z_3 W_4)

    Its weights are plain parameters, so that weight decay leaves them out, and float32 also under autocast, where a
    rounded position would be that of another tap.
    """

    sums_over: ClassVar[ParameterUses] = {
        "W_in": SumOver(0),
        "W_hidden": SumOver(1),
        "W_out": SumOver(0),
        "b": None,
        "w": None,
    }

    def __init__(self, options: HyenaOptions, channels: int, std: float):
        super().__init__()
        self.filter_length = options.filter_length
        self.initial_frequency = options.filter_frequency
        self.std = std
        width = options.filter_width
        self.W_in = nn.Parameter(torch.empty(options.filter_features, width))
        self.W_hidden = nn.Parameter(torch.empty(2, width, width))
        self.W_out = nn.Parameter(torch.empty(width, channels))
        self.b = nn.Parameter(torch.empty(3, width))
        self.w = nn.Parameter(torch.empty(width))

    def init_parameters(self) -> None:
        for weight in (self.W_in, self.W_hidden, self.W_out):
            nn.init.normal_(weight, std=self.std)
        nn.init.zeros_(self.b)
        nn.init.constant_(self.w, self.initial_frequency)

    def forward(self, taps: int) -> Tensor:
        """Return the first taps, [taps, channels], in at least float32."""
        weights = (at_least_float32(W) for W in (self.W_in, *self.W_hidden))
        W_out = at_least_float32(self.W_out)
        bands = (len(self.W_in) - 1) // 2
        frequencies = torch.linspace(LOWEST_BAND, bands - 1, bands, device=W_out.device, dtype=W_out.dtype)
        slowest, fastest = (-math.log(DECAY_TARGET) / reach for reach in (SLOWEST_REACH, FASTEST_REACH))
        rates = torch.linspace(slowest, fastest, W_out.shape[1], device=W_out.device, dtype=W_out.dtype)
        i = torch.arange(taps, device=W_out.device, dtype=W_out.dtype)[:, None]
        t = i / max(1, self.filter_length - 1)
        angles = 2 * math.pi / self.filter_length * i * frequencies
        with without_autocast(W_out):
            z = torch.cat([t, angles.cos(), -angles.sin()], 1)
            for W, b in zip(weights, self.b, strict=True):
                z = torch.sin(self.w * (z @ W + b))
            return (-rates * t).exp() * (z @ W_out)
