"""Gated linear attention (Yang et al., arXiv 2312.06635, section 4.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glalm.kernels import chunk_gla, fused_recurrent_gla


class GatedRMSNorm(nn.RMSNorm):
    """RMSNorm over the last axis, then a swish output gate: norm(x) * weight * silu(gate)."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * F.silu(gate)


class GatedLinearAttention(nn.Module):
    """Linear attention whose state forgets by a data-dependent gate for each key channel:

        S_t = diag(alpha_t) S_{t-1} + k_t^T v_t,   alpha_t = sigmoid(x_t W1 W2 + b)^(1/16)
        o_t = K^-1/2 q_t S_t,   y_t = (swish(x_t W_r) * RMSNorm_head(o_t)) W_o

    No feature map and no normaliser. Parameter names and shapes are those of the published GLA checkpoints. The
    state is [B, H, K, V], float32.
    """

    def __init__(self, config):
        super().__init__()
        d, key, value, rank = config.hidden_size, config.key_dim, config.value_dim, config.gate_low_rank_dim
        self.num_heads = config.num_heads
        self.gate_logit_normalizer = config.gate_logit_normalizer
        self.q_proj = nn.Linear(d, key, bias=False)
        self.k_proj = nn.Linear(d, key, bias=False)
        self.v_proj = nn.Linear(d, value, bias=False)
        self.g_proj = nn.Linear(d, value, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(d, rank, bias=False), nn.Linear(rank, key, bias=True))
        self.g_norm_swish_gate = GatedRMSNorm(value // config.num_heads, eps=config.norm_eps)
        self.o_proj = nn.Linear(value, d, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        state: Tensor | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, r, gate = (
            proj(x).unflatten(-1, (self.num_heads, -1))
            for proj in (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.gk_proj)
        )
        # In float32: the gates of a whole chunk are multiplied up, and bf16 would round each of them first.
        log_gate = F.logsigmoid(gate.float()) / self.gate_logit_normalizer
        operator = fused_recurrent_gla if x.shape[1] == 1 and not torch.is_grad_enabled() else chunk_gla
        o, state = operator(
            q, k, v, log_gate, initial_state=state, output_final_state=return_state, cu_seqlens=cu_seqlens
        )
        y = self.g_norm_swish_gate(o, r)
        return self.o_proj(y.flatten(-2)), state
