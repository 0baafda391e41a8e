"""Mamba-2 (Dao and Gu, arXiv 2405.21060), which by state-space duality is linear attention with one gate per head."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm.config.strict import require, require_positive
from glalm.kernels import chunk_ssd, fused_recurrent_ssd
from glalm.kernels.common import at_least_float32
from glalm.kernels.context_parallel import ContextShard
from glalm.model.layers import GroupedRMSNorm, ParameterUses, ShortConv, init_time_step
from glalm.model.mixers.base import Mixer, chunkwise_flops, is_decoding_step


@dataclass
class Mamba2Options:
    """The keys model.mamba2.*."""

    state_size: int = 128  # numbers of the state for each channel
    head_dim: int = 64  # channels of a head
    expand: int = 2  # the mixer has expand * d channels inside
    groups: int = 1  # groups of heads that share B and C
    conv: int = 4  # taps

    def __post_init__(self):
        require_positive(self, "model.mamba2", "state_size", "head_dim", "expand", "groups", "conv", finite=True)


class Mamba2(Mixer):
    """A state-space model with one scalar A for each head: gated linear attention with q = C, k = B, v = dt x.

        dt_t = softplus(x_t W_dt + b),   S_t = exp(dt_t A) S_{t-1} + B_t^T (dt_t x_t),   o_t = C_t S_t + D x_t
        y_t = RMSNorm(o_t * swish(z_t)) W_o

    x, B and C pass a short convolution. The heads of a group share B and C. Parameter names and shapes are those of
    transformers' Mamba2Mixer. The state is a tuple of [N, H, state_size, head_dim], float32, and the convolution's
    state.
    """

    options_name = "mamba2"
    Options = Mamba2Options
    supports_context = True
    sums_over: ClassVar[ParameterUses] = {"dt_bias": None, "A_log": None, "D": None}
    output_layer = "out_proj"

    @classmethod
    def check_config(cls, config) -> None:
        options = config.mamba2
        inner = options.expand * config.hidden_size
        require(
            inner % (options.head_dim * options.groups) == 0,
            f"model.mamba2.head_dim={options.head_dim} does not cut the {inner} channels (model.mamba2.expand * "
            f"model.hidden_size) into heads, the same number in each of {options.groups} groups",
        )

    def __init__(self, config):
        super().__init__()
        options: Mamba2Options = config.mamba2
        d = config.hidden_size
        self.inner = options.expand * d
        self.head_dim = options.head_dim
        self.groups = options.groups
        self.K = options.state_size
        self.num_heads = self.inner // self.head_dim
        channels = self.inner + 2 * self.groups * self.K
        self.in_proj = nn.Linear(d, channels, bias=False)  # x, B and C
        self.z_proj = nn.Linear(d, self.inner, bias=False)
        self.dt_proj = nn.Linear(d, self.num_heads, bias=False)
        self.conv1d = ShortConv(channels, options.conv, bias=True)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GroupedRMSNorm(self.inner, self.groups, eps=config.norm_eps)
        self.out_proj = nn.Linear(self.inner, d, bias=False)

    def init_parameters(self) -> None:
        self.A_log.copy_(torch.arange(1, self.num_heads + 1, device=self.A_log.device).log())
        nn.init.ones_(self.D)
        init_time_step(self.dt_bias)

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
        S, conv_state = (None, None) if state is None else state
        z = self.z_proj(x)
        dt = self.dt_proj(x)
        xbc, conv_state = self.conv1d(self.in_proj(x), conv_state, cu_seqlens, context)
        if padding is not None:
            # The convolution's bias has made padding nonzero. The gates decay the state there, but it is still 0.
            xbc = xbc * padding.to(xbc.dtype)
        x, b, c = xbc.split([self.inner, self.groups * self.K, self.groups * self.K], -1)
        operator = fused_recurrent_ssd if is_decoding_step(x, context) else chunk_ssd
        o, S = operator(
            x.unflatten(-1, (self.num_heads, -1)),
            dt,
            -at_least_float32(self.A_log).exp(),
            b.unflatten(-1, (self.groups, -1)),
            c.unflatten(-1, (self.groups, -1)),
            D=self.D,
            dt_bias=self.dt_bias,
            initial_state=S,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            context=context,
        )
        o = o.flatten(-2) * F.silu(z)
        return self.out_proj(self.norm(o).to(z.dtype)), None if S is None else (S, conv_state)

    def flops(self, T: int) -> int:
        return self.conv1d.flops() + chunkwise_flops(self.num_heads, self.K, self.head_dim, T)
