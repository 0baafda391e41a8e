"""Gated linear attention and its relatives, chunk by chunk: the operators for training and for reading a prompt.

    S_t = diag(exp g_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

    operator            log forget gate g
    chunk_gla           [B, T, H, K], one per key channel (GLA, arXiv 2312.06635)
    chunk_simple_gla    [B, T, H], one per head (the state-space dual of Mamba-2, arXiv 2405.21060)
    chunk_retention     [H], constant: by default log(1 - 2^(-5-h)) for head h = 0, 1, ... (RetNet, arXiv 2307.08621)
    chunk_linear_attn   0 (linear attention, arXiv 2006.16236, without its feature map and its normalizer)
    chunk_value_gla     [B, T, H, V], one per value channel, S_t = S_{t-1} diag(exp g_t) + k_t^T v_t

All but the last serve fewer heads of k, v and g than of q: the query heads of a group read the same state. On CUDA,
Triton kernels compute all but the last. On other devices and in float64, PyTorch does (chunked.py).

The relatives have the results and errors of chunk_gla. Their `options` are its keyword arguments scale, initial_state,
output_final_state, cu_seqlens and context.
"""

import torch
from torch import Tensor

from glalm.kernels import chunked, common
from glalm.kernels.context_parallel import ContextShard, check_context, exchange_states

ALTERNATIVES = {  # operator: the one that has all derivatives
    "chunk_gla": "fused_recurrent_gla for short sequences",
    "chunk_simple_gla": "fused_recurrent_simple_gla for short sequences",
    "chunk_retention": "fused_recurrent_retention for short sequences",
    "chunk_linear_attn": "fused_recurrent_linear_attn for short sequences",
}

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
    context: ContextShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute gated linear attention (arXiv 2312.06635, section 4) in time and memory linear in T.

        S_t = diag(exp g_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

    It is differentiable once, in q, k, v, g and initial_state.

    Args:
        q: [B, T, Hq, K], floating point. H divides Hq, and query head h reads the state of head h // (Hq / H).
        k: [B, T, H, K], in q's dtype.
        v: [B, T, H, V], in q's dtype.
        g: [B, T, H, K], natural log of the forget gate, <= 0, in any floating-point dtype; -inf forgets everything.
        scale: factor of the outputs; K**-0.5 if None.
        initial_state: S_0, [N, H, K, V], float32 (float64 for float64 inputs); zeros if None.
        output_final_state: whether to return S_T.
        cu_seqlens: [N + 1], int32 or int64, on q's device: the bounds 0, ..., T of N sequences packed into one
            row (B = 1). A sequence may be empty. Without cu_seqlens, N = B.
        gate_logit_normalizer: if it is not None, g holds logits x of any sign, and the log gate is
            logsigmoid(x) / gate_logit_normalizer, computed in float32 inside the kernels, like its gradient.
        context: this process's shard of sequences that several processes share; see ContextShard.

    Returns:
        o [B, T, Hq, V] in q's dtype, and S_T, of initial_state's shape and dtype, or None.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; on the CPU also if g > 0, or if cu_seqlens does
            not rise from 0 to T. On other devices these two give undefined results, because checking a value
            would make the host wait for the device.
        NotImplementedError: under torch.func's transforms, in forward-mode differentiation, and in double backward.
    """
    return _chunk(
        "chunk_gla", q, k, v, g, "BTHK", gate_logit_normalizer,
        scale=scale, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        context=context,
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
    return _chunk("chunk_retention", q, k, v, common.retention_gate(k) if g is None else g, "H", **options)


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
    context: ContextShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute `chunk_gla` with the gate on the value axis of the state: g [B, T, H, V], log gates <= 0.

        S_t = S_{t-1} diag(exp g_t) + k_t^T v_t        o_t = scale * q_t S_t

    This is PyTorch on every device, in float32 (float64 for float64 inputs), for models of an ablation's size. Its
    derivatives of any order and mode come from autograd. With states, cu_seqlens is read on the host.
    """
    common.check_inputs(q, k, v, g, initial_state, cu_seqlens, "BTHV")
    check_context(context, initial_state, output_final_state, cu_seqlens)
    common.check_values(g, q, cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    dtype = common.wide_dtype(q)
    inputs = [q.to(dtype) * scale, *(x.to(dtype) for x in (k, v, g))]
    with common.without_autocast(q):
        if context is None:
            o, state = common.map_sequences(
                chunked.value_gated_attention, inputs, initial_state, output_final_state, cu_seqlens
            )
        else:
            o, state = _value_gla_over_processes(inputs, initial_state, cu_seqlens, context)
    return o.to(v.dtype), state if output_final_state else None


def _value_gla_over_processes(
    inputs: list[Tensor], initial_state: Tensor | None, cu_seqlens: Tensor | None, context: ContextShard
) -> tuple[Tensor, Tensor]:
    """Compute the shard from states of zeros, exchange the states, and add the effect of those that enter.

    Args:
        inputs: q, scaled, k, v and g in the dtype to compute in.
    """
    o, local = common.map_sequences(chunked.value_gated_attention, inputs, None, True, cu_seqlens)
    assert local is not None
    q, _, _, g = (context.unpack_rows(x) for x in inputs)
    log_decay = g.cumsum(1)
    decay = context.place_first(log_decay[:, -1].exp(), len(local))[:, :, None]
    entering, final = exchange_states(local, decay, initial_state, context)
    effect = context.read_entering(q, entering, cu_seqlens) * log_decay.exp()
    return o + effect.reshape(o.shape), final


def _chunk(
    name, q, k, v, g, gate_axes, normalizer=None,
    *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, context=None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute the public operator `name`, whose gate has the axes `gate_axes` of B, T, H and K, or is None."""
    common.check_inputs(q, k, v, g, initial_state, cu_seqlens, gate_axes, normalizer, grouped=True)
    check_context(context, initial_state, output_final_state, cu_seqlens)
    common.refuse_transforms(name, q, k, v, g, initial_state, alternative=ALTERNATIVES[name])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    shard = (None, 0, 1, None) if context is None else (context.group, context.rank, context.size, context.rows)
    args = (q, k, v, g, scale, normalizer, initial_state, output_final_state, cu_seqlens)
    if common.needs_gradient(q, k, v, g, initial_state):
        o, final_state = ChunkGLA.apply(name, *args, *shard)
    else:
        o, final_state, *_ = forward_operator(*args, False, *shard)
    return o, final_state if output_final_state else None


# Differentiation --------------------------------------------------------------------------------------------


class ChunkGLA(torch.autograd.Function):
    """Differentiate the forward operator by the backward operator, under the name of the public one."""

    @staticmethod
    def forward(
        ctx, name, q, k, v, g, scale, normalizer, initial_state, output_final_state, cu_seqlens,
        group, rank, size, rows,
    ):  # fmt: skip
        o, final_state, *saved, entering = forward_operator(
            q, k, v, g, scale, normalizer, initial_state, output_final_state, cu_seqlens, True, group, rank, size, rows
        )
        entering = initial_state if group is None else entering
        ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens, rows, entering, *saved)
        ctx.set_materialize_grads(False)  # Autograd would allocate zeros for a final state that the loss ignores.
        ctx.options = (name, scale, normalizer, output_final_state, group, rank, size)
        return o, final_state

    @staticmethod
    def backward(ctx, do, dfinal_state):
        q, k, v, g, initial_state, cu_seqlens, rows, entering, *saved = ctx.saved_tensors
        name, scale, normalizer, output_final_state, *shard = ctx.options
        common.refuse_transformed_gradients(name, do, dfinal_state, alternative=ALTERNATIVES[name])
        do = v.new_zeros(*q.shape[:3], v.shape[3]) if do is None else do
        dfinal_state = dfinal_state if output_final_state else None
        with torch.no_grad():
            dq, dk, dv, dg, dinitial_state = backward_operator(
                q, k, v, g, scale, normalizer, entering, cu_seqlens, saved, do, dfinal_state, *shard, rows
            )
        dg = dg if common.gate_has_gradient(g) else None
        dinitial_state = None if initial_state is None else dinitial_state
        grads = (dq, dk, dv, dg, dinitial_state)
        inputs = (q, k, v, g, initial_state, do, dfinal_state)
        dq, dk, dv, dg, dinitial_state = common.refuse_double_backward(name, grads, inputs, ALTERNATIVES[name])
        return None, dq, dk, dv, dg, None, None, dinitial_state, *[None] * 6


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
    group: str | None = None,
    rank: int = 0,
    size: int = 1,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute o, the final states, six buffers that the kernels save for chunk_backward, and the entering states.

    `group`, `rank`, `size` and `rows` are the fields of a ContextShard. With one, the entering states are those that
    enter the shard's sequences.
    """
    context = None if group is None else ContextShard(group, rank, size, rows)
    common.check_values(g if normalizer is None else None, q, cu_seqlens)
    final_state: Tensor | None
    entering: Tensor | None = None
    saved = None
    if not common.has_kernel(q):
        o, final_state, entering = compute_in_pytorch(q, k, v, g, scale, normalizer, initial_state, cu_seqlens, context)
    else:
        from glalm.kernels.triton import gla  # A machine without a GPU may lack Triton.

        if context is None:
            o, final_state, saved = gla.forward(
                q, k, v, g, scale, normalizer, initial_state, output_final_state, cu_seqlens, save_for_backward
            )
        else:
            o, final_state, entering, saved = gla.forward_over_processes(
                q, k, v, g, scale, normalizer, initial_state, cu_seqlens, save_for_backward, context
            )
    final_state = final_state if output_final_state else None
    buffers = saved or (q.new_empty(0) for _ in range(6))
    return o, common.tensor_or_empty(final_state, q), *buffers, common.tensor_or_empty(entering, q)


def compute_in_pytorch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    normalizer: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    context: ContextShard | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return o, the final states, and with a context the states that enter the shard's sequences."""
    with common.without_autocast(q):
        gates = common.expand_gate(common.log_gate(g, normalizer), k)
        call = chunked.ChunkedGLA(q, k, v, gates, scale, initial_state, cu_seqlens, context)
        return call.outputs(), call.final_state(), None if context is None else call.entering


def chunk_forward_fake(
    q, k, v, g, scale, normalizer, initial_state, output_final_state, cu_seqlens, save_for_backward,
    group=None, rank=0, size=1, rows=None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return uninitialized tensors of the shapes and dtypes that chunk_forward returns."""
    B, _, H, K = k.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = []
    for exists in (output_final_state, group is not None):
        shape = (N, H, K, v.shape[3])
        states.append(q.new_empty(shape, dtype=common.wide_dtype(q)) if exists else q.new_empty(0))
    saved: list[tuple[tuple[int, ...], torch.dtype]] = [((0,), q.dtype)] * 6
    if save_for_backward and common.has_kernel(q):
        from glalm.kernels.triton.gla import saved_shapes

        saved = saved_shapes(q, v, g, cu_seqlens, with_residual=True)
    final_state, entering = states
    o = v.new_empty(*q.shape[:3], v.shape[3])
    return o, final_state, *(q.new_empty(shape, dtype=dtype) for shape, dtype in saved), entering


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
    group: str | None = None,
    rank: int = 0,
    size: int = 1,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v, g and initial_state.

    With a context, `initial_state` is what entered the shard, and its gradient that of the state before all shards.
    """
    context = None if group is None else ContextShard(group, rank, size, rows)
    if common.has_kernel(q):
        from glalm.kernels.triton import gla

        dq, dk, dv, dg, dinitial_state = gla.backward(
            q, k, v, g, scale, normalizer, initial_state, cu_seqlens, gla.SavedForBackward(*saved),
            do, dfinal_state, context,
        )  # fmt: skip
    else:
        with common.without_autocast(q):
            gates = common.expand_gate(common.log_gate(g, normalizer), k)
            call = chunked.ChunkedGLA(q, k, v, gates, scale, initial_state, cu_seqlens)
            dq, dk, dv, dg, dinitial_state = call.gradients(do, dfinal_state, context)
            dg = common.gate_gradient(dg, g, normalizer)
    if initial_state is None or rows is not None:
        dinitial_state = None  # Packed sequences have no initial state before the first process's tokens.
    return dq, dk, dv, common.tensor_or_empty(dg, q), common.tensor_or_empty(dinitial_state, q)


def chunk_backward_fake(
    q, k, v, g, scale, normalizer, initial_state, cu_seqlens, saved, do, dfinal_state,
    group=None, rank=0, size=1, rows=None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return uninitialized tensors of the shapes and dtypes that chunk_backward returns."""
    initial_state = None if rows is not None else initial_state
    inputs = (q, k, v, g if common.gate_has_gradient(g) else None, initial_state)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


forward_operator = common.register_operator("chunk_gla", chunk_forward, chunk_forward_fake)
backward_operator = common.register_operator("chunk_gla_backward", chunk_backward, chunk_backward_fake)
