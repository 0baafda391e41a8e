"""Optimizers and their learning rate."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from glalm.config.run import OptimConfig, RunConfig
from glalm.model.decoder import CausalLM
from glalm.train.muon import Muon
from glalm.train.parametrization import UNSCALED, find_multipliers

# How a schedule goes from 1 to 0, by the part of it that is over. A constant one stays at 1.
DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
}


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[Optimizer]:
    """Return fused AdamW, or with optim.name=muon, Muon for the blocks' matrices and AdamW for the rest.

    Only the weights of linear layers decay, not embeddings, norms, biases and other parameters. One learning rate
    serves both, because Muon's updates are scaled to the size of AdamW's. Parameters may be DTensors. Every parameter
    group has "lr_multiplier", which is 1 without optim.parametrization=mup.
    """
    multipliers = None
    if config.parametrization == "mup":
        assert isinstance(model, CausalLM)
        multipliers = find_multipliers(model.config, config)
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    # A head that is tied to the embeddings counts as embeddings.
    linear -= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    muon_groups: list[dict[str, Any]] = []
    adamw_groups: list[dict[str, Any]] = []
    for name, parameter in model.named_parameters():
        scale = UNSCALED if multipliers is None else multipliers[name]
        weight_decay = config.weight_decay if id(parameter) in linear else 0.0
        if config.name == "muon" and id(parameter) in linear and ".layers." in name:
            add_parameter(muon_groups, parameter, config, scale.muon_lr, weight_decay)
        else:
            add_parameter(adamw_groups, parameter, config, scale.adam_lr, weight_decay, eps=config.eps * scale.eps)
    adamw = torch.optim.AdamW(adamw_groups, lr=config.min_lr, betas=config.betas, eps=config.eps, fused=True)
    if config.name == "adamw":
        return [adamw]
    muon = Muon(
        muon_groups,
        lr=config.min_lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        orthogonalization=config.orthogonalization,
        neuron_beta=config.neuron_beta,
    )
    return [muon, adamw]


def add_parameter(
    groups: list[dict[str, Any]],
    parameter: nn.Parameter,
    config: OptimConfig,
    lr_multiplier: float,
    weight_decay: float,
    **settings: float,
) -> None:
    """Add a parameter to the one of an optimizer's groups that has its settings, or to a new one.

    AdamW and Muon multiply the decay by the learning rate. Dividing it by the multiplier of the rate lets weights of
    all widths decay alike.
    """
    settings |= {
        "lr_multiplier": lr_multiplier,
        "lr": config.min_lr * lr_multiplier,
        "weight_decay": weight_decay / lr_multiplier,
    }
    for group in groups:
        if group.items() >= settings.items():
            group["params"].append(parameter)
            return
    groups.append({"params": [parameter], **settings})


def learning_rate(step: int, config: RunConfig) -> float:
    """Return the learning rate of optimizer step `step`, counted from 1.

    Where the schedules of a stage change the batch by a factor of x, the rate below is multiplied by sqrt(x), the rule
    for Adam of Malladi et al. (arXiv 2205.10287), or as the stage's batch_rule says otherwise.

    It rises linearly from optim.min_lr to optim.lr during the warm-up, then follows optim.schedule:

        cosine, linear   down to min_lr at the last step
        wsd              lr, then down to min_lr over the last optim.decay_fraction of all steps, as 1 - x or as
                         1 - sqrt(x) (Hägele et al., arXiv 2405.18392)
        constant         lr

    With schedules of train.stages, it follows that of each stage instead, in the first one from optim.lr, and then from
    where the stage before left it without the factor of its batch.

    Resuming needs no state but what `RunConfig.resume_at` records. A warm-up or a run whose length is set in tokens
    progresses by tokens, so that a resume with another batch neither shifts nor shortens it.
    """
    optim = config.optim
    if step > config.warmup_steps and config.has_stage_schedules:
        rate = _stage_learning_rate(step, config)
    else:
        rate = optim.min_lr + _schedule_fraction(step, config) * (optim.lr - optim.min_lr)
    return rate * config.phase_at(step).lr_factor


def _stage_learning_rate(step: int, config: RunConfig) -> float:
    """Return the learning rate after the warm-up in a run whose stages have schedules."""
    assert config.train.stages is not None
    start_rate = config.optim.lr
    for name, steps in config.stage_steps.items():
        stage = config.train.stages[name]
        end_rate = start_rate if stage.lr is None else stage.lr
        if step in steps:
            start = config.tokens_at(max(steps.start - 1, config.warmup_steps))
            x = (config.tokens_at(step) - start) / (config.tokens_at(steps.stop - 1) - start)
            return end_rate + DECAYS[stage.schedule or "constant"](x) * (start_rate - end_rate)
        start_rate = end_rate
    return start_rate


def _schedule_fraction(step: int, config: RunConfig) -> float:
    """Return where the learning rate lies between optim.min_lr, which is 0, and optim.lr, which is 1."""
    optim = config.optim
    is_warmup = step <= config.warmup_steps
    by_tokens = optim.warmup_tokens is not None if is_warmup else config.train.steps is None
    # How far the run is after these steps: the steps themselves, or their tokens in units of the last batch.
    steps = (step, config.warmup_steps, config.steps)
    unit = config.phases[-1].config.tokens_per_step
    now, warmup, end = (config.tokens_at(n) / unit if by_tokens else n for n in steps)
    if is_warmup:
        return now / warmup
    if optim.schedule == "wsd":
        decay_steps = min(end - warmup, math.ceil(optim.decay_fraction * end))
        return DECAYS[optim.decay_shape](max(0.0, 1 - (end - now) / decay_steps))
    return DECAYS[optim.schedule]((now - warmup) / (end - warmup))


def set_learning_rate(optimizers: Iterable[Optimizer], lr: float) -> None:
    """Set the learning rate of all parameter groups, times the multiplier of each."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
