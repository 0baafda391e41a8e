"""Kimi Delta Attention (Kimi Team, arXiv 2510.26692, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm.config.strict import require
from glalm.kernels.common import at_least_float32
from glalm.model.layers import GatedRMSNorm, ParameterUses, init_time_step
from glalm.model.mixers.deltanet import DeltaNet


@dataclass
class KDAOptions:
    """The keys model.kda.*."""

    short_conv: int = 4  # taps of a causal convolution over q, k and v; 0: no convolution
    gate_rank: int | None = None  # rank of the forget gate's and the output gate's projections; null: V of one head

    def __post_init__(self):
        require(
            self.short_conv == 0 or self.short_conv > 1,
            f"model.kda.short_conv must be 0 or 2 taps or more, not {self.short_conv}",
        )
        require(
            self.gate_rank is None or self.gate_rank > 0,
            f"model.kda.gate_rank must be null or at least 1, not {self.gate_rank}",
        )


class KimiDeltaAttention(DeltaNet):
    """DeltaNet with GLA's forget gate, one for each key channel, and with an output gate:

        S_t = (I - beta_t k_t^T k_t) diag(a_t) S_{t-1} + beta_t k_t^T v_t,   a_t = sigmoid(-x_t W_f1 W_f2 - b)^exp(A_h)
        o_t = K^-1/2 q_t S_t,   y_t = (sigmoid(x_t W_g1 W_g2 + c) * RMSNorm_head(o_t)) W_o

    The models of the paper have K = V = 128. The state is DeltaNet's.
    """

    options_name = "kda"
    Options = KDAOptions
    sums_over: ClassVar[ParameterUses] = {"A_log": None, "dt_bias": None}

    def __init__(self, config):
        super().__init__(config)
        d = config.hidden_size
        key = config.key_dim
        value = config.value_dim
        rank = config.kda.gate_rank or value // self.num_heads
        self.f_proj = nn.Sequential(nn.Linear(d, rank, bias=False), nn.Linear(rank, key, bias=False))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(key))
        self.g_proj = nn.Sequential(nn.Linear(d, rank, bias=False), nn.Linear(rank, value))
        self.o_norm = GatedRMSNorm(value // self.num_heads, eps=config.norm_eps, activation="sigmoid")

    def init_parameters(self) -> None:
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16).log())
        init_time_step(self.dt_bias)

    def compute_log_gate(self, x: Tensor) -> Tensor:
        logits = (-at_least_float32(self.f_proj(x)) - self.dt_bias).unflatten(-1, (self.num_heads, -1))
        return at_least_float32(self.A_log).exp()[:, None] * F.logsigmoid(logits)

    def normalize_output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_norm(o, self.g_proj(x).unflatten(-1, (self.num_heads, -1)))
