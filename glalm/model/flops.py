"""Parameters and floating-point operations of a model, by formula: nothing is run.

A multiplication and an addition are two operations. Only matrix products and convolutions count, as in torch's flop
counter; a model's backward pass is twice its forward pass.
"""

from typing import NamedTuple

import torch
from torch import nn

from glalm.kernels.common import CHUNK
from glalm.model.config import ModelConfig


class Cost(NamedTuple):
    parameters: int  # each once: a tied head is its embedding
    forward: int  # operations a token
    training: int  # operations a token, forward and backward


def cost(config: ModelConfig, T: int) -> Cost:
    """Of the model of that shape on sequences of T tokens."""
    from glalm.model.decoder import GLALMForCausalLM
    from glalm.model.hf_config import GLALMConfig

    if not isinstance(config, GLALMConfig):
        config = GLALMConfig(**vars(config))
    with torch.device("meta"):
        model = GLALMForCausalLM(config)
    model.tie_weights()
    forward = forward_flops(model, T)
    return Cost(sum(p.numel() for p in model.parameters()), forward, 3 * forward)


def forward_flops(model: nn.Module, T: int) -> int:
    """Operations a token: two a weight of each linear layer, and what each mixer does besides."""
    linear = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return linear + sum(layer.attn.flops(T) for layer in model.model.layers)


def chunkwise(heads: int, K: int, V: int, T: int, chunk: int = CHUNK) -> int:
    """Operations a token of `heads` linear recurrences with a state [K, V], chunk by chunk.

    In a chunk of C: scores 2 C K and their values 2 C V, the masked half counted too; the state's read and its update
    2 K V each.
    """
    C = min(T, chunk)
    return heads * (2 * C * (K + V) + 4 * K * V)


def delta_rule(heads: int, K: int, V: int, T: int) -> int:
    """As `chunkwise`, for the delta rule: besides, in a chunk, the system 2 C K, its solution C (K + V), and what the
    state already holds 2 K V.
    """
    C = min(T, CHUNK)
    return chunkwise(heads, K, V, T) + heads * (2 * C * K + C * (K + V) + 2 * K * V)
