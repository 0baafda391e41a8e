"""A causal depthwise convolution of a few taps with a SiLU, over sequences that may be continued or packed.

    y_t = silu(bias + sum_{i < taps} weight_i x_{t - taps + 1 + i}),   x_t = 0 before the sequence

On CUDA, Triton kernels compute it (triton/short_conv.py). On other devices and in float64, PyTorch does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels import common
from glalm.kernels.context_parallel import ContextShard, check_context, gather_history

MAX_KERNEL_TAPS = 16  # the kernels keep as many rows in registers


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    context: ContextShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve the tokens of every channel, and apply a SiLU.

    All sums are in float32 (float64 for float64 inputs), also those of the gradients. On CUDA it is differentiable
    once. In PyTorch, derivatives of any order and mode come from autograd.

    Args:
        x: [B, T, D], floating point.
        weight: [D, taps]. On CUDA, there are at most 16 taps.
        bias: [D], or None.
        initial_state: the last taps - 1 inputs before x, [N, taps - 1, D], cast to x's dtype; zeros if None.
        cu_seqlens: [N + 1], the bounds of N sequences packed into one row (B = 1). Without it, N = B.
        context: this process's shard of sequences that several processes share; see ContextShard. Of packed sequences,
            the final states are then those of the shard's parts.

    Returns:
        y, and the last taps - 1 inputs [N, taps - 1, D], both in x's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; on the CPU also if cu_seqlens does not rise from 0
            to T.
        NotImplementedError: on CUDA, under torch.func's transforms, in forward-mode differentiation, and in double
            backward.
    """
    check_arguments(x, weight, bias, initial_state, cu_seqlens)
    common.check_values(None, x, cu_seqlens)
    if context is not None:
        check_context(context, initial_state, False, cu_seqlens)
        past, final = gather_history(x, initial_state, weight.shape[1] - 1, context, cu_seqlens)
        y, local = short_conv(x, weight, bias, initial_state=past, cu_seqlens=cu_seqlens)
        return y, local if final is None else final
    initial_state = None if initial_state is None else initial_state.to(x.dtype)
    if not common.has_kernel(x):
        with common.without_autocast(x):
            return convolve_in_pytorch(x, weight, bias, initial_state, cu_seqlens)
    taps = weight.shape[1]
    if taps > MAX_KERNEL_TAPS:
        raise ValueError(f"weight: on CUDA, expected at most {MAX_KERNEL_TAPS} taps, got {taps}")
    common.refuse_transforms("short_conv", x, weight, bias, initial_state)
    if common.needs_gradient(x, weight, bias, initial_state):
        return ShortConvolution.apply(x, weight, bias, initial_state, cu_seqlens)
    return forward_operator(x, weight, bias, initial_state, cu_seqlens)


def check_arguments(x, weight, bias, initial_state, cu_seqlens) -> None:
    """Check shapes, dtypes and devices."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x: expected [B, T, D] in a floating-point dtype, got {list(x.shape)} in {x.dtype}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] == 0:
        raise ValueError(f"weight: expected the shape [D, taps] with D = {x.shape[2]}, got {list(weight.shape)}")
    sizes = {"D": x.shape[2], "N": x.shape[0], "C": weight.shape[1] - 1}
    if cu_seqlens is not None:
        common.check_cu_seqlens(cu_seqlens, len(x))
        sizes["N"] = cu_seqlens.shape[0] - 1
    if bias is not None:
        common.check_shape("bias", bias, "D", sizes)
    if initial_state is not None:
        common.check_shape("initial_state", initial_state, "NCD", sizes)
    others = {"weight": weight, "bias": bias, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected a tensor on the device of x, {x.device}, got one on {tensor.device}")
        if tensor is not None and name != "cu_seqlens" and not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")


# Differentiation on CUDA ------------------------------------------------------------------------------------


class ShortConvolution(torch.autograd.Function):
    """Differentiate the forward operator by the backward operator."""

    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, cu_seqlens):
        inputs = x, weight, bias, initial_state, cu_seqlens
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)  # Autograd would allocate zeros for a final state that the loss ignores.
        return forward_operator(*inputs)

    @staticmethod
    def backward(ctx, dy, dfinal_state):
        common.refuse_transformed_gradients("short_conv", dy, dfinal_state)
        inputs = ctx.saved_tensors
        dy = torch.zeros_like(inputs[0]) if dy is None else dy
        with torch.no_grad():
            grads = backward_operator(*inputs, dy, dfinal_state)
        grads = tuple(None if x is None else grad for x, grad in zip(inputs[:4], grads, strict=True))
        return *common.refuse_double_backward("short_conv", grads, (*inputs, dy, dfinal_state)), None


# Registered operators, for CUDA only. An empty tensor stands for a result that does not exist. ----------------


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute y and the final states."""
    from glalm.kernels.triton.short_conv import ConvPlan  # A machine without a GPU may lack Triton.

    return ConvPlan(x, weight, bias, initial_state, cu_seqlens).forward()


def conv_forward_fake(x, weight, bias, initial_state, cu_seqlens) -> tuple[Tensor, Tensor]:
    """Return uninitialized tensors of the shapes and dtypes that conv_forward returns."""
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(N, weight.shape[1] - 1, x.shape[2])


def conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dy: Tensor,
    dfinal_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x, weight, bias and initial_state."""
    from glalm.kernels.triton.short_conv import ConvPlan

    grads = ConvPlan(x, weight, bias, initial_state, cu_seqlens).backward(dy, dfinal_state)
    inputs = x, weight, bias, initial_state
    dx, dweight, dbias, dstate = map(common.gradient_of, inputs, grads, [x] * len(inputs))
    return dx, dweight, dbias, dstate


def conv_backward_fake(x, weight, bias, initial_state, cu_seqlens, dy, dfinal_state) -> tuple[Tensor, ...]:
    """Return uninitialized tensors of the shapes and dtypes that conv_backward returns."""
    inputs = x, weight, bias, initial_state
    return tuple(x.new_empty(0) if like is None else like.new_empty(like.shape) for like in inputs)


forward_operator = common.register_operator("short_conv", conv_forward, conv_forward_fake)
backward_operator = common.register_operator("short_conv_backward", conv_backward, conv_backward_fake)


# In PyTorch -------------------------------------------------------------------------------------------------


def convolve_in_pytorch(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y and the final states. The arguments are those of short_conv."""
    context = weight.shape[1] - 1
    if cu_seqlens is None:
        past = x.new_zeros(len(x), context, x.shape[2]) if state is None else state
        x = torch.cat([past, x], 1)
        # The state is a copy, because a view would keep the whole sequence in memory.
        return convolve(x, weight, bias), x[:, x.shape[1] - context :].clone()

    # Lay the packed sequences out with `context` rows of past inputs in front of each, convolve everything at once, and
    # then pick the outputs and the last inputs of every sequence.
    N = len(cu_seqlens) - 1
    T, channels = x.shape[1:]
    shift = context * torch.arange(N, device=x.device)
    taps = torch.arange(context, device=x.device)
    rows = torch.arange(T, device=x.device) + context * (common.sequence_ids(cu_seqlens, T) + 1)
    padded = x.new_zeros(T + N * context, channels).index_copy(0, rows, x[0])
    if state is not None:
        past_rows = (cu_seqlens[:-1] + shift)[:, None] + taps
        padded = padded.index_copy(0, past_rows.flatten(), state.flatten(0, 1))
    last_rows = (cu_seqlens[1:] + shift)[:, None] + taps
    return convolve(padded[None], weight, bias)[:, rows - context], padded[last_rows]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve x [B, taps - 1 + T, D], whose first taps - 1 rows are past inputs, to [B, T, D].

    The sum over the taps is written out because a compiler fuses it into one kernel, while conv1d with one group per
    channel is slower and needs transposes.
    """
    dtype = x.dtype
    x = common.at_least_float32(x)  # The gradient of x sums over the taps, and half precision would round every term.
    weight = common.at_least_float32(weight)
    taps = weight.shape[1]
    T = max(0, x.shape[1] - taps + 1)
    y = x[:, :T] * weight[:, 0]
    for i in range(1, taps):
        y = y + x[:, i : i + T] * weight[:, i]
    return F.silu(y if bias is None else y + bias).to(dtype)
