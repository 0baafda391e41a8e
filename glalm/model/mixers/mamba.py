"""Mamba (Gu and Dao, arXiv 2312.00752)."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm.config.strict import require_positive
from glalm.kernels import selective_scan
from glalm.kernels.common import at_least_float32
from glalm.model.layers import ShortConv, init_time_step
from glalm.model.mixers.base import Mixer


@dataclass
class MambaOptions:
    """The keys model.mamba.*."""

    state_size: int = 16
    expand: int = 2  # the mixer has expand * d channels inside
    conv: int = 4  # taps

    def __post_init__(self):
        require_positive(self, "model.mamba", "state_size", "expand", "conv", finite=True)


class Mamba(Mixer):
    """A selective state-space model: each channel i has a state h of N numbers,

        dt_t = softplus(...),   h_t = exp(dt_t A_i) h_{t-1} + dt_t B_t x_ti,   o_ti = C_t . h_t + D_i x_ti
        y_t = (o_t * swish(z_t)) W_o

    dt, B and C are functions of x_t, which passed a short convolution. Parameter names and shapes are those of
    transformers' MambaMixer, whose own forward cannot take up a state again but for one token, nor keep packed
    sequences apart without its optional kernels. The scan is mamba_ssm's kernel where that is installed and serves (on
    CUDA, a fresh sequence a row), else PyTorch. The state is h [N, channels, state_size], float32, and the
    convolution's last inputs.
    """

    options_name = "mamba"
    Options = MambaOptions

    def __init__(self, config):
        super().__init__()
        o, d = config.mamba, config.hidden_size
        self.inner, self.N, self.rank = o.expand * d, o.state_size, math.ceil(d / 16)
        self.in_proj = nn.Linear(d, 2 * self.inner, bias=False)
        self.conv1d = ShortConv(self.inner, o.conv, bias=True)
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * self.N, bias=False)
        self.dt_proj = TimeStep(self.rank, self.inner)
        self.A_log = nn.Parameter(torch.empty(self.inner, self.N))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, d, bias=False)
        if torch.cuda.is_available():
            say(fast_scan() is not None)

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
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        h, conv_state = (None, None) if state is None else state
        x, z = self.in_proj(x).chunk(2, -1)
        x, conv_state = self.conv1d(x, conv_state, cu_seqlens)
        if padding is not None:
            x = x * padding.to(x.dtype)  # the convolution has a bias
        dt, b, c = self.x_proj(x).split([self.rank, self.N, self.N], -1)
        dt, A = self.dt_proj(dt), -at_least_float32(self.A_log).exp()
        if serves(x, h, cu_seqlens) and fast_scan() is not None:
            bias = self.dt_proj.bias.float()  # apart, as it wants all else in the dtype of x
            o, h = fast_scan()(
                *(s.mT for s in (x, (dt - bias).to(x.dtype))),
                A,
                *(s.mT for s in (b, c)),
                D=self.D.float(),
                z=z.mT,
                delta_bias=bias,
                delta_softplus=True,
                return_last_state=True,
            )
            o = o.mT
        else:
            o, h = selective_scan(x, F.softplus(dt), A, b, c, initial_state=h, cu_seqlens=cu_seqlens)
            o = (o + x * self.D) * F.silu(z)
        # A copy: both scans give a view that keeps the states of all tokens.
        return self.out_proj(o.to(z.dtype)), (h.clone(), conv_state) if return_state else None

    def flops(self, T: int) -> int:
        """The convolution and the states' read-out; the scan itself has no matrix product to count."""
        return self.conv1d.flops() + 2 * self.inner * self.N


class TimeStep(nn.Linear):
    """The low-rank dt's second half: dt = softplus(weight u + bias), with the paper's initial steps. The sum, which the
    bias dominates, is in float32."""

    def forward(self, u: Tensor) -> Tensor:
        return at_least_float32(F.linear(u, self.weight)) + self.bias

    def init_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.in_features**-0.5), self.in_features**-0.5)
        init_time_step(self.bias)


def serves(x: Tensor, h: Tensor | None, cu_seqlens: Tensor | None) -> bool:
    """Whether mamba_ssm's kernel can do this: on CUDA, without a state to start from and without packing."""
    return x.is_cuda and h is None and cu_seqlens is None


@cache
def fast_scan() -> Callable | None:
    """mamba_ssm's kernel, or None where it is not installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn


@cache
def say(fast: bool) -> None:
    """Once a process, at the start: which scan it will be."""
    with_what = "mamba_ssm's kernel" if fast else "plain PyTorch: mamba_ssm, which is much faster, is not installed"
    logging.getLogger(__name__).warning("mamba: the scan runs on %s", with_what)
