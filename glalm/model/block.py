"""The pre-norm block that every mixer shares: x += mixer(norm(x)); x += swiglu(norm(x)), where it has a SwiGLU."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from glalm.model.layers import RMSNorm
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
    def __init__(self, config, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = MIXERS[config.layer_mixers()[layer]](config)
        self.mlp = None
        if config.intermediate_size:
            self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
            self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, *, padding: Tensor | None = None, **mixing) -> tuple[Tensor, object]:
        """x: [B, T, d]; padding: [B, T, 1], 0 at padded tokens; `mixing` goes to the mixer, whose state comes back."""
        h = self.attn_norm(x)
        if padding is not None:
            h = h * padding  # most mixers leave their state alone where their input is zero
        h, state = self.attn(h, padding=padding, **mixing)
        x = x + h
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x)), state
