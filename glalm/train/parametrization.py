"""The maximal update parametrization: how initial weights and learning rates change with a model's width and depth.

It is that of Tensor Programs V (Yang et al., arXiv 2203.03466) for width, in the form of the spectral condition (Yang,
Simon and Bernstein, arXiv 2310.17813), and of CompleteP for depth (Dey et al., arXiv 2505.01618, alpha = 1).

The papers multiply outputs of layers, too. For AdamW and Muon, an output multiplier c is the same as c times the
layer's initial weight, c times its learning rate and 1 / c times its eps. So the forward pass is that of the standard
parametrization, and whatever reads a checkpoint needs no multipliers.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from glalm.config.run import OptimConfig, build_base_config
from glalm.config.strict import ConfigError
from glalm.model.config import ModelConfig
from glalm.model.decoder import Block, CausalLM, SwiGLU
from glalm.model.layers import ParameterUses, SumOver


@dataclass(frozen=True)
class Multipliers:
    """By what a parameter's initial value and its optimizer's settings are multiplied, compared with the base model."""

    init: float = 1.0
    adam_lr: float = 1.0
    muon_lr: float = 1.0
    eps: float = 1.0  # AdamW's, which must shrink as the gradients do


UNSCALED = Multipliers()


def find_multipliers(config: ModelConfig, optim: OptimConfig) -> dict[str, Multipliers]:
    """Return {name: multipliers} of all parameters of a CausalLM, by comparing their shapes with the base model's.

    Let a parameter sum over n_in times as many inputs as in the base model and give n_out times as many outputs, with
    blocks in a network L times as deep. Then the parameter has

        initial weights   n_in^-1/2 min(1, (n_out / n_in)^1/2), which is n_in^-1 if n_out = 1, as for the head
        AdamW's rate      n_in^-1, or n_in^-1/2 if the use says `unit_norm`
        Muon's rate       (n_out / n_in)^1/2 m^-1/2, where max(rows, columns) grows by m and Muon's updates by m^1/2
        eps               n_out^-1, and L^-1 in a block, as the gradients shrink

    If the base model is the larger one, max stands in place of min, so that there and back gives 1.

    Gains, biases, decays and embeddings, which sum over no inputs that grow, have n_in = 1. On top of this, the last
    layer of a block's branch has an output multiplier of L^-1. The queries of softmax attention have one of d^-1/2, if
    heads are d times as large as in the base model, so that their products with keys shrink by d instead of d^1/2.

    Raises:
        ConfigError: It is not known how a parameter is used, or which layer computes the output of a mixer.
    """
    with torch.device("meta"):
        model = CausalLM(config)
        base = CausalLM(build_base_config(config, optim))
    depth = config.num_hidden_layers / (optim.base_depth or config.num_hidden_layers)
    output_multipliers = find_output_multipliers(model, base, depth)
    multipliers = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            use = find_use(module, name, path)
            shape = base.get_submodule(path).get_parameter(name).shape
            # Modules that declare how they use a parameter also choose its initial value.
            has_own_initial_value = name in getattr(module, "sums_over", {})
            is_drawn = isinstance(module, nn.Linear) and name == "weight" and not has_own_initial_value
            block_depth = depth if path.startswith("model.layers.") else 1.0
            output = output_multipliers.get(path, 1.0)
            multipliers[f"{path}.{name}"] = scale_parameter(parameter.shape, shape, use, is_drawn, block_depth, output)
    return multipliers


def scale_parameter(
    shape: torch.Size, base: torch.Size, use: SumOver | None, is_drawn: bool, depth: float, output: float
) -> Multipliers:
    """Return the multipliers of one parameter.

    Args:
        shape: The parameter's shape.
        base: Its shape in the base model.
        use: Over which axis the parameter is summed.
        is_drawn: Whether its initial values are drawn from one normal distribution for all widths. Modules that choose
            their own initial values choose them well for every width.
        depth: How many times as deep the network is, for parameters in blocks, else 1.
        output: The output multiplier of the parameter's layer.
    """
    n_in = 1.0 if use is None else shape[use.axis] / base[use.axis]
    n_out = math.prod(shape) / math.prod(base) / n_in
    rate = n_in**-0.5 if use is not None and use.unit_norm else 1 / n_in
    spread = math.sqrt(n_out / n_in)
    drawn = n_in**-0.5 * (min(1.0, spread) if n_in * n_out >= 1 else max(1.0, spread))
    return Multipliers(
        init=output * (drawn if is_drawn else 1.0),
        adam_lr=output * rate,
        muon_lr=output * math.sqrt(n_out / n_in * max(base, default=1) / max(shape, default=1)),
        eps=1 / (n_out * depth * output),
    )


def find_use(module: nn.Module, name: str, path: str) -> SumOver | None:
    """Return over which axis the module `path` sums its own parameter `name`, None if over none.

    Raises:
        ConfigError: `sums_over` of the module does not name the parameter, and the module is no known layer of torch's.
    """
    declared: ParameterUses = getattr(module, "sums_over", {})
    if name in declared:
        return declared[name]
    if isinstance(module, nn.Linear) and name in ("weight", "bias"):
        return SumOver(1) if name == "weight" else None
    if isinstance(module, nn.Embedding) and name == "weight":
        return SumOver(0)  # Looking up a row is the product with a vector that has a number for each row.
    if isinstance(module, (nn.RMSNorm, nn.LayerNorm)) and name in ("weight", "bias"):
        return None
    raise ConfigError(
        f"optim.parametrization=mup does not know how the parameter {path}.{name} is used. Add {name!r} to the dict "
        f"sums_over of the class {type(module).__name__}: SumOver(axis) if the forward pass sums its products with "
        "inputs over an axis, or else None (glalm.model.layers.SumOver). Or set optim.parametrization=standard"
    )


def find_output_multipliers(model: CausalLM, base: CausalLM, depth: float) -> dict[str, float]:
    """Return {path: output multiplier} of the layers that have one, for a network `depth` times as deep as the base.

    Raises:
        ConfigError: `depth` is not 1, and a mixer has no layer of the name in its `output_layer`.
    """
    found = {}
    for i, (block, base_block) in enumerate(zip(model.model.layers, base.model.layers, strict=True)):
        assert isinstance(block, Block) and isinstance(base_block, Block)
        mixer = block.attn
        if depth != 1 and not hasattr(mixer, mixer.output_layer):
            raise ConfigError(
                f"optim.base_depth scales the output of each mixer, but {type(mixer).__name__} has no layer "
                f"{mixer.output_layer!r}. Set its class variable output_layer to the name of the layer that computes "
                "the output, or set optim.base_depth=null"
            )
        found[f"model.layers.{i}.attn.{mixer.output_layer}"] = 1 / depth
        found[f"model.layers.{i}.mlp.{SwiGLU.output_layer}"] = 1 / depth
        if mixer.softmax_query_layer is not None:
            query = f"model.layers.{i}.attn.{mixer.softmax_query_layer}"
            found[query] = math.sqrt(base_block.attn.head_dim / mixer.head_dim)
    return found
