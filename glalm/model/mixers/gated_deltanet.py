"""Gated DeltaNet (Yang et al., arXiv 2412.06464)."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm.kernels.common import at_least_float32
from glalm.model.layers import GatedRMSNorm, ParameterUses, init_time_step
from glalm.model.mixers.deltanet import DeltaNet


class GatedDeltaNet(DeltaNet):
    """DeltaNet with Mamba-2's forget gate, one for each head, and with an output gate:

        S_t = a_t (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t,   a_t = sigmoid(-x_t W_a - b)^exp(A_h)
        o_t = K^-1/2 q_t S_t,   y_t = (swish(x_t W_g) * RMSNorm_head(o_t)) W_o

    In the paper K = 3/4 d / H and V is twice that: model.expand_k=0.75, model.expand_v=1.5. The state is DeltaNet's.
    """

    sums_over: ClassVar[ParameterUses] = {"A_log": None, "dt_bias": None}

    def __init__(self, config):
        super().__init__(config)
        self.a_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.g_proj = nn.Linear(config.hidden_size, config.value_dim, bias=False)
        self.o_norm = GatedRMSNorm(config.value_dim // self.num_heads, eps=config.norm_eps)

    def init_parameters(self) -> None:
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1e-4, 16).log())
        init_time_step(self.dt_bias)

    def compute_log_gate(self, x: Tensor) -> Tensor:
        return at_least_float32(self.A_log).exp() * F.logsigmoid(-at_least_float32(self.a_proj(x)) - self.dt_bias)

    def normalize_output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_norm(o, self.g_proj(x).unflatten(-1, (self.num_heads, -1)))
