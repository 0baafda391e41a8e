"""Train the blocks' large linear layers in float8, whose peak is twice that of bfloat16, by torchao."""

from types import MethodType
from typing import TypeGuard

import torch
from torch import Tensor, nn

from glalm.config.strict import ConfigError, require
from glalm.model.decoder import CausalLM
from glalm.model.plain import is_plain_linear
from glalm.train.state import BatchPlan

MIN_CAPABILITY = (8, 9)
MIN_FEATURES = 512  # Smaller products do not save as much time as the casts take.
ALIGNMENT = 16  # The dimensions of a float8 product must be multiples of this.


def check_float8_support(plan: BatchPlan, device: torch.device) -> None:
    """Raise ConfigError if train.float8=true needs another machine, package or batch.

    It needs torchao, a GPU with float8, and a multiple of ALIGNMENT tokens per forward pass.
    """
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"train.float8=true needs torchao ({error}). Run pip install 'torchao>=0.18', or set train.float8=false."
        ) from error
    has_gpu = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if has_gpu else (0, 0)
    found = f"{torch.cuda.get_device_name()} of {capability[0]}.{capability[1]}" if has_gpu else "a CPU"
    require(
        capability >= MIN_CAPABILITY,
        "train.float8=true needs a GPU of CUDA capability 8.9 or more (L40S, H100, H200, B200), but this is "
        f"{found}. Set train.float8=false.",
    )
    tokens = plan.micro_batch * plan.shard_length
    require(
        tokens % ALIGNMENT == 0,
        f"train.float8=true: a forward pass has {tokens} tokens, which is not a multiple of {ALIGNMENT}. Change "
        "train.micro_batch_size, data.seq_len, train.tbptt_length or parallel.context, or set train.float8=false.",
    )


def convert_to_float8(model: CausalLM) -> None:
    """Let the large linear layers of the blocks train in float8, in place. Call this before sharding and compiling.

    The products x W^T, dy W and dy^T x take x [.., in] and W [out, in] in e4m3 and dy [.., out] in e5m2. Each is cast
    with one scale that maps its largest absolute value to float8's. The results are bfloat16, as under autocast.

    The parameters stay float32 and keep their names, so optimizers, checkpoints and exports are the same, and a run may
    be resumed with or without float8. In evaluation mode the layers compute as plain ones, as they do for everyone who
    loads the model. Shards are gathered in bfloat16 as without float8.

    Raises:
        ConfigError: No layer is large enough.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    layers = model.model.layers
    names = [name for name, module in layers.named_modules() if is_large_linear(module)]
    require(
        len(names) > 0,
        f"train.float8=true: no linear layer of the blocks has {MIN_FEATURES} or more features on both sides, in "
        f"multiples of {ALIGNMENT}. Set train.float8=false.",
    )
    # 1.3B on an H200: 71.9k tokens/s with a scale per tensor, 56.7k with one per row ("rowwise"), 61.9k in bfloat16.
    recipe = Float8LinearConfig.from_recipe_name("tensorwise")
    convert_to_float8_training(layers, config=recipe, module_filter_fn=lambda module, _: is_large_linear(module))
    for name in names:
        linear = layers.get_submodule(name)
        linear.forward = MethodType(_forward_in_float8_if_training, linear)


def is_large_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether float8 makes this module faster.

    It does not for the low-rank projections of gates. torchao's layer would ignore hooks and parametrizations.
    """
    if not is_plain_linear(module, bias=True):
        return False
    sides = (module.in_features, module.out_features)
    return min(sides) >= MIN_FEATURES and all(side % ALIGNMENT == 0 for side in sides)


def _forward_in_float8_if_training(linear: nn.Linear, x: Tensor) -> Tensor:
    layer_type = type(linear) if linear.training else nn.Linear
    return layer_type.forward(linear, x)
