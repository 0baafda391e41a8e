"""Mamba's selective scan (Gu and Dao, arXiv 2312.00752, section 3.3).

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = h_t C_t

On CUDA, Triton kernels compute it, in which the states stay in registers (triton/selective_scan.py). On other devices
and in float64, PyTorch does, and holds a few times [B, T, D, N] numbers: channels share nothing that a matmul could
use, so the sequence is cut into chunks, which run the recurrence from 0 side by side. The effect of the states that
enter them is added afterwards.
"""

import math
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels import common
from glalm.kernels.common import check_cu_seqlens, check_values, empty_output, wide_dtype
from glalm.kernels.context_parallel import ContextShard, check_context, exchange_states

MAX_KERNEL_STATE = 64  # numbers of state per channel; the kernels' tiles grow with it


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    context: ContextShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the selective scan with what surrounds it in Mamba.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = (h_t C_t + D x_t) silu(z_t)

    On CUDA it is differentiable once. In PyTorch, derivatives of any order and mode come from autograd.

    Args:
        x: [batch, T, d], floating point.
        dt: [batch, T, d], > 0, or logits of any sign with dt_bias.
        A: [d, N], < 0. On CUDA, N is at most 64.
        B, C: [batch, T, N].
        D: [d], the weight of a connection past the state; none if None.
        z: [batch, T, d], logits of an output gate; none if None.
        dt_bias: [d]; if it is not None, the time step is softplus(dt + dt_bias), computed in float32.
        initial_state: h_0, [n, d, N], float32 (float64 for float64 inputs); zeros if None.
        cu_seqlens: [n + 1], the bounds of n sequences packed into one row (batch = 1). Without it, n is the batch.
        context: this process's shard of sequences that several processes share; see ContextShard. Of packed sequences,
            the final states are then not those of single sequences, and mean nothing.

    Returns:
        y [batch, T, d] in x's dtype, and the final states [n, d, N] in initial_state's.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; on the CPU also if cu_seqlens does not rise from 0
            to T.
        NotImplementedError: on CUDA, under torch.func's transforms, in forward-mode differentiation, and in double
            backward.
    """
    check_arguments(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    check_values(None, x, cu_seqlens)
    tensors = x, dt, A, B, C, D, z, dt_bias, initial_state
    if context is not None:
        check_context(context, initial_state, False, cu_seqlens)
        return scan_over_processes(*tensors, cu_seqlens, context)
    if not common.has_kernel(x):
        with common.without_autocast(x):
            return scan_in_pytorch(*tensors, cu_seqlens)
    if A.shape[1] > MAX_KERNEL_STATE:
        raise ValueError(
            f"A: on CUDA, a channel's state has at most {MAX_KERNEL_STATE} numbers, got {A.shape[1]}; float64 inputs "
            "have no such limit"
        )
    common.refuse_transforms("selective_scan", *tensors)
    if common.needs_gradient(*tensors):
        return SelectiveScan.apply(*tensors, cu_seqlens)
    y, final_state, _ = forward_operator(*tensors, cu_seqlens, False)
    return y, final_state


def check_arguments(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens) -> None:
    """Check shapes, dtypes and devices."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x: expected [batch, T, d] in a floating-point dtype, got {list(x.shape)} in {x.dtype}")
    if A.dim() != 2:
        raise ValueError(f"A: expected the shape [d, N], got {list(A.shape)}")
    sizes = {"b": x.shape[0], "T": x.shape[1], "d": x.shape[2], "N": A.shape[1], "n": x.shape[0]}
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, len(x))
        sizes["n"] = cu_seqlens.shape[0] - 1
    named = {
        "dt": (dt, "bTd"), "A": (A, "dN"), "B": (B, "bTN"), "C": (C, "bTN"), "D": (D, "d"), "z": (z, "bTd"),
        "dt_bias": (dt_bias, "d"), "initial_state": (initial_state, "ndN"),
    }  # fmt: skip
    common.check_named(named, sizes, x, cu_seqlens)
    if initial_state is not None and initial_state.dtype != wide_dtype(x):
        raise ValueError(f"initial_state: expected {wide_dtype(x)}, as x is {x.dtype}, got {initial_state.dtype}")


def scan_over_processes(
    x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, context: ContextShard
) -> tuple[Tensor, Tensor]:
    """Scan the shard from zeros for the states it leaves behind, exchange them, and scan again from what enters.

    A second scan needs no more memory than the first. The effect of the entering states on each token, computed apart
    from it, would hold [batch, T, d, N] numbers.
    """
    _, local = selective_scan(x, dt, A, B, C, dt_bias=dt_bias, cu_seqlens=cu_seqlens)
    with common.without_autocast(x):
        wide = wide_dtype(x)
        steps = dt.to(wide) if dt_bias is None else F.softplus(dt.to(wide) + dt_bias.to(wide))
        decay = (context.unpack_rows(steps).sum(1)[..., None] * A.to(wide)).exp()
        entering, final = exchange_states(local, context.place_first(decay, len(local)), initial_state, context)
    y, _ = selective_scan(
        x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, initial_state=entering, cu_seqlens=cu_seqlens
    )  # fmt: skip
    return y, final


# Differentiation on CUDA ------------------------------------------------------------------------------------


class SelectiveScan(torch.autograd.Function):
    """Differentiate the forward operator by the backward operator."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens):
        inputs = x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens
        y, final_state, checkpoints = forward_operator(*inputs, True)
        ctx.save_for_backward(*inputs, checkpoints)
        ctx.set_materialize_grads(False)  # Autograd would allocate zeros for a final state that the loss ignores.
        return y, final_state

    @staticmethod
    def backward(ctx, dy, dfinal_state):
        common.refuse_transformed_gradients("selective_scan", dy, dfinal_state)
        inputs = ctx.saved_tensors
        dy = torch.zeros_like(inputs[0]) if dy is None else dy
        with torch.no_grad():
            grads = backward_operator(*inputs, dy, dfinal_state)
        grads = tuple(None if x is None else grad for x, grad in zip(inputs[:9], grads, strict=True))
        return *common.refuse_double_backward("selective_scan", grads, (*inputs, dy, dfinal_state)), None


# Registered operators, for CUDA only. An empty tensor stands for a result that does not exist. ----------------


def scan_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y, the final states, and the states that are saved for scan_backward."""
    from glalm.kernels.triton.selective_scan import ScanPlan  # A machine without a GPU may lack Triton.

    plan = ScanPlan(x, dt, A, B, C, D, z, dt_bias, cu_seqlens)
    y, final_state, checkpoints = plan.forward(initial_state, save_for_backward)
    return y, final_state, x.new_empty(0, dtype=torch.float32) if checkpoints is None else checkpoints


def scan_forward_fake(
    x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, save_for_backward
) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialized tensors of the shapes and dtypes that scan_forward returns."""
    from glalm.kernels.triton.selective_scan import checkpoint_shape

    n = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = x.new_empty(n, *A.shape, dtype=torch.float32)
    shape = checkpoint_shape(x, A) if save_for_backward else (0,)
    return x.new_empty(x.shape), final_state, x.new_empty(shape, dtype=torch.float32)


def scan_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    dy: Tensor,
    dfinal_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x, dt, A, B, C, D, z, dt_bias and initial_state."""
    from glalm.kernels.triton.selective_scan import ScanPlan

    plan = ScanPlan(x, dt, A, B, C, D, z, dt_bias, cu_seqlens)
    grads = plan.backward(initial_state, checkpoints, dy, dfinal_state)
    inputs = x, dt, A, B, C, D, z, dt_bias, initial_state
    dx, ddt, dA, dB, dC, dD, dz, dbias, dstate = map(common.gradient_of, inputs, grads, [x] * len(inputs))
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dstate


def scan_backward_fake(
    x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, checkpoints, dy, dfinal_state
) -> tuple[Tensor, ...]:
    """Return uninitialized tensors of the shapes and dtypes that scan_backward returns."""
    inputs = x, dt, A, B, C, D, z, dt_bias, initial_state
    return tuple(x.new_empty(0) if like is None else like.new_empty(like.shape) for like in inputs)


forward_operator = common.register_operator("selective_scan", scan_forward, scan_forward_fake)
backward_operator = common.register_operator("selective_scan_backward", scan_backward, scan_backward_fake)


# In PyTorch -------------------------------------------------------------------------------------------------


def scan_in_pytorch(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens) -> tuple[Tensor, Tensor]:
    """Return y and the final states. The arguments are those of selective_scan."""
    wide = wide_dtype(x)
    x_wide, dt, A, B, C = (tensor.to(wide) for tensor in (x, dt, A, B, C))
    D, z, dt_bias = (None if tensor is None else tensor.to(wide) for tensor in (D, z, dt_bias))
    if x.shape[1] == 0:
        n = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        final_state = x_wide.new_zeros(n, *A.shape) if initial_state is None else initial_state
        others = [tensor for tensor in (dt, A, B, C, D, z, dt_bias) if tensor is not None]
        return empty_output(x, *others), final_state
    dt = dt if dt_bias is None else F.softplus(dt + dt_bias)
    h, final_state = compute_states(x_wide, dt, A, B, initial_state, cu_seqlens)
    y = torch.einsum("btdn,btn->btd", h, C)
    y = y if D is None else y + D * x_wide
    y = y if z is None else y * F.silu(z)
    # A view would keep the states of all tokens in memory.
    return y.to(x.dtype), final_state.clone()


def compute_states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the states after all tokens [batch, T, d, N], and those after the last tokens of the sequences."""
    decay = (dt[..., None] * A).exp()
    update = (dt * x)[..., None] * B[:, :, None]
    if cu_seqlens is None:
        h = scan_states(decay, update, initial_state)
        return h, h[:, -1]
    T = x.shape[1]
    bounds = cu_seqlens.long()
    first = bounds[:-1].clamp(max=T - 1)
    last = bounds[1:] - 1
    has_tokens = bounds.diff()[:, None, None] > 0
    if initial_state is not None:
        # `first` of an empty sequence is a token of another sequence, to which it adds 0.
        entering = torch.where(has_tokens, decay[0, first] * initial_state, 0)
        update = update.index_add(1, first, entering[None])
    starts = torch.isin(torch.arange(T, device=x.device), bounds[:-1])
    h = scan_states(decay.masked_fill(starts[:, None, None], 0), update, None)
    return h, torch.where(has_tokens, h[0, last], 0 if initial_state is None else initial_state)


def scan_states(decay: Tensor, update: Tensor, h: Tensor | None) -> Tensor:
    """Return all states of h_t = decay_t h_{t-1} + update_t, [B, T, D, N], from h [B, D, N] or zeros."""
    T = decay.shape[1]
    # On the CPU, one token is enough work at a time, and its operands stay in the cache.
    chunk = T if decay.device.type == "cpu" else math.ceil(math.sqrt(T))
    padding = (0, 0, 0, 0, 0, -T % chunk)
    # The backward pass of unbind writes one gradient. That of indexing would allocate a full one for every token.
    decays = F.pad(decay, padding, value=1.0).unflatten(1, (-1, chunk)).unbind(2)
    updates = F.pad(update, padding).unflatten(1, (-1, chunk)).unbind(2)
    from_zero = [updates[0]]
    for decay_t, update_t in zip(decays[1:], updates[1:], strict=True):
        from_zero.append(torch.addcmul(update_t, decay_t, from_zero[-1]))
    if h is None and chunk == T > 1:  # One token takes the general path, in which its decay has a gradient (of 0).
        return torch.cat(from_zero, 1)
    products = [*accumulate(decays, torch.mul)]
    entering = [torch.zeros_like(update[:, 0]) if h is None else h]
    for end, product in zip(from_zero[-1].unbind(1)[:-1], products[-1].unbind(1)[:-1], strict=True):
        entering.append(torch.addcmul(end, product, entering[-1]))
    entering_all = torch.stack(entering, 1)
    states = [torch.addcmul(start, product, entering_all) for start, product in zip(from_zero, products, strict=True)]
    return torch.stack(states, 2).flatten(1, 2)[:, :T]
