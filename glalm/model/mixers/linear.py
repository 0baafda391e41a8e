"""Linear attention (Katharopoulos et al., arXiv 2006.16236)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from glalm.config.strict import require
from glalm.kernels import chunk_linear_attn, fused_recurrent_linear_attn
from glalm.kernels.context_parallel import ContextShard
from glalm.model.layers import RMSNorm, append_ones, build_feature_map, divide_by_weights, num_features
from glalm.model.mixers.base import Mixer, chunkwise_flops, is_decoding_step


@dataclass
class LinearOptions:
    """The keys model.linear.*: linear attention without a gate."""

    feature_map: Literal["elu1", "relu", "identity", "hedgehog"] = "elu1"  # of queries and keys
    normalise: bool = True  # divide by the sum of the weights; false: an RMSNorm on the output of each head instead

    def __post_init__(self):
        require(
            self.feature_map != "identity" or not self.normalise,
            "model.linear.feature_map=identity gives weights of both signs, whose sum normalises nothing; write "
            "model.linear.normalise=false",
        )


class LinearAttention(Mixer):
    """Attention with phi(q_t) . phi(k_s) instead of the softmax's exp(q_t . k_s):

        S_t = S_{t-1} + phi(k_t)^T v_t,   z_t = z_{t-1} + phi(k_t),   o_t = phi(q_t) S_t / (phi(q_t) . z_t),   y = o W_o

    Without the normalizer (model.linear.normalise=false), o_t = K^-1/2 phi(q_t) S_t, and an RMSNorm on each head
    follows (arXiv 2210.10340). The state is [N, H, features, V + 1], float32, and its last column is z. Without the
    normalizer the last axis is V.
    """

    options_name = "linear"
    Options = LinearOptions
    supports_context = True

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_heads
        self.K = config.key_dim // self.num_heads
        self.V = config.value_dim // self.num_heads
        self.normalise = config.linear.normalise
        self.map_name = config.linear.feature_map
        self.q_proj = nn.Linear(d, config.key_dim, bias=False)
        self.k_proj = nn.Linear(d, config.key_dim, bias=False)
        self.v_proj = nn.Linear(d, config.value_dim, bias=False)
        self.q_map = build_feature_map(self.map_name, self.num_heads, self.K)
        self.k_map = build_feature_map(self.map_name, self.num_heads, self.K)
        self.o_norm = None if self.normalise else RMSNorm(self.V, eps=config.norm_eps)
        self.o_proj = nn.Linear(config.value_dim, d, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        state: Tensor | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Tensor | None = None,
        context: ContextShard | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        dtype = v.dtype
        if self.normalise:
            v = append_ones(v)
        q = self.q_map(q).to(v.dtype)
        k = self.k_map(k).to(v.dtype)
        if padding is not None:
            # phi(0) is not 0, so padded keys must be masked explicitly.
            k = k * padding[..., None].to(k.dtype)
        operator = fused_recurrent_linear_attn if is_decoding_step(x, context) else chunk_linear_attn
        scale = 1.0 if self.normalise else self.K**-0.5
        o, state = operator(
            q,
            k,
            v,
            scale=scale,
            initial_state=state,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            context=context,
        )
        o = divide_by_weights(o).to(dtype) if self.o_norm is None else self.o_norm(o)
        return self.o_proj(o.flatten(-2)), state

    def flops(self, T: int) -> int:
        F = num_features(self.map_name, self.K)
        maps = 4 * self.num_heads * self.K**2 if self.map_name == "hedgehog" else 0
        return maps + chunkwise_flops(self.num_heads, F, self.V + self.normalise, T)
