"""Measure what happens inside of the model's layers: gates, states, activations, and gradients by group.

Training does this every `train.statistics_every` steps, on one sequence of the batch, in a forward pass of its own. The
training step, compiled or not, is not touched, and the weights do not change by it.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from glalm.model.cache import StateCache
from glalm.model.decoder import Block, CausalLM
from glalm.model.mixers.base import Mixer
from glalm.train.parallel import gradient_norm

OPEN_GATE = 0.999  # A gate above this keeps almost everything,
CLOSED_GATE = 0.001  # and one below this almost nothing. Both are saturated: their gradient is close to 0.


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradient norm over all processes of each group of parameters, as scalars on the device."""
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        groups[parameter_group(name)].append(parameter)
    return {f"grad_norm/{group}": gradient_norm(parameters) for group, parameters in sorted(groups.items())}


def parameter_group(name: str) -> str:
    """Return the group of a parameter: embeddings, head, norms, mixers (all but their norms) or mlps."""
    if "norm" in name:
        return "norms"
    if ".layers." in name:
        return "mlps" if ".mlp." in name else "mixers"
    return "head" if name.startswith("lm_head.") else "embeddings"


@contextmanager
def observe_layers(model: CausalLM) -> Iterator[dict[str, Tensor]]:
    """Collect the statistics of each layer in forward passes inside of the block.

    Yields:
        {"layers/N/NAME": scalar on the device}, which the forward passes fill. NAME is `retention`, `half_life` and
        `saturated` of mixers whose gates depend on the token, see `describe_gates`; `q_rms` and `k_rms`, the root mean
        squares of the query and key projections; and `output_rms`, that of the residual stream after the layer.
    """
    statistics: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []
    for layer, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        handles.append(block.register_forward_hook(partial(_record_rms, statistics, f"layers/{layer}/output_rms")))
        observe_gates = partial(_observe_gates, statistics, f"layers/{layer}/")
        handles.append(block.attn.register_forward_pre_hook(observe_gates))
        for name in ("q", "k"):
            projection = getattr(block.attn, f"{name}_proj", None)
            if projection is not None:
                hook = partial(_record_rms, statistics, f"layers/{layer}/{name}_rms")
                handles.append(projection.register_forward_hook(hook))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


def state_norms(cache: StateCache) -> dict[str, Tensor]:
    """Return the root mean square of each layer's state after the sequence. Softmax attention's is its cache."""
    norms = {}
    for layer, state in enumerate(cache.states):
        leaves = [leaf for leaf in tree_leaves(state) if leaf.is_floating_point()]
        if leaves:
            norms[f"layers/{layer}/state_rms"] = root_mean_square(leaves[0])
    return norms


def describe_gates(log_gates: Tensor) -> dict[str, Tensor]:
    """Return what log forget gates [B, T, H, K] or [B, T, H] say about a layer's memory.

    Returns:
        `retention`, the mean of the gates; `half_life`, after how many tokens half of what was stored is left, the
        median over heads and channels; `saturated`, the share of gates above OPEN_GATE or below CLOSED_GATE.
    """
    log_gates = log_gates.detach().float()
    gates = log_gates.exp()
    # A channel's state decays by the sum of its log gates. The smallest positive number stands for a gate that is 1.
    decay = (-log_gates.mean((0, 1))).clamp(min=torch.finfo(torch.float32).tiny)
    is_saturated = (gates > OPEN_GATE) | (gates < CLOSED_GATE)
    half_life = (math.log(2) / decay).median()
    return {"retention": gates.mean(), "half_life": half_life, "saturated": is_saturated.float().mean()}


def root_mean_square(x: Tensor) -> Tensor:
    return x.detach().float().square().mean().sqrt()


def _record_rms(
    statistics: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple, output: Tensor | tuple
) -> None:
    # A block returns the residual stream and a state.
    statistics[name] = root_mean_square(output[0] if isinstance(output, tuple) else output)


def _observe_gates(statistics: dict[str, Tensor], prefix: str, mixer: Mixer, inputs: tuple) -> None:
    log_gates = mixer.compute_log_gate(inputs[0])
    if log_gates is not None:
        described: Mapping[str, Tensor] = describe_gates(log_gates)
        statistics |= {f"{prefix}{name}": value for name, value in described.items()}
