"""The optimisers and their learning rate."""

import math

import torch
from torch import nn

from glalm.config.run import OptimConfig, RunConfig


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Fused AdamW, or, with optim.name=muon, Muon (Jordan 2024) for the blocks' matrices and AdamW for all else.

    Weights of linear layers decay; embeddings, norms, biases and other parameters do not. Muon's update is scaled to
    the size of AdamW's (Liu et al., arXiv 2502.16982), so that one learning rate serves both. Parameters may be
    DTensors: Muon's products then run on the shards, with the communication they need. Every group has "initial_lr",
    the peak.
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    linear -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # tied heads are embeddings
    named = [(name, p, id(p) in linear) for name, p in model.named_parameters()]
    matrices = [p for name, p, decays in named if decays and config.name == "muon" and ".layers." in name]
    by_muon = {id(p) for p in matrices}
    decayed = [p for _, p, decays in named if decays and id(p) not in by_muon]
    others = [p for _, p, decays in named if not decays]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "initial_lr": config.lr},
        {"params": others, "weight_decay": 0.0, "initial_lr": config.lr},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.min_lr, betas=config.betas, eps=config.eps, fused=True)
    if config.name == "adamw":
        return [adamw]
    muon = torch.optim.Muon(
        [{"params": matrices, "initial_lr": config.lr}],
        lr=config.min_lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, adamw]


def learning_rate(step: int, config: RunConfig) -> float:
    """The learning rate of optimiser step `step`, counted from 1: a pure function, so that resuming needs no state.

    From optim.min_lr linearly to optim.lr over the warm-up, then by optim.schedule:

        cosine, linear   back to min_lr, reached at the last step
        wsd              lr, and over the last optim.decay_fraction of all steps to min_lr, by 1 - x or 1 - sqrt(x)
                         (Hägele et al., arXiv 2405.18392)
        constant         lr
    """
    optim, steps, warmup = config.optim, config.steps, config.warmup_steps
    if step <= warmup:
        share = step / warmup
    else:
        share = _after_warmup(step, steps, warmup, optim)
    return optim.min_lr + share * (optim.lr - optim.min_lr)


def _after_warmup(step: int, steps: int, warmup: int, optim: OptimConfig) -> float:
    if optim.schedule == "wsd":
        decay = min(steps - warmup, math.ceil(optim.decay_fraction * steps))
        x = max(0.0, 1 - (steps - step) / decay)
        return 1 - math.sqrt(x) if optim.decay_shape == "sqrt" else 1 - x
    x = (step - warmup) / (steps - warmup)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * x)), "linear": 1 - x, "constant": 1.0}[optim.schedule]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
