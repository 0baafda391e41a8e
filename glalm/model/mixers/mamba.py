"""Mamba (Gu and Dao, arXiv 2312.00752)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm.config.strict import require_positive
from glalm.kernels import selective_scan
from glalm.kernels.common import at_least_float32
from glalm.kernels.context_parallel import ContextShard
from glalm.model.layers import ParameterUses, ShortConv, SumOver, init_time_step
from glalm.model.mixers.base import Mixer


@dataclass
class MambaOptions:
    """The keys model.mamba.*."""

    state_size: int = 16  # numbers of the state for each channel
    expand: int = 2  # the mixer has expand * d channels inside
    conv: int = 4  # taps

    def __post_init__(self):
        require_positive(self, "model.mamba", "state_size", "expand", "conv", finite=True)


class Mamba(Mixer):
    """A selective state-space model. Each channel i has a state h of N numbers:

        dt_t = softplus(W_dt x_t + b),   h_t = exp(dt_t A_i) h_{t-1} + dt_t B_t x_ti,   o_ti = C_t . h_t + D_i x_ti
        y_t = (o_t * swish(z_t)) W_o

    dt, B and C are functions of x_t, which has passed a short convolution. Parameter names and shapes are those of
    transformers' MambaMixer. (Its forward can continue from a state by one token only, and needs optional kernels to
    keep packed sequences apart.)

    The state is a tuple of h [N, channels, state_size], float32, and the convolution's state.
    """

    options_name = "mamba"
    Options = MambaOptions
    supports_context = True
    sums_over: ClassVar[ParameterUses] = {"A_log": None, "D": None}
    output_layer = "out_proj"

    def __init__(self, config):
        super().__init__()
        options: MambaOptions = config.mamba
        d = config.hidden_size
        self.inner = options.expand * d
        self.N = options.state_size
        self.rank = math.ceil(d / 16)  # of dt's projection
        self.in_proj = nn.Linear(d, self.inner, bias=False)
        self.z_proj = nn.Linear(d, self.inner, bias=False)
        self.conv1d = ShortConv(self.inner, options.conv, bias=True)
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * self.N, bias=False)
        self.dt_proj = TimeStep(self.rank, self.inner)
        self.A_log = nn.Parameter(torch.empty(self.inner, self.N))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, d, bias=False)

    def init_parameters(self) -> None:
        self.A_log.copy_(torch.arange(1, self.N + 1, device=self.A_log.device).log().expand(self.inner, -1))
        nn.init.ones_(self.D)

    def forward(
        self,
        x: Tensor,
        *,
        state: tuple[Tensor, Tensor] | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Tensor | None = None,
        context: ContextShard | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        h, conv_state = (None, None) if state is None else state
        z = self.z_proj(x)
        x, conv_state = self.conv1d(self.in_proj(x), conv_state, cu_seqlens, context)
        if padding is not None:
            # The convolution's bias has made padding nonzero. The gates decay the state there, but it is still 0.
            x = x * padding.to(x.dtype)
        dt, b, c = self.x_proj(x).split([self.rank, self.N, self.N], -1)
        # Where transformers offloads the model, a parameter exists only while its module's forward runs.
        dt_bias = self.dt_proj(None) if self.dt_proj.bias.is_meta else self.dt_proj.bias
        o, h = selective_scan(
            x,
            self.dt_proj(dt),
            -at_least_float32(self.A_log).exp(),
            b,
            c,
            D=self.D,
            z=z,
            dt_bias=dt_bias,
            initial_state=h,
            cu_seqlens=cu_seqlens,
            context=context,
        )
        return self.out_proj(o), (h, conv_state) if return_state else None

    def flops(self, T: int) -> int:
        """Count the convolution and C_t . h_t; the update of h has no matrix product."""
        return self.conv1d.flops() + 2 * self.inner * self.N


class TimeStep(nn.Linear):
    """The up-projection of dt, with the paper's initial values.

    The scan adds the bias and applies softplus, in float32, because the bias dominates the sum.
    """

    sums_over: ClassVar[ParameterUses] = {"weight": SumOver(1), "bias": None}

    def forward(self, u: Tensor | None) -> Tensor:
        """Return the projection of u without the bias, or, where u is None, the bias."""
        return self.bias if u is None else F.linear(u, self.weight)

    def init_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.in_features**-0.5), self.in_features**-0.5)
        init_time_step(self.bias)
