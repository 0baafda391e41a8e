"""Linear attention (Katharopoulos et al., arXiv 2006.16236)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from glalm.config.strict import require
from glalm.kernels import chunk_linear_attn, fused_recurrent_linear_attn
from glalm.model.layers import RMSNorm, append_ones, build_feature_map, divide_by_weights, num_features
from glalm.model.mixers.base import Mixer, chunkwise_flops, is_decoding_step


@dataclass
class LinearOptions:
    """The keys model.linear.*: linear attention without a gate."""

    feature_map: Literal["elu1", "relu", "identity", "hedgehog"] = "elu1"
    normalise: bool = True  # divide by the sum of the weights; false: an RMSNorm on the output of each head instead

    def __post_init__(self):
        require(
            self.feature_map != "identity" or not self.normalise,
            "model.linear.feature_map=identity gives weights of both signs, whose sum normalises nothing; write "
            "model.linear.normalise=false",
        )


class LinearAttention(Mixer):
    """Attention with phi(q_t) . phi(k_s) in place of the softmax's exp(q_t . k_s):

        S_t = S_{t-1} + phi(k_t)^T v_t,   z_t = z_{t-1} + phi(k_t),   o_t = phi(q_t) S_t / (phi(q_t) . z_t),   y = o W_o

    Without the normaliser (model.linear.normalise=false), o_t = K^-1/2 phi(q_t) S_t and an RMSNorm on each head
    follows (arXiv 2210.10340). The state is [N, H, features, V + 1], float32, whose last column is z; without it, V.
    """

    options_name = "linear"
    Options = LinearOptions

    def __init__(self, config):
        super().__init__()
        d, key, value, H = config.hidden_size, config.key_dim, config.value_dim, config.num_heads
        self.num_heads, self.K, self.V = H, key // H, value // H
        self.normalise, self.map_name = config.linear.normalise, config.linear.feature_map
        self.q_proj = nn.Linear(d, key, bias=False)
        self.k_proj = nn.Linear(d, key, bias=False)
        self.v_proj = nn.Linear(d, value, bias=False)
        self.q_map, self.k_map = (build_feature_map(self.map_name, H, self.K) for _ in "qk")
        self.o_norm = None if self.normalise else RMSNorm(self.V, eps=config.norm_eps)
        self.o_proj = nn.Linear(value, d, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        state: Tensor | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        dtype, v = v.dtype, append_ones(v) if self.normalise else v
        q, k = self.q_map(q).to(v.dtype), self.k_map(k).to(v.dtype)
        if padding is not None:
            k = k * padding[..., None].to(k.dtype)  # phi(0) is not 0
        operator = fused_recurrent_linear_attn if is_decoding_step(x) else chunk_linear_attn
        scale = 1.0 if self.normalise else self.K**-0.5
        o, state = operator(
            q, k, v, scale=scale, initial_state=state, output_final_state=return_state, cu_seqlens=cu_seqlens
        )
        o = divide_by_weights(o).to(dtype) if self.normalise else self.o_norm(o)
        return self.o_proj(o.flatten(-2)), state

    def flops(self, T: int) -> int:
        F = num_features(self.map_name, self.K)
        maps = 4 * self.num_heads * self.K**2 if self.map_name == "hedgehog" else 0
        return maps + chunkwise_flops(self.num_heads, F, self.V + self.normalise, T)
