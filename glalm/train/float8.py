"""Training with the blocks' large linear layers in float8, whose peak is twice bfloat16's. By torchao."""

from types import MethodType

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from glalm.config.run import RunConfig
from glalm.config.strict import ConfigError, require
from glalm.model.decoder import CausalLM
from glalm.train.state import BatchPlan

CAPABILITY = (8, 9)
SMALLEST = 512  # features: of a smaller product the casts are too large a part
MULTIPLE = 16  # of which the sides of a float8 product must be


def check_float8_support(config: RunConfig, accelerator: Accelerator) -> None:
    """Raises ConfigError where train.float8=true cannot be had: no torchao, no such GPU, an odd number of tokens."""
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"train.float8=true needs torchao ({error}); pip install 'torchao>=0.18', or write train.float8=false"
        ) from error
    cuda = accelerator.device.type == "cuda"
    found = torch.cuda.get_device_capability(accelerator.device) if cuda else (0, 0)
    require(
        found >= CAPABILITY,
        "train.float8=true needs a GPU of CUDA capability 8.9 or more (L40S, H100, H200, B200), and this is "
        + (f"{torch.cuda.get_device_name()} of {found[0]}.{found[1]}" if cuda else "a CPU")
        + "; write train.float8=false",
    )
    plan = BatchPlan.from_config(config, accelerator.num_processes)
    tokens = plan.micro_batch * plan.segment_length
    require(
        tokens % MULTIPLE == 0,
        f"train.float8=true: a process has {tokens} tokens at once, no multiple of {MULTIPLE}; write such a "
        "train.micro_batch_size, data.seq_len or train.tbptt_length, or train.float8=false",
    )


def convert_to_float8(model: CausalLM) -> None:
    """Makes the large linear layers of the blocks train in float8, in place. Before prepare_blocks and sharding.

    The products x W^T, dy W and dy^T x are of e4m3 x [.., in] and W [out, in] and e5m2 dy [.., out], each cast with one
    scale that takes its largest absolute value to float8's; they come out in bfloat16, as under autocast. What is not
    `is_large` stays as it is, and so do embeddings and head.

    Parameters stay what they are too, float32 and by the same names: optimisers, checkpoints and exports know nothing
    of it, and a run may go on with or without. Only training computes in float8: in eval mode, for validation and
    evaluations, the layers are plain ones, as for those who load the model. Shards are gathered in bfloat16 as ever.

    Raises ConfigError when no layer is large.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    layers = model.model.layers
    names = [name for name, module in layers.named_modules() if is_large(module)]
    require(
        bool(names),
        f"train.float8=true: no linear layer of the blocks has {SMALLEST} features or more on both sides, in multiples "
        f"of {MULTIPLE}; write train.float8=false",
    )
    # 1.3B on an H200: 71.9k tokens/s with a scale a tensor, 56.7k with one a row ("rowwise"), 61.9k in bfloat16.
    recipe = Float8LinearConfig.from_recipe_name("tensorwise")
    convert_to_float8_training(layers, config=recipe, module_filter_fn=lambda module, _: is_large(module))
    for name in names:
        linear = layers.get_submodule(name)
        linear.forward = MethodType(forward, linear)


def is_large(module: nn.Module) -> bool:
    """Whether it is a linear layer for which float8 pays: not the low-rank ones of gates. Nor a subclass of nn.Linear,
    whose forward is its own."""
    if type(module) is not nn.Linear:
        return False
    sides = module.in_features, module.out_features
    return min(sides) >= SMALLEST and all(side % MULTIPLE == 0 for side in sides)


def forward(linear: nn.Linear, x: Tensor) -> Tensor:
    return (type(linear) if linear.training else nn.Linear).forward(linear, x)
