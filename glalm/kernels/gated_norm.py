"""RMSNorm over the last axis, followed by an output gate.

    y = x / sqrt(mean_i x_i^2 + eps) * weight * activation(gate)

On CUDA, a Triton kernel computes it, and another all of its gradients in one pass (triton/gated_norm.py). On other
devices and in float64, PyTorch does.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels import common

MAX_WIDTH = 8192  # A program of the kernels holds whole rows in registers.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}
Activation = Literal["silu", "sigmoid"]


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: Activation = "silu") -> Tensor:
    """Normalize x over its last axis by its root mean square, and multiply by weight * activation(gate).

    All sums are in float32 (float64 for float64 inputs), also those of the gradients. On CUDA it is differentiable
    once. In PyTorch, derivatives of any order and mode come from autograd.

    Args:
        x: [..., V], floating point. On CUDA, kernels serve V up to 8192, and PyTorch more.
        gate: [..., V], floating point.
        weight: [V], in any floating-point dtype.
        eps: the number that is added to the mean square.
        activation: "silu" or "sigmoid".

    Returns:
        [..., V] in the dtype to which PyTorch promotes those of x and gate.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        NotImplementedError: on CUDA, under torch.func's transforms, in forward-mode differentiation, and in double
            backward.
    """
    check_arguments(x, gate, weight, activation)
    if not (common.has_kernel(x) and common.has_kernel(gate)) or len(weight) > MAX_WIDTH:
        dtype = torch.promote_types(x.dtype, gate.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        y = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)
        return (y * ACTIVATIONS[activation](gate.to(wide))).to(dtype)
    common.refuse_transforms("gated_rms_norm", x, gate, weight)
    if common.needs_gradient(x, gate, weight):
        return GatedRMSNormalization.apply(x, gate, weight, eps, activation)
    return forward_operator(x, gate, weight, eps, activation)


def check_arguments(x: Tensor, gate: Tensor, weight: Tensor, activation: str) -> None:
    """Check shapes, dtypes, devices and the name of the activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation}")
    if gate.shape != x.shape:
        raise ValueError(f"gate: expected the shape of x, {list(x.shape)}, got {list(gate.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight: expected [{x.shape[-1]}], as many numbers as x has channels, got {list(weight.shape)}"
        )
    for name, tensor in {"x": x, "gate": gate, "weight": weight}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected a tensor on the device of x, {x.device}, got one on {tensor.device}")


class GatedRMSNormalization(torch.autograd.Function):
    """Differentiate the forward operator by the backward operator."""

    @staticmethod
    def forward(ctx, x, gate, weight, eps, activation):
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        ctx.activation = activation
        return forward_operator(x, gate, weight, eps, activation)

    @staticmethod
    def backward(ctx, dy):
        common.refuse_transformed_gradients("gated_rms_norm", dy)
        inputs = ctx.saved_tensors
        with torch.no_grad():
            grads = backward_operator(*inputs, dy, ctx.eps, ctx.activation)
        return *common.refuse_double_backward("gated_rms_norm", grads, (*inputs, dy)), None, None


# Registered operators, for CUDA only ------------------------------------------------------------------------


def norm_forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    """Compute y."""
    from glalm.kernels.triton import gated_norm  # A machine without a GPU may lack Triton.

    return gated_norm.forward(x, gate, weight, eps, activation)


def norm_forward_fake(x, gate, weight, eps, activation) -> Tensor:
    """Return an uninitialized tensor of the shape and dtype that norm_forward returns."""
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, gate.dtype))


def norm_backward(
    x: Tensor, gate: Tensor, weight: Tensor, dy: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, gate and weight."""
    from glalm.kernels.triton import gated_norm

    return gated_norm.backward(x, gate, weight, dy, eps, activation)


def norm_backward_fake(x, gate, weight, dy, eps, activation) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialized tensors of the shapes and dtypes that norm_backward returns."""
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


forward_operator = common.register_operator("gated_rms_norm", norm_forward, norm_forward_fake)
backward_operator = common.register_operator("gated_rms_norm_backward", norm_backward, norm_backward_fake)
