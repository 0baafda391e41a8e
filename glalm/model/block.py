"""The pre-norm block that every mixer shares: x += mixer(norm(x)); x += swiglu(norm(x))."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from glalm.model.mixers import MIXERS


class SwiGLU(nn.Module):
    """(silu(x W_gate) * x W_up) W_down."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = MIXERS[config.mixer](config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, *, padding: Tensor | None = None, **mixing) -> tuple[Tensor, object]:
        """x: [B, T, d]; padding: [B, T, 1], 0 at padded tokens; `mixing` goes to the mixer, whose state comes back."""
        h = self.attn_norm(x)
        if padding is not None:
            h = h * padding  # a mixer leaves its state untouched where its input is zero
        h, state = self.attn(h, **mixing)
        x = x + h
        return x + self.mlp(self.mlp_norm(x)), state
