"""RMSNorm over the last axis, followed by a swish output gate.

    y = x / sqrt(mean_i x_i^2 + eps) * weight * silu(gate)

On CUDA, a Triton kernel computes it, and another all of its gradients in one pass (triton/gated_norm.py). On other
devices and in float64, PyTorch does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels import common

MAX_WIDTH = 8192  # A program of the kernels holds whole rows in registers.


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize x over its last axis by its root mean square, and multiply by weight * silu(gate).

    All sums are in float32 (float64 for float64 inputs), also those of the gradients. On CUDA it is differentiable
    once. In PyTorch, derivatives of any order and mode come from autograd.

    Args:
        x: [..., V], floating point. On CUDA, V is at most 8192.
        gate: [..., V], in x's dtype.
        weight: [V], in any floating-point dtype.
        eps: the number that is added to the mean square.

    Returns:
        [..., V] in x's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        NotImplementedError: on CUDA, under torch.func's transforms, in forward-mode differentiation, and in double
            backward.
    """
    check_arguments(x, gate, weight)
    if not common.has_kernel(x):
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps) * F.silu(gate)
    if len(weight) > MAX_WIDTH:
        raise ValueError(f"x: on CUDA, expected at most {MAX_WIDTH} channels, got {len(weight)}")
    common.refuse_transforms("gated_rms_norm", x, gate, weight)
    if common.needs_gradient(x, gate, weight):
        return GatedRMSNormalization.apply(x, gate, weight, eps)
    return forward_operator(x, gate, weight, eps)


def check_arguments(x: Tensor, gate: Tensor, weight: Tensor) -> None:
    """Check shapes, dtypes and devices."""
    if gate.shape != x.shape or gate.dtype != x.dtype:
        raise ValueError(f"gate: expected x's {list(x.shape)} in {x.dtype}, got {list(gate.shape)} in {gate.dtype}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight: expected [{x.shape[-1]}], as many numbers as x has channels, got {list(weight.shape)}"
        )
    for name, tensor in {"gate": gate, "weight": weight}.items():
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected a tensor on the device of x, {x.device}, got one on {tensor.device}")


class GatedRMSNormalization(torch.autograd.Function):
    """Differentiate the forward operator by the backward operator."""

    @staticmethod
    def forward(ctx, x, gate, weight, eps):
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        return forward_operator(x, gate, weight, eps)

    @staticmethod
    def backward(ctx, dy):
        common.refuse_transformed_gradients("gated_rms_norm", dy)
        inputs = ctx.saved_tensors
        with torch.no_grad():
            grads = backward_operator(*inputs, dy, ctx.eps)
        return *common.refuse_double_backward("gated_rms_norm", grads, (*inputs, dy)), None


# Registered operators, for CUDA only ------------------------------------------------------------------------


def norm_forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute y."""
    from glalm.kernels.triton import gated_norm  # A machine without a GPU may lack Triton.

    return gated_norm.forward(x, gate, weight, eps)


def norm_forward_fake(x, gate, weight, eps) -> Tensor:
    """Return an uninitialized tensor of the shape and dtype that norm_forward returns."""
    return x.new_empty(x.shape)


def norm_backward(x: Tensor, gate: Tensor, weight: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, gate and weight."""
    from glalm.kernels.triton import gated_norm

    return gated_norm.backward(x, gate, weight, dy, eps)


def norm_backward_fake(x, gate, weight, dy, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialized tensors of the shapes and dtypes that norm_backward returns."""
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


forward_operator = common.register_operator("gated_rms_norm", norm_forward, norm_forward_fake)
backward_operator = common.register_operator("gated_rms_norm_backward", norm_backward, norm_backward_fake)
