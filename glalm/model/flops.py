"""Parameters and floating-point operations of a model, by formula, without running it.

A multiplication and an addition are two operations. Only matrix products and convolutions count, as in torch's flop
counter; the backward pass costs twice the forward pass.
"""

from dataclasses import dataclass

import torch
from torch import nn

from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.model.mixers.base import Mixer


@dataclass(frozen=True)
class Cost:
    """The cost of a model: its parameters, each counted once, and its floating-point operations per token."""

    parameters: int
    forward: int
    training: int  # forward and backward


def model_cost(config: ModelConfig, T: int) -> Cost:
    """Return the cost of a model with this config on sequences of T tokens."""
    with torch.device("meta"):
        model = CausalLM(config)
    forward = forward_flops(model, T)
    return Cost(sum(p.numel() for p in model.parameters()), forward, 3 * forward)


def forward_flops(model: nn.Module, T: int) -> int:
    """Return the operations per token of the forward pass: two per weight of each linear layer, and the mixers'."""
    linear = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return linear + sum(m.flops(T) for m in model.modules() if isinstance(m, Mixer))
