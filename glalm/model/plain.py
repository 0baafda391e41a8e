"""Whether a module computes what its class says, so that a fast path may read its weight instead of calling it."""

import sys
from collections.abc import Callable
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module


def original_forward(kind: type[nn.Module]) -> Callable | None:
    """Return the forward method that torch defines for its class `kind`, or None if it has been replaced."""
    code = getattr(kind.forward, "__code__", None)
    defined_here = code is not None and code.co_filename == sys.modules[kind.__module__].__file__
    return kind.forward if defined_here else None


LINEAR_FORWARD = original_forward(nn.Linear)


def is_plain_linear(module: nn.Module, bias: bool = False) -> TypeGuard[nn.Linear]:
    """Return whether module(x) is F.linear(x, module.weight) and nothing else, so that its weight describes it.

    It is not for subclasses, adapters, parametrizations, pruned or weight-normed layers, hooks of any kind (accelerate
    loads weights by them), a replaced forward or F.linear, or weights of a tensor subclass, as those of quantized
    models are, or that are sparse.

    Args:
        bias: Whether the module may have a bias, too.
    """
    return (
        type(module) is nn.Linear
        and nn.Linear.forward is LINEAR_FORWARD
        and F.linear is torch._C._nn.linear
        and is_called_plainly(module)
        and is_plain_tensor(module.weight)
        and (module.bias is None or (bias and is_plain_tensor(module.bias)))
    )


def is_plain_tensor(x: Tensor) -> bool:
    """Return whether x has each of its elements in memory, unlike quantized, sharded and sparse weights."""
    return type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided


def is_called_plainly(module: nn.Module) -> bool:
    """Return whether calling the module runs the forward method of its class without any hook."""
    is_class_call = type(module).__call__ is nn.Module._wrapped_call_impl and "_call_impl" not in module.__dict__
    return is_class_call and "forward" not in module.__dict__ and not any(hooks_of_call(module))


def hooks_of_call(module: nn.Module) -> tuple[dict, ...]:
    """Return the hooks, by their ids, that calling the module or its backward pass runs: its own and all modules'."""
    return (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_forward_hooks,
        torch_module._global_backward_pre_hooks,
        torch_module._global_backward_hooks,
    )
