"""Gated linear attention: the public operators, and their registration with torch.library.

Registered, they go through torch.compile(fullgraph=True) as one node each, whatever computes them. An op must return
tensors: one that was not asked for, or does not exist, is an empty one.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glalm.kernels import chunked
from glalm.kernels.common import (
    check_inputs,
    check_normalizer,
    check_values,
    expand_gate,
    gate_gradient,
    gate_has_gradient,
    has_kernel,
    log_gate,
    register_operator,
    wide_dtype,
)
from glalm.kernels.recurrent import fused_recurrent


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
    gate_logit_normalizer: float | None = None,
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
        gate_logit_normalizer: with it, g holds logits x of any sign, and the log gate is
            logsigmoid(x) / gate_logit_normalizer, computed in float32 inside the kernels; so is its gradient.

    Returns:
        o [B, T, H, V] in q's dtype, and S_T as initial_state, or None.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; on the CPU also g > 0 and bounds in
            cu_seqlens that do not rise from 0 to T. On other devices these two are not looked at, since reading
            values would wait for the device: the result is then undefined.
        NotImplementedError: a gradient of a gradient is asked for.
    """
    check_inputs(q, k, v, g, initial_state, cu_seqlens)
    return chunk(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, gate_logit_normalizer)


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
    gate_logit_normalizer: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gla` one token after the other, with the same arguments, results and errors: the operator to decode
    with, quick at T = 1 with a carried state, slow over long sequences.

    On CUDA one kernel, without a host synchronisation. Where an input requires a gradient, and in float64, it is
    PyTorch: gradients come from autograd, with T states in memory.
    """
    check_inputs(q, k, v, g, initial_state, cu_seqlens)
    return fused_recurrent(
        q,
        k,
        v,
        log_gate(g, gate_logit_normalizer),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    gate_logit_normalizer: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gla` for any gate, with inputs that were checked: g [B, T, H, K], [B, T, H], [H] for a fixed one,
    which gets no gradient, or None for no gate."""
    check_normalizer(gate_logit_normalizer)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    # What the backward pass uses again is kept only where there may be one.
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, initial_state))
    args = q, k, v, g, scale, gate_logit_normalizer, initial_state, output_final_state, cu_seqlens, keep
    o, final_state, *_ = ChunkGLA.apply(*args) if has_kernel(q) and nothing_intercepts(q) else forward_op(*args)
    return o, final_state if output_final_state else None


def nothing_intercepts(q: Tensor) -> bool:
    """Whether an operator's name means nothing to anybody here: no compiler, no tensor subclass, no dispatch mode (such
    as selective activation checkpointing). Then it is called directly: its registration with autograd takes 0.3 ms
    of a step on the host, about as long as the kernels of a small layer."""
    if torch.compiler.is_compiling() or type(q) not in (Tensor, torch.nn.Parameter):
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and torch._C._functorch.peek_interpreter_stack() is None


def chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    normalizer: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the final states, and six that chunk_backward takes back as `kept`."""
    check_values(g if normalizer is None else None, q, cu_seqlens)
    kept = None
    if has_kernel(q):
        from glalm.kernels.triton import gla  # here, since a machine without a GPU may lack triton

        o, final_state, kept = gla.forward(
            q, k, v, g, scale, normalizer, initial_state, output_final_state, cu_seqlens, keep
        )
    else:
        with torch.autocast(q.device.type, enabled=False):
            gates = expand_gate(log_gate(g, normalizer), q)
            o, final_state = chunked.forward(q, k, v, gates, scale, initial_state, output_final_state, cu_seqlens)
    return o, _or_empty(final_state, q), *(kept or (q.new_empty(0) for _ in range(6)))


def chunk_forward_fake(
    q, k, v, g, scale, normalizer, initial_state, output_final_state, cu_seqlens, keep
) -> tuple[Tensor, ...]:
    (B, _, H, K), V = q.shape, v.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = q.new_empty(N, H, K, V, dtype=wide_dtype(q)) if output_final_state else q.new_empty(0)
    kept = [((0,), q.dtype)] * 6
    if keep and has_kernel(q):
        from glalm.kernels.triton.gla import saved_shapes

        kept = saved_shapes(q, v, g, cu_seqlens, with_residual=True)
    return v.new_empty(v.shape), final_state, *(q.new_empty(shape, dtype=kind) for shape, kind in kept)


def chunk_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    normalizer: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: list[Tensor],
    do: Tensor,
    dfinal_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if has_kernel(q):
        from glalm.kernels.triton import gla

        dq, dk, dv, dg, dinitial = gla.backward(
            q, k, v, g, scale, normalizer, initial_state, cu_seqlens, gla.SavedForBackward(*kept), do, dfinal_state
        )
    else:
        with torch.autocast(q.device.type, enabled=False):
            gates = expand_gate(log_gate(g, normalizer), q)
            dq, dk, dv, dg, dinitial = chunked.backward(
                q, k, v, gates, scale, initial_state, cu_seqlens, do, dfinal_state
            )
            dg = gate_gradient(dg, g, normalizer)
    return dq, dk, dv, _or_empty(dg, q), _or_empty(dinitial, q)


def chunk_backward_fake(
    q, k, v, g, scale, normalizer, initial_state, cu_seqlens, kept, do, dfinal_state
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gate = g if gate_has_gradient(g) else None
    maybe = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (gate, initial_state))
    return *(x.new_empty(x.shape) for x in (q, k, v)), *maybe


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def save(ctx, inputs: tuple, output: tuple) -> None:
    q, k, v, g, ctx.scale, ctx.normalizer, initial_state, ctx.output_final_state, cu_seqlens, _ = inputs
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens, *output[2:])
    ctx.set_materialize_grads(False)  # zeros as large as what is kept


def differentiate(ctx, do: Tensor | None, dfinal_state: Tensor | None, backward: Callable) -> tuple[Tensor | None, ...]:
    q, k, v, g, initial_state, cu_seqlens, *kept = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dfinal_state = dfinal_state if ctx.output_final_state else None
    dq, dk, dv, dg, dinitial = backward(
        q, k, v, g, ctx.scale, ctx.normalizer, initial_state, cu_seqlens, kept, do, dfinal_state
    )
    dg = dg if gate_has_gradient(g) else None
    dinitial = None if initial_state is None else dinitial
    return dq, dk, dv, dg, None, None, dinitial, None, None, None


def differentiate_op(ctx, do, dfinal_state, *_):
    return differentiate(ctx, do, dfinal_state, backward_op)


class ChunkGLA(torch.autograd.Function):
    """The operator without its registration."""

    @staticmethod
    def forward(ctx, *inputs):
        output = chunk_forward(*inputs)
        save(ctx, inputs, output)
        return output[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal_state):
        return differentiate(ctx, do, dfinal_state, chunk_backward)


def differentiate_twice(ctx, *grads):
    raise NotImplementedError("chunk_gla: no second derivatives; fused_recurrent_gla has them, for short sequences")


forward_op = register_operator("chunk_gla", chunk_forward, chunk_forward_fake)
backward_op = register_operator("chunk_gla_backward", chunk_backward, chunk_backward_fake)
torch.library.register_autograd(forward_op, differentiate_op, setup_context=save)
torch.library.register_autograd(backward_op, differentiate_twice)
