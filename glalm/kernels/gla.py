"""Gated linear attention and its relatives, chunk by chunk: the operators for training and for reading a prompt.

    S_t = diag(exp g_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

    operator            log forget gate g
    chunk_gla           [B, T, H, K], one per key channel (GLA, arXiv 2312.06635)
    chunk_simple_gla    [B, T, H], one per head (the state-space dual of Mamba-2, arXiv 2405.21060)
    chunk_retention     [H], constant: by default log(1 - 2^(-5-h)) for head h = 0, 1, ... (RetNet, arXiv 2307.08621)
    chunk_linear_attn   0 (linear attention, arXiv 2006.16236, without its feature map and its normalizer)
    chunk_value_gla     [B, T, H, V], one per value channel, S_t = S_{t-1} diag(exp g_t) + k_t^T v_t

On CUDA, Triton kernels compute all but the last. On other devices and in float64, PyTorch does (chunked.py).

The relatives have the results and errors of chunk_gla. Their `options` are its keyword arguments scale, initial_state,
output_final_state and cu_seqlens.
"""

import torch
from torch import Tensor

from glalm.kernels import chunked, common

# Public operators -------------------------------------------------------------------------------------------


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
    """Compute gated linear attention (arXiv 2312.06635, section 4) in time and memory linear in T.

        S_t = diag(exp g_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

    It is differentiable once, in q, k, v, g and initial_state.

    Args:
        q, k: [B, T, H, K], floating point.
        v: [B, T, H, V], in q's dtype.
        g: [B, T, H, K], natural log of the forget gate, <= 0, in any floating-point dtype; -inf forgets everything.
        scale: factor of the outputs; K**-0.5 if None.
        initial_state: S_0, [N, H, K, V], float32 (float64 for float64 inputs); zeros if None.
        output_final_state: whether to return S_T.
        cu_seqlens: [N + 1], int32 or int64, on q's device: the bounds 0, ..., T of N sequences packed into one
            row (B = 1). A sequence may be empty. Without cu_seqlens, N = B.
        gate_logit_normalizer: if it is not None, g holds logits x of any sign, and the log gate is
            logsigmoid(x) / gate_logit_normalizer, computed in float32 inside the kernels, like its gradient.

    Returns:
        o [B, T, H, V] in q's dtype, and S_T, of initial_state's shape and dtype, or None.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; on the CPU also if g > 0, or if cu_seqlens does
            not rise from 0 to T. On other devices these two give undefined results, because checking a value
            would make the host wait for the device.
        NotImplementedError: under torch.func's transforms, in forward-mode differentiation, and in double backward.
    """
    return _chunk(
        "chunk_gla", q, k, v, g, "BTHK", gate_logit_normalizer,
        scale=scale, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, gate_logit_normalizer: float | None = None, **options
) -> tuple[Tensor, Tensor | None]:
    """Compute `chunk_gla` with one gate per head (arXiv 2405.21060): g [B, T, H], log gates <= 0, or their logits."""
    return _chunk("chunk_simple_gla", q, k, v, g, "BTH", gate_logit_normalizer, **options)


def chunk_retention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, **options
) -> tuple[Tensor, Tensor | None]:
    """Compute `chunk_gla` with a constant decay for each head (RetNet, arXiv 2307.08621).

    g [H] holds log gates <= 0, which get no gradient. Without it the decay of head h = 0, 1, ... is RetNet's,
    1 - 2^(-5-h).
    """
    return _chunk("chunk_retention", q, k, v, common.retention_gate(q) if g is None else g, "H", **options)


def chunk_linear_attn(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    """Compute `chunk_gla` without a gate, S_t = S_{t-1} + k_t^T v_t (arXiv 2006.16236)."""
    return _chunk("chunk_linear_attn", q, k, v, None, "", **options)


def chunk_value_gla(
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
    """Compute `chunk_gla` with the gate on the value axis of the state: g [B, T, H, V], log gates <= 0.

        S_t = S_{t-1} diag(exp g_t) + k_t^T v_t        o_t = scale * q_t S_t

    This is PyTorch on every device, in float32 (float64 for float64 inputs), for models of an ablation's size. Its
    derivatives of any order and mode come from autograd. With states, cu_seqlens is read on the host.
    """
    common.check_inputs(q, k, v, g, initial_state, cu_seqlens, "BTHV")
    common.check_values(g, q, cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    dtype = common.wide_dtype(q)
    inputs = [q.to(dtype) * scale, *(x.to(dtype) for x in (k, v, g))]
    with torch.autocast(q.device.type, enabled=False):
        o, state = common.map_sequences(
            chunked.value_gated_attention, inputs, initial_state, output_final_state, cu_seqlens
        )
    return o.to(v.dtype), state


def _chunk(
    name, q, k, v, g, gate_axes, normalizer=None,
    *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute the public operator `name`, whose gate has the axes `gate_axes` of B, T, H and K, or is None."""
    common.check_inputs(q, k, v, g, initial_state, cu_seqlens, gate_axes)
    common.check_normalizer(normalizer)
    common.refuse_transforms(name, q, k, v, g, initial_state, alternative=_alternative(name))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    args = (q, k, v, g, scale, normalizer, initial_state, output_final_state, cu_seqlens)
    if common.needs_gradient(q, k, v, g, initial_state):
        o, final_state = ChunkGLA.apply(name, *args)
    else:
        o, final_state, *_ = forward_operator(*args, False)
    return o, final_state if output_final_state else None


def _alternative(name: str) -> str:
    """Name the operator that has all derivatives."""
    return f"{name.replace('chunk', 'fused_recurrent')} for short sequences"


# Differentiation --------------------------------------------------------------------------------------------


class ChunkGLA(torch.autograd.Function):
    """Differentiate the forward operator by the backward operator, under the name of the public one."""

    @staticmethod
    def forward(ctx, name, q, k, v, g, scale, normalizer, initial_state, output_final_state, cu_seqlens):
        o, final_state, *saved = forward_operator(
            q, k, v, g, scale, normalizer, initial_state, output_final_state, cu_seqlens, True
        )
        ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens, *saved)
        ctx.set_materialize_grads(False)  # Autograd would allocate zeros for a final state that the loss ignores.
        ctx.options = (name, scale, normalizer, output_final_state)
        return o, final_state

    @staticmethod
    def backward(ctx, do, dfinal_state):
        q, k, v, g, initial_state, cu_seqlens, *saved = ctx.saved_tensors
        name, scale, normalizer, output_final_state = ctx.options
        common.refuse_transformed_gradients(name, do, dfinal_state, alternative=_alternative(name))
        do = torch.zeros_like(v) if do is None else do
        dfinal_state = dfinal_state if output_final_state else None
        with torch.no_grad():
            dq, dk, dv, dg, dinitial_state = backward_operator(
                q, k, v, g, scale, normalizer, initial_state, cu_seqlens, saved, do, dfinal_state
            )
        dg = dg if common.gate_has_gradient(g) else None
        dinitial_state = None if initial_state is None else dinitial_state
        grads = (dq, dk, dv, dg, dinitial_state)
        inputs = (q, k, v, g, initial_state, do, dfinal_state)
        dq, dk, dv, dg, dinitial_state = common.refuse_double_backward(name, grads, inputs, _alternative(name))
        return None, dq, dk, dv, dg, None, None, dinitial_state, None, None


# Registered operators. Each returns tensors only: an empty tensor stands for a result that does not exist. ----


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
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute o, the final states, and the six buffers that the Triton kernels save for chunk_backward."""
    common.check_values(g if normalizer is None else None, q, cu_seqlens)
    saved = None
    if common.has_kernel(q):
        from glalm.kernels.triton import gla  # A machine without a GPU may lack Triton.

        o, final_state, saved = gla.forward(
            q, k, v, g, scale, normalizer, initial_state, output_final_state, cu_seqlens, save_for_backward
        )
    else:
        with torch.autocast(q.device.type, enabled=False):
            gates = common.expand_gate(common.log_gate(g, normalizer), q)
            call = chunked.ChunkedGLA(q, k, v, gates, scale, initial_state, cu_seqlens)
            o = call.outputs()
            final_state = call.final_state() if output_final_state else None
    return o, _tensor_or_empty(final_state, q), *(saved or (q.new_empty(0) for _ in range(6)))


def chunk_forward_fake(
    q, k, v, g, scale, normalizer, initial_state, output_final_state, cu_seqlens, save_for_backward
) -> tuple[Tensor, ...]:
    """Return uninitialized tensors of the shapes and dtypes that chunk_forward returns."""
    B, _, H, K = q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = q.new_empty(N, H, K, v.shape[3], dtype=common.wide_dtype(q)) if output_final_state else q.new_empty(0)
    saved: list[tuple[tuple[int, ...], torch.dtype]] = [((0,), q.dtype)] * 6
    if save_for_backward and common.has_kernel(q):
        from glalm.kernels.triton.gla import saved_shapes

        saved = saved_shapes(q, v, g, cu_seqlens, with_residual=True)
    return v.new_empty(v.shape), final_state, *(q.new_empty(shape, dtype=dtype) for shape, dtype in saved)


def chunk_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    normalizer: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: list[Tensor],
    do: Tensor,
    dfinal_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v, g and initial_state."""
    if common.has_kernel(q):
        from glalm.kernels.triton import gla

        dq, dk, dv, dg, dinitial_state = gla.backward(
            q, k, v, g, scale, normalizer, initial_state, cu_seqlens, gla.SavedForBackward(*saved), do, dfinal_state
        )
    else:
        with torch.autocast(q.device.type, enabled=False):
            gates = common.expand_gate(common.log_gate(g, normalizer), q)
            call = chunked.ChunkedGLA(q, k, v, gates, scale, initial_state, cu_seqlens)
            dq, dk, dv, dg, dinitial_state = call.gradients(do, dfinal_state)
            dg = common.gate_gradient(dg, g, normalizer)
            dinitial_state = None if initial_state is None else dinitial_state
    return dq, dk, dv, _tensor_or_empty(dg, q), _tensor_or_empty(dinitial_state, q)


def chunk_backward_fake(
    q, k, v, g, scale, normalizer, initial_state, cu_seqlens, saved, do, dfinal_state
) -> tuple[Tensor, ...]:
    """Return uninitialized tensors of the shapes and dtypes that chunk_backward returns."""
    inputs = (q, k, v, g if common.gate_has_gradient(g) else None, initial_state)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _tensor_or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Return x, or in its place an empty tensor on the device of `like`."""
    return like.new_empty(0) if x is None else x


forward_operator = common.register_operator("chunk_gla", chunk_forward, chunk_forward_fake)
backward_operator = common.register_operator("chunk_gla_backward", chunk_backward, chunk_backward_fake)
