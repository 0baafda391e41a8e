"""MemSizer (Zhang and Cai, arXiv 2203.12644): attention to a fixed number of memory slots."""

from dataclasses import dataclass

from torch import Tensor, nn

from glalm.config.strict import require_positive
from glalm.kernels import chunk_linear_attn, fused_recurrent_linear_attn
from glalm.kernels.common import wide_dtype
from glalm.kernels.context_parallel import ContextShard
from glalm.model.layers import token_positions
from glalm.model.mixers.base import Mixer, State, chunkwise_flops, is_decoding_step, join_state, split_state


@dataclass
class MemSizerOptions:
    """The keys model.memsizer.*."""

    slots: int = 32  # m, the number of slots of the memory

    def __post_init__(self):
        require_positive(self, "model.memsizer", "slots", finite=True)


class MemSizer(Mixer):
    """A memory of m slots, which each token writes to, and which H heads read from by their softmaxes over the slots:

        S_t = S_{t-1} + LayerNorm(x_t W_k)^T LayerNorm(x_t W_v),   q_t = mean_h softmax(x_t W_q^h)
        y_t = t^-1/2 q_t S_t,   t = 1, 2, ... in each sequence

    It is linear attention of one head with m key channels and d value channels. As in the paper, the heads are
    averaged, and there is no output projection. The state is a tuple of [N, 1, m, d], float32, and the number of tokens
    [N], int64.
    """

    options_name = "memsizer"
    Options = MemSizerOptions
    supports_context = True
    output_layer = "v_norm"  # Its gains and biases set the scale of the values, of which the output is a sum.

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_heads
        self.slots = config.memsizer.slots
        self.q_proj = nn.Linear(d, self.num_heads * self.slots, bias=False)
        self.k_proj = nn.Linear(d, self.slots, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.k_norm = nn.LayerNorm(self.slots, eps=config.norm_eps)
        self.v_norm = nn.LayerNorm(d, eps=config.norm_eps)

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
        S, seen = split_state(state, True)
        positions, seen_after = token_positions(x, seen, cu_seqlens, padding, context)
        q, k, v = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        dtype = v.dtype  # Under autocast, softmax and LayerNorm return float32.
        q = q.unflatten(-1, (self.num_heads, -1)).softmax(-1).mean(2)
        # The factor is applied to q, because the sum without it would grow with t and could leave float16's range.
        # The positions could, too. Padding before the first token has position -1.
        q = q * (positions + 1).clamp(min=1)[..., None].to(wide_dtype(q)).rsqrt().to(q.dtype)
        k = self.k_norm(k)
        v = self.v_norm(v)
        if padding is not None:
            k = k * padding.to(k.dtype)  # LayerNorm(0) is its bias.
        operator = fused_recurrent_linear_attn if is_decoding_step(x, context) else chunk_linear_attn
        q, k, v = (y.to(dtype)[:, :, None] for y in (q, k, v))
        o, S = operator(
            q,
            k,
            v,
            scale=1.0,
            initial_state=S,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            context=context,
        )
        return o[:, :, 0], join_state(S, seen_after)

    def flops(self, T: int) -> int:
        return chunkwise_flops(1, self.slots, self.v_proj.out_features, T)
