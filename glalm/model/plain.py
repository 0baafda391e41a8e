"""Whether a module computes what its class says, so that a fast path may read its weight instead of calling it."""

import sys
from collections.abc import Callable
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module


def is_defined_in(kind: type[nn.Module], method: Callable) -> bool:
    """Return whether the code of a class's method is in the file of the class: hardly any replacement's is."""
    code = getattr(method, "__code__", None)
    return code is not None and code.co_filename == getattr(sys.modules[kind.__module__], "__file__", None)


LINEAR_FORWARD = nn.Linear.forward if is_defined_in(nn.Linear, nn.Linear.forward) else None


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
    """Return whether calling the module runs the forward method of its class without any hook.

    A class may define a call around that of nn.Module, as transformers 5.17's layers with gradient checkpointing do.
    This is a part of what the class computes, unless it has been replaced.
    """
    kind = type(module)
    is_class_call = kind.__call__ is nn.Module._wrapped_call_impl
    # torch.compile asks for linear layers, whose class defines none, and could not trace these lines.
    if not is_class_call and nn.Module.__call__ is nn.Module._wrapped_call_impl:
        owner = next(each for each in kind.__mro__ if "__call__" in vars(each))
        is_class_call = is_defined_in(owner, owner.__call__)
    is_forward_called = "forward" not in module.__dict__ and "_call_impl" not in module.__dict__
    return is_class_call and is_forward_called and not any(hooks_of_call(module))


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
