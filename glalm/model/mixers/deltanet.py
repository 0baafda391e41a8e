"""DeltaNet (Yang et al., arXiv 2406.06484)."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from glalm.config.strict import require
from glalm.kernels import chunk_delta_rule, fused_recurrent_delta_rule
from glalm.kernels.common import CHUNK
from glalm.kernels.context_parallel import ContextShard
from glalm.model.layers import RMSNorm, ShortConv
from glalm.model.mixers.base import Mixer, State, chunkwise_flops, is_decoding_step, join_state, split_state


@dataclass
class DeltaNetOptions:
    """The keys model.deltanet.*, which DeltaNet and Gated DeltaNet share."""

    short_conv: int = 4  # taps of a causal convolution over q, k and v; 0: no convolution

    def __post_init__(self):
        require(
            self.short_conv == 0 or self.short_conv > 1,
            f"model.deltanet.short_conv must be 0 or 2 taps or more, not {self.short_conv}",
        )


class DeltaNet(Mixer):
    """Linear attention by the delta rule: the state learns the difference between v_t and what it returns for k_t.

        S_t = (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t,   beta_t = sigmoid(x_t W_beta)
        o_t = K^-1/2 q_t S_t,   y_t = RMSNorm_head(o_t) W_o

    q, k and v pass a short convolution with a SiLU; q and k are then L2-normalized on each head. The state is
    [N, H, K, V], float32; with a convolution it is a tuple of that and the convolution's state.
    """

    options_name = "deltanet"
    Options: ClassVar[type] = DeltaNetOptions
    supports_context = True

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        key = config.key_dim
        value = config.value_dim
        self.num_heads = config.num_heads
        taps = getattr(config, self.options_name).short_conv
        self.widths = key, key, value
        self.q_proj = nn.Linear(d, key, bias=False)
        self.k_proj = nn.Linear(d, key, bias=False)
        self.v_proj = nn.Linear(d, value, bias=False)
        self.b_proj = nn.Linear(d, self.num_heads, bias=False)
        self.conv = ShortConv(sum(self.widths), taps) if taps else None
        self.o_norm = RMSNorm(value // self.num_heads, eps=config.norm_eps)
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
        S, conv_state = split_state(state, self.conv is not None)
        q, k, v, conv_state = self.project_qkv(x, conv_state, cu_seqlens, context)
        operator = fused_recurrent_delta_rule if is_decoding_step(x, context) else chunk_delta_rule
        o, S = operator(
            q,
            k,
            v,
            self.b_proj(x).sigmoid(),
            self.compute_log_gate(x),
            normalize=True,
            initial_state=S,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            context=context,
        )
        return self.o_proj(self.normalize_output(o, x).flatten(-2)), join_state(S, conv_state)

    def project_qkv(
        self, x: Tensor, conv_state: Tensor | None, cu_seqlens: Tensor | None, context: ContextShard | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return q, k and v, each [B, T, H, ...] and ready for the operator, and the convolution's new state."""
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        if self.conv is None:
            parts = [F.silu(part) for part in parts]
        else:
            parts, conv_state = self.conv(parts, conv_state, cu_seqlens, context)  # ends with a SiLU
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in parts)
        return q, k, v, conv_state

    def normalize_output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_norm(o)

    def flops(self, T: int) -> int:
        """Count the convolution, the chunks as of any linear recurrence, and what the delta rule adds to them.

        Each token and head takes 2 C K to build the triangular system, C (K + V) to solve it, and 2 K V to read the
        values that the state already holds for the keys.
        """
        convolution = self.conv.flops() if self.conv is not None else 0
        C = min(T, CHUNK)
        K = self.widths[0] // self.num_heads
        V = self.widths[2] // self.num_heads
        delta_rule = self.num_heads * (2 * C * K + C * (K + V) + 2 * K * V)
        return convolution + chunkwise_flops(self.num_heads, K, V, T) + delta_rule
