"""Mamba-2's state-space duality (Dao and Gu, arXiv 2405.21060): linear attention with one gate per head.

    S_t = exp(dt_t A_h) S_{t-1} + B_t^T (dt_t x_t)        o_t = C_t S_t + D_h x_t

The heads of a group share B and C. On CUDA, Triton kernels compute chunk_ssd (triton/ssd.py), without a copy of B and C
for every head. On other devices and in float64, it is chunk_simple_gla with q = C, k = B, v = dt x.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels import common
from glalm.kernels.context_parallel import ContextShard, check_context, exchange_states
from glalm.kernels.gla import chunk_simple_gla
from glalm.kernels.recurrent import fused_recurrent_simple_gla

# Public operators -------------------------------------------------------------------------------------------


def chunk_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    context: ContextShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute Mamba-2's recurrence, chunk by chunk. It is differentiable once.

    Args:
        x: [batch, T, H, P], floating point.
        dt: [batch, T, H], > 0, or logits of any sign with dt_bias; computed with in float32.
        A: [H], < 0.
        B, C: [batch, T, G, N], in x's dtype. G divides H, and head h belongs to group h // (H / G).
        D: [H], the weight of a connection past the state; none if None.
        dt_bias: [H]; if it is not None, the time step is softplus(dt + dt_bias).
        initial_state: S_0, [n, H, N, P], float32 (float64 for float64 inputs); zeros if None.
        output_final_state: whether to return S_T.
        cu_seqlens: [n + 1], the bounds of n sequences packed into one row (batch = 1). Without it, n is the batch.
        context: this process's shard of sequences that several processes share; see ContextShard.

    Returns:
        o [batch, T, H, P] in x's dtype, and S_T, of initial_state's shape and dtype, or None.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; on the CPU also if dt A > 0, or if cu_seqlens does
            not rise from 0 to T.
        NotImplementedError: under torch.func's transforms, in forward-mode differentiation, and in double backward.
    """
    dt = compute_time_step(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens)
    inputs = x, dt, A, B, C, D, initial_state
    common.refuse_transforms("chunk_ssd", *inputs)
    if context is not None:
        check_context(context, initial_state, output_final_state, cu_seqlens)
        o, final_state = compute_over_processes(*inputs, cu_seqlens, context)
        return o, final_state if output_final_state else None
    options = {"output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
    if not common.has_kernel(x):
        return as_linear_attention(chunk_simple_gla, *inputs, **options)
    common.check_values(None, x, cu_seqlens)
    if common.needs_gradient(*inputs):
        o, final_state = ChunkSSD.apply(*inputs, output_final_state, cu_seqlens)
    else:
        o, final_state = forward_operator(*inputs, output_final_state, cu_seqlens)
    return o, final_state if output_final_state else None


def fused_recurrent_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    context: ContextShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute `chunk_ssd` token by token, for decoding. It serves no context."""
    dt = compute_time_step(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens)
    inputs = x, dt, A, B, C, D, initial_state
    options = {"output_final_state": output_final_state, "cu_seqlens": cu_seqlens, "context": context}
    return as_linear_attention(fused_recurrent_simple_gla, *inputs, **options)


def compute_time_step(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens) -> Tensor:
    """Check the arguments of chunk_ssd, and return the time steps in at least float32."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected [batch, T, H, P] in a floating-point dtype, got {list(x.shape)} in {x.dtype}")
    batch, T, H, P = x.shape
    if B.dim() != 4 or B.shape[2] == 0 or H % B.shape[2] != 0 or B.shape[3] == 0:
        expected = f"the shape [batch, T, G, N] with G a divisor of H = {H} and N > 0"
        raise ValueError(f"B: expected {expected}, got {list(B.shape)}")
    sizes = {"b": batch, "T": T, "H": H, "P": P, "G": B.shape[2], "N": B.shape[3], "n": batch}
    if cu_seqlens is not None:
        common.check_cu_seqlens(cu_seqlens, batch)
        sizes["n"] = cu_seqlens.shape[0] - 1
    named = {
        "dt": (dt, "bTH"), "A": (A, "H"), "B": (B, "bTGN"), "C": (C, "bTGN"), "D": (D, "H"), "dt_bias": (dt_bias, "H"),
        "initial_state": (initial_state, "nHNP"),
    }  # fmt: skip
    common.check_named(named, sizes, x, cu_seqlens)
    for name, tensor in (("B", B), ("C", C)):
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}")
    wide = common.wide_dtype(x)
    if initial_state is not None and initial_state.dtype != wide:
        raise ValueError(f"initial_state: expected {wide}, as x is {x.dtype}, got {initial_state.dtype}")
    return dt.to(wide) if dt_bias is None else F.softplus(dt.to(wide) + dt_bias.to(wide))


def as_linear_attention(
    operator: Callable, x, dt, A, B, C, D, initial_state, **options
) -> tuple[Tensor, Tensor | None]:
    """Compute the recurrence by an operator of linear attention with one gate per head, rounding the result once."""
    heads_per_group = x.shape[2] // B.shape[2]
    q, k = (y.to(dt.dtype).repeat_interleave(heads_per_group, 2) for y in (C, B))
    x_wide = x.to(dt.dtype)
    gate = dt * A.to(dt.dtype)
    common.check_values(gate, x, None, "A: expected dt A <= 0 (A < 0 and dt > 0)")
    o, final_state = operator(q, k, x_wide * dt[..., None], gate, scale=1.0, initial_state=initial_state, **options)
    o = o if D is None else o + x_wide * D.to(dt.dtype)[:, None]
    return o.to(x.dtype), final_state


def compute_over_processes(
    x, dt, A, B, C, D, initial_state, cu_seqlens, context: ContextShard
) -> tuple[Tensor, Tensor]:
    """Compute the states that the shard leaves behind from zeros, exchange them, and compute o from what enters."""
    _, local = chunk_ssd(x, dt, A, B, C, output_final_state=True, cu_seqlens=cu_seqlens)
    assert local is not None
    decay = (context.unpack_rows(dt).sum(1) * A.to(dt.dtype)).exp()[..., None, None]
    entering, final = exchange_states(local, context.place_first(decay, len(local)), initial_state, context)
    o, _ = chunk_ssd(x, dt, A, B, C, D=D, initial_state=entering, cu_seqlens=cu_seqlens)
    return o, final


# Differentiation on CUDA ------------------------------------------------------------------------------------


class ChunkSSD(torch.autograd.Function):
    """Differentiate the forward operator by the backward operator."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, output_final_state, cu_seqlens):
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state, cu_seqlens)
        ctx.set_materialize_grads(False)  # Autograd would allocate zeros for a final state that the loss ignores.
        ctx.output_final_state = output_final_state
        return forward_operator(x, dt, A, B, C, D, initial_state, output_final_state, cu_seqlens)

    @staticmethod
    def backward(ctx, do, dfinal_state):
        common.refuse_transformed_gradients("chunk_ssd", do, dfinal_state)
        inputs = ctx.saved_tensors
        do = torch.zeros_like(inputs[0]) if do is None else do
        dfinal_state = dfinal_state if ctx.output_final_state else None
        with torch.no_grad():
            grads = backward_operator(*inputs, do, dfinal_state)
        grads = tuple(None if x is None else grad for x, grad in zip(inputs[:7], grads, strict=True))
        return *common.refuse_double_backward("chunk_ssd", grads, (*inputs, do, dfinal_state)), None, None


# Registered operators, for CUDA only. An empty tensor stands for a result that does not exist. ----------------


def ssd_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o and the final states."""
    from glalm.kernels.triton.ssd import SSDPlan  # A machine without a GPU may lack Triton.

    plan = SSDPlan(x, dt, A, B, C, D, cu_seqlens)
    o, final_state = plan.forward(initial_state, output_final_state)
    return o, x.new_empty(0) if final_state is None else final_state


def ssd_forward_fake(x, dt, A, B, C, D, initial_state, output_final_state, cu_seqlens) -> tuple[Tensor, Tensor]:
    """Return uninitialized tensors of the shapes and dtypes that ssd_forward returns."""
    n = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if not output_final_state:
        return x.new_empty(x.shape), x.new_empty(0)
    return x.new_empty(x.shape), x.new_empty(n, x.shape[2], B.shape[3], x.shape[3], dtype=torch.float32)


def ssd_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    do: Tensor,
    dfinal_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x, dt, A, B, C, D and initial_state."""
    from glalm.kernels.triton.ssd import SSDPlan

    grads = SSDPlan(x, dt, A, B, C, D, cu_seqlens).backward(initial_state, do, dfinal_state)
    inputs = x, dt, A, B, C, D, initial_state
    dx, ddt, dA, dB, dC, dD, dstate = map(common.gradient_of, inputs, grads, [x] * len(inputs))
    return dx, ddt, dA, dB, dC, dD, dstate


def ssd_backward_fake(x, dt, A, B, C, D, initial_state, cu_seqlens, do, dfinal_state) -> tuple[Tensor, ...]:
    """Return uninitialized tensors of the shapes and dtypes that ssd_backward returns."""
    inputs = x, dt, A, B, C, D, initial_state
    return tuple(x.new_empty(0) if like is None else like.new_empty(like.shape) for like in inputs)


forward_operator = common.register_operator("chunk_ssd", ssd_forward, ssd_forward_fake)
backward_operator = common.register_operator("chunk_ssd_backward", ssd_backward, ssd_backward_fake)
