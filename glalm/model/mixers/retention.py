"""Retention (RetNet, Sun et al., arXiv 2307.08621)."""

from torch import Tensor, nn

from glalm.config.strict import describe_divisors, require
from glalm.kernels import chunk_retention, fused_recurrent_retention
from glalm.kernels.context_parallel import ContextShard
from glalm.model.layers import GatedRMSNorm, apply_rotary, token_positions
from glalm.model.mixers.base import Mixer, State, chunkwise_flops, is_decoding_step, join_state, split_state


class Retention(Mixer):
    """Linear attention with rotary q and k and a constant decay for each head:

        S_t = gamma_h S_{t-1} + k_t^T v_t,   gamma_h = 1 - 2^(-5-h),   o_t = K^-1/2 q_t S_t
        y_t = (swish(x_t W_g) * RMSNorm_head(o_t)) W_o

    In the paper v is twice as wide as q and k: model.expand_k=1, model.expand_v=2. The state is a tuple of [N, H, K,
    V], float32, and the next token's position [N], int64.
    """

    supports_context = True

    @classmethod
    def check_config(cls, config) -> None:
        require(
            config.key_dim % (2 * config.num_heads) == 0,
            f"model.num_heads={config.num_heads} does not cut the width model.hidden_size * model.expand_k = "
            f"{config.key_dim} into heads of an even number of channels, which rotary positions need; "
            f"{describe_divisors(config.key_dim // 2)}",
        )

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        key = config.key_dim
        value = config.value_dim
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(d, key, bias=False)
        self.k_proj = nn.Linear(d, key, bias=False)
        self.v_proj = nn.Linear(d, value, bias=False)
        self.g_proj = nn.Linear(d, value, bias=False)
        self.g_norm_swish_gate = GatedRMSNorm(value // self.num_heads, eps=config.norm_eps)
        self.o_proj = nn.Linear(value, d, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        state: State | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        padding: Tensor | None = None,
        context: ContextShard | None = None,
    ) -> tuple[Tensor, State | None]:
        q, k, v, g = (
            proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        )
        S, start = split_state(state, True)
        positions, end = token_positions(x, start, cu_seqlens, context=context)
        operator = fused_recurrent_retention if is_decoding_step(x, context) else chunk_retention
        o, S = operator(
            apply_rotary(q, positions),
            apply_rotary(k, positions),
            v,
            initial_state=S,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            context=context,
        )
        y = self.g_norm_swish_gate(o, g)
        return self.o_proj(y.flatten(-2)), join_state(S, end)

    def flops(self, T: int) -> int:
        H = self.num_heads
        return chunkwise_flops(H, self.q_proj.out_features // H, self.v_proj.out_features // H, T)
