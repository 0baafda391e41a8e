"""ReGLA: gated linear attention with a refined gate and a normalised exponential feature map (arXiv 2502.01578)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from glalm.config.strict import require
from glalm.kernels import chunk_gla, chunk_value_gla, fused_recurrent_gla
from glalm.kernels.common import at_least_float32
from glalm.model.layers import RMSNorm, append_ones, build_feature_map, divide_by_weights, num_features
from glalm.model.mixers.base import Mixer, chunkwise_flops, is_decoding_step
from glalm.model.running_maximum import FLOOR, last, running_maximum

State = Tensor | tuple[Tensor, Tensor]


@dataclass
class ReGLAOptions:
    """The keys model.regla.*: the ReGLA paper's ablations. The defaults are its full model."""

    refined_gate: bool = True  # F = g (g + 2 r (1 - g)) instead of g
    gate_axis: Literal["key", "value"] = "key"  # the axis of the state [K, V] that has one gate per channel
    feature_map: Literal["exp", "elu1", "relu", "identity", "hedgehog"] = "exp"  # exp: the normalised exponential
    variance_scale: bool = True  # multiply the scores of the exponential map by 1 / (e sqrt(K (e^2 - 1)))
    output_norm: bool = True  # an RMSNorm on the output of each head; false: divide by the sum of the weights instead
    initial_forget: float = 0.96  # F of every channel before training; 0.96 equals GLA's with a bias of 0

    def __post_init__(self):
        require(0 < self.initial_forget < 1, "model.regla.initial_forget must lie between 0 and 1")
        require(
            self.output_norm or (self.feature_map != "identity" and self.gate_axis == "key"),
            "model.regla.output_norm=false divides by the sum of the weights, which needs a positive "
            "model.regla.feature_map and model.regla.gate_axis=key",
        )


class ReGLA(Mixer):
    """With g = sigmoid(x W_g + b_g) and r = sigmoid(x W_r + b_r),

        F_t = (1 - r_t) g_t^2 + r_t (1 - (1 - g_t)^2) = g_t (g_t + 2 r_t (1 - g_t))
        phi(q_t) = exp(q_t - max_i q_ti),   phi(k_t) = exp(k_t - m_t),   m_t = max_{s <= t, i} k_si
        S_t = e^(m_{t-1} - m_t) diag(F_t) S_{t-1} + phi(k_t)^T v_t
        o_t = phi(q_t) S_t / (e sqrt(K (e^2 - 1))),   y_t = RMSNorm_head(o_t) W_o

    r moves the gate off g where g saturates: at r = 1/2, F is g itself, so b_r starts at 0 and b_g where F is
    model.regla.initial_forget: near 1, that the state remembers. The feature map starts nearly flat, so that this is an
    average over many tokens at first: runs of a few hundred steps learn faster from 1/2, as regla_tiny.yaml has it.
    Where the published descriptions leave a choice, the one made here and why:

    - The gated axis. The paper writes S = v phi(k)^T with F = f 1^T, which gates the value axis. GLA and its kernels
      gate the key axis, the better studied one: the default; gate_axis=value is the paper's, in plain PyTorch.
    - The key maximum. The paper takes it over features and the whole sequence, future included. It is one factor a
      sequence and head, which the output norm cancels. Here it is the running maximum in training too, which is exact
      (the state's rescaling is one more factor of its gate) and the same in training, segments and decoding.
    - The gates' projections are of low rank, as GLA's, so that the model has as many parameters as its baselines.
    - Var[exp(x + y)] = e^2 (e^2 - 1) for unit normals x, y: the variance scale makes a score's variance 1, so it is
      one factor of the scores, not one each of phi(q) and phi(k).
    - Without the output norm (an ablation) the sum of the weights normalises, as in linear attention.

    The state is S [N, H, K, V] (V + 1 with the sum), float32, and for the exponential map m [N, H] too.
    """

    options_name = "regla"
    Options = ReGLAOptions

    def __init__(self, config):
        super().__init__()
        d, key, value, rank = config.hidden_size, config.key_dim, config.value_dim, config.gate_low_rank_dim
        self.options, self.num_heads = config.regla, config.num_heads
        self.K, self.V = key // self.num_heads, value // self.num_heads
        self.q_proj = nn.Linear(d, key, bias=False)
        self.k_proj = nn.Linear(d, key, bias=False)
        self.v_proj = nn.Linear(d, value, bias=False)
        gated = num_features(self.options.feature_map, key) if self.options.gate_axis == "key" else value
        forget = self.options.initial_forget
        forget_logits = BiasedLinear(rank, gated, math.log(forget / (1 - forget)))
        self.forget_proj = nn.Sequential(nn.Linear(d, rank, bias=False), forget_logits)
        if self.options.refined_gate:
            self.refine_proj = nn.Sequential(nn.Linear(d, rank, bias=False), nn.Linear(rank, gated))
        if self.options.feature_map != "exp":
            self.q_map, self.k_map = (build_feature_map(self.options.feature_map, self.num_heads, self.K) for _ in "qk")
        if self.options.output_norm:
            self.o_norm = RMSNorm(self.V, eps=config.norm_eps)
        self.o_proj = nn.Linear(value, d, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        state: State | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        q, k, v = (self.heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        log_gate, exponential = self.log_gate(x), self.options.feature_map == "exp"
        if exponential:
            state, m_given = (None, None) if state is None else state
            q, k = at_least_float32(q), at_least_float32(k)
            if padding is not None:
                k = k.masked_fill(padding[..., None] == 0, FLOOR)
            m, before = running_maximum(k.amax(-1), m_given, cu_seqlens)
            q, k = (q - q.amax(-1, keepdim=True)).exp(), (k - m[..., None]).exp()
            log_gate = log_gate + (before - m)[..., None]
            m = last(m, m_given, cu_seqlens)
        else:
            q, k = self.q_map(q), self.k_map(k)
        dtype = v.dtype
        if not self.options.output_norm:
            v = append_ones(v)
            v = v if padding is None else v * padding[..., None].to(v.dtype)
        operator = fused_recurrent_gla if is_decoding_step(x) else chunk_gla
        if self.options.gate_axis == "value":
            operator = chunk_value_gla
        o, state = operator(
            q.to(v.dtype),
            k.to(v.dtype),
            v,
            log_gate,
            scale=self.scale,
            initial_state=state,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
        )
        o = self.o_norm(o) if self.options.output_norm else divide_by_weights(o).to(dtype)
        return self.o_proj(o.flatten(-2)), (state, m) if return_state and exponential else state

    def log_gate(self, x: Tensor) -> Tensor:
        """log F, [B, T, H, K or V], <= 0."""
        logit = at_least_float32(self.forget_proj(x))
        log_gate = F.logsigmoid(logit)
        if self.options.refined_gate:
            g, r = logit.sigmoid(), at_least_float32(self.refine_proj(x)).sigmoid()
            log_gate = (log_gate + (g + 2 * r * (1 - g)).clamp(min=1e-30).log()).clamp(max=0)
        return self.heads(log_gate)

    @property
    def scale(self) -> float:
        if not self.options.output_norm:
            return 1.0  # the sum of the weights cancels it
        if self.options.feature_map == "exp":
            return 1 / (math.e * math.sqrt(self.K * (math.e**2 - 1))) if self.options.variance_scale else 1.0
        return self.K**-0.5

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def flops(self, T: int) -> int:
        K = num_features(self.options.feature_map, self.K)
        maps = 4 * self.num_heads * self.K**2 if self.options.feature_map == "hedgehog" else 0
        chunk = 64 if self.options.gate_axis == "key" else 16
        return maps + chunkwise_flops(self.num_heads, K, self.V + (not self.options.output_norm), T, chunk)


class BiasedLinear(nn.Linear):
    """A linear layer whose bias starts elsewhere than at 0."""

    def __init__(self, inputs: int, outputs: int, start: float):
        super().__init__(inputs, outputs)
        self.start = start

    def init_parameters(self) -> None:
        nn.init.constant_(self.bias, self.start)
