"""The optimiser and its schedule."""

import math

import torch
from torch import nn

from glalm.config import OptimConfig


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW that decays the matrices of linear layers alone: not embeddings, norms or biases."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    linear -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # tied heads are embeddings
    decayed = [p for p in model.parameters() if id(p) in linear]
    others = [p for p in model.parameters() if id(p) not in linear]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.min_lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of optimiser step `step` (counted from 1) of `steps`.

    Linear from min_lr to lr over warmup_steps, then a cosine to min_lr, reached at the last step. A pure function,
    so that a resumed run needs no scheduler state.
    """
    if step <= config.warmup_steps:
        fraction = step / config.warmup_steps
    else:
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        fraction = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + fraction * (config.lr - config.min_lr)
