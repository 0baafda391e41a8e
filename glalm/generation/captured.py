"""What a captured decoding step has fixed of its model, so that it is not replayed after the model has changed."""

import dataclasses

import torch
from torch import Tensor, nn

from glalm.model.plain import hooks_of_call, is_plain_tensor

# The attributes that every module has: its hooks, tensors and submodules, and `training`.
MODULE_ATTRIBUTES = vars(nn.Module()).keys()
SCALARS = (int, float, str, bytes, type(None), torch.dtype, torch.device)


def describe_model(model: nn.Module) -> list:
    """Return a value that differs from an earlier one if a step captured then may compute something else than now.

    It has the classes of all modules, their forward methods, training flags, attributes and hooks, and the addresses of
    all tensors, whose values a captured step follows.
    """
    return [
        [name, *describe_module(module), describe_value(module._parameters), describe_value(module._buffers)]
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def describe_module(module: nn.Module) -> list:
    """Return what decides how the module computes, without its tensors and submodules."""
    kind = type(module)
    attributes = {name: value for name, value in vars(module).items() if name not in MODULE_ATTRIBUTES}
    hooks = [(place, describe_value(hooks)) for place, hooks in enumerate(hooks_of_call(module)) if hooks]
    return [kind, kind.forward, kind.__call__, module.training, hooks, describe_value(attributes)]


def describe_value(value: object) -> object:
    """Return a value that differs from an earlier one if the attribute `value` was replaced or changed."""
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, Tensor):
        return describe_tensor(value)
    if isinstance(value, dict):
        return [(describe_value(key), describe_value(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [describe_value(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return describe_value(vars(value))
    # Functions and most other objects are equal to themselves alone. While they are in the list, no other one can have
    # the same id.
    return value if type(value).__eq__ is object.__eq__ else id(value)


def describe_tensor(x: Tensor) -> object:
    """Return where the tensor's memory is and how it is read."""
    if is_plain_tensor(x):
        return x.device, x.data_ptr(), x.dtype, x.shape, x.stride()
    if hasattr(x, "__tensor_flatten__"):
        names, context = x.__tensor_flatten__()
        return type(x), [describe_value(getattr(x, name)) for name in names], describe_value(context)
    return id(x)
