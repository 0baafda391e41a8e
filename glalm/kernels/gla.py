"""Gated linear attention: the public operators, and their registration with torch.library.

Registered, they go through torch.compile(fullgraph=True) as one node each, whatever computes them. A backend is
a module with two functions, `forward` and `backward`, that take the arguments of the two ops below; it gives
None for a state that was not asked for, where an op, which must return tensors, returns an empty one.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from glalm.kernels import torch_chunk
from glalm.kernels.checks import check_inputs, check_values
from glalm.kernels.recurrent import recurrent


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention over whole sequences, chunkwise: the operator to train and to prefill with.

        S_t = diag(exp g_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

    (arXiv 2312.06635, section 4). Time and memory are linear in T. Differentiable once, in q, k, v, g and
    initial_state.

    Args:
        q, k: [B, T, H, K], floating point.
        v: [B, T, H, V], in q's dtype.
        g: [B, T, H, K], natural log of the forget gate, <= 0, in any floating-point dtype; -inf forgets all.
        scale: factor of the outputs; K**-0.5 if None.
        initial_state: S_0, [N, H, K, V], float32 (float64 for float64 inputs); zeros if None.
        output_final_state: whether to return S_T.
        cu_seqlens: [N + 1], int32 or int64, on q's device: the bounds 0, ..., T of N sequences packed into one
            row (B = 1), which may be empty. Without it, N = B.

    Returns:
        o [B, T, H, V] in q's dtype, and S_T as initial_state, or None.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; on the CPU also g > 0 and bounds in
            cu_seqlens that do not rise from 0 to T. On other devices these two are not looked at, since reading
            values would wait for the device: the result is then undefined.
        NotImplementedError: a gradient of a gradient is asked for.
    """
    check_inputs(q, k, v, g, initial_state, cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o, final_state = forward_op(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)
    return o, final_state if output_final_state else None


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gla` one token after the other, with the same arguments, results and errors: the operator to decode
    with, quick at T = 1 with a carried state, slow over long sequences.

    Gradients come from autograd, with T states in memory. cu_seqlens is read on the host.
    """
    check_inputs(q, k, v, g, initial_state, cu_seqlens)
    check_values(g, cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o, final_state = recurrent(q, k, v, g, scale, initial_state, cu_seqlens)
    return o, final_state if output_final_state else None


def backend(q: Tensor) -> ModuleType:
    """The module that computes where q is, in its dtype."""
    if q.is_cuda and q.dtype != torch.float64:  # the tensor cores' kernels have no float64
        from glalm.kernels.triton import gla  # here, since a machine without a GPU may lack triton

        return gla
    return torch_chunk


def operator(name: str, function: Callable) -> Callable:
    """Registers a function as the operator glalm::<name>, on every device; returns the operator.

    torch.library.custom_op does the same and checks more, at half a millisecond a call in torch 2.11: longer
    than the kernels of a small layer take.
    """
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(f"glalm::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"glalm::{name}", "default", function)
    return getattr(torch.ops.glalm, name).default


def chunk_gla_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_values(g, cu_seqlens)
    with torch.autocast(q.device.type, enabled=False):  # a backend chooses the precision of its matmuls itself
        o, final_state = backend(q).forward(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)
    return o, q.new_empty(0) if final_state is None else final_state


def chunk_gla_forward_fake(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens):
    (B, _, H, K), V = q.shape, v.shape[3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(v.shape), q.new_empty(N, H, K, V, dtype=dtype) if output_final_state else q.new_empty(0)


def chunk_gla_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    do: Tensor,
    dfinal_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        *grads, dinitial = backend(q).backward(q, k, v, g, scale, initial_state, cu_seqlens, do, dfinal_state)
    return *grads, q.new_empty(0) if dinitial is None else dinitial


def chunk_gla_backward_fake(q, k, v, g, scale, initial_state, cu_seqlens, do, dfinal_state):
    dinitial = q.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v, g)), dinitial


def save_inputs(ctx, inputs, output):
    q, k, v, g, ctx.scale, initial_state, ctx.output_final_state, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens)


def differentiate(ctx, do, dfinal_state):
    q, k, v, g, initial_state, cu_seqlens = ctx.saved_tensors
    dfinal_state = dfinal_state if ctx.output_final_state else None
    *grads, dinitial = backward_op(q, k, v, g, ctx.scale, initial_state, cu_seqlens, do, dfinal_state)
    return *grads, None, None if initial_state is None else dinitial, None, None


def differentiate_twice(ctx, *grads):
    raise NotImplementedError("chunk_gla: no second derivatives; fused_recurrent_gla has them, for short sequences")


forward_op, backward_op = operator("chunk_gla", chunk_gla_forward), operator("chunk_gla_backward", chunk_gla_backward)
torch.library.register_fake(forward_op, chunk_gla_forward_fake)
torch.library.register_fake(backward_op, chunk_gla_backward_fake)
torch.library.register_autograd(forward_op, differentiate, setup_context=save_inputs)
torch.library.register_autograd(backward_op, differentiate_twice)
