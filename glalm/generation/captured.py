"""What a captured decoding step has fixed of its model, so that it is not replayed after the model has changed."""

import dataclasses

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from glalm.hf import GLALMForCausalLM
from glalm.model.plain import hooks_of_call, is_plain_tensor

# The attributes that every module has: its hooks, tensors and submodules, and `training`.
MODULE_ATTRIBUTES = vars(nn.Module()).keys()
SCALARS = (int, float, str, bytes, type(None), torch.dtype, torch.device)


def fixed_in_graph(model: GLALMForCausalLM, states: list) -> list:
    """Return a value that differs from an earlier one if a step captured then may compute something else than now.

    It has autocast, the states' shapes and dtypes, the classes of all modules, their forward methods, training flags,
    attributes and hooks, and the addresses of all tensors, whose values a captured step follows.
    """
    device = tree_leaves(states)[0].device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    modules = []
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        calls = [kind, kind.forward, kind.__call__, module.training]
        hooks = [(place, describe_value(hooks)) for place, hooks in enumerate(hooks_of_call(module)) if hooks]
        attributes = {key: value for key, value in vars(module).items() if key not in MODULE_ATTRIBUTES}
        values = [describe_value(each) for each in (attributes, module._parameters, module._buffers)]
        modules.append([name, *calls, hooks, *values])
    return [autocast, shapes_and_dtypes(states), modules]


def shapes_and_dtypes(states: list) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in tree_leaves(states)]


def describe_value(value: object) -> object:
    """Return a value that differs from an earlier one if the attribute `value` was replaced or changed."""
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, Tensor) and is_plain_tensor(value):  # where its memory is, and how it is read
        return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()
        return type(value), [describe_value(getattr(value, name)) for name in names], describe_value(context)
    if isinstance(value, dict):
        return [(describe_value(key), describe_value(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [describe_value(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return describe_value(vars(value))
    return Identity(value)


class Identity:
    """Equals those of the same object alone, which it keeps alive, so that no other object can take its place."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.value is other.value
