"""Gated linear attention, its relatives and the delta rule, token by token: for decoding, where T is mostly 1.

They compute the same as the chunkwise operators of gla.py and delta.py, with the same arguments, results and errors,
but they have derivatives of any order and mode.

On CUDA, if no derivative is computed, one Triton kernel reads and writes the state once. Otherwise PyTorch computes the
recurrence, and autograd its derivatives, with T states in memory.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from glalm.kernels import common

# Public operators -------------------------------------------------------------------------------------------


def fused_recurrent_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, gate_logit_normalizer: float | None = None, **options
) -> tuple[Tensor, Tensor | None]:
    """Compute `chunk_gla` token by token: fast for T = 1 with a carried state, and slow for long sequences.

    Args:
        q, k, v, g, gate_logit_normalizer: as for `chunk_gla`.
        options: scale, initial_state, output_final_state and cu_seqlens of `chunk_gla`.

    Returns and raises what `chunk_gla` does, but has all derivatives. The host never waits for the device.
    """
    return _fused_recurrent(q, k, v, g, "BTHK", gate_logit_normalizer, **options)


def fused_recurrent_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, gate_logit_normalizer: float | None = None, **options
) -> tuple[Tensor, Tensor | None]:
    """Compute `chunk_simple_gla` token by token: one gate per head, g [B, T, H]."""
    return _fused_recurrent(q, k, v, g, "BTH", gate_logit_normalizer, **options)


def fused_recurrent_retention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, **options
) -> tuple[Tensor, Tensor | None]:
    """Compute `chunk_retention` token by token: a constant decay for each head, g [H], or RetNet's."""
    return _fused_recurrent(q, k, v, common.retention_gate(k) if g is None else g, "H", **options)


def fused_recurrent_linear_attn(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    """Compute `chunk_linear_attn` token by token, without a gate: S_t = S_{t-1} + k_t^T v_t."""
    return _fused_recurrent(q, k, v, None, "", **options)


def fused_recurrent_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, *, normalize: bool = False, **options
) -> tuple[Tensor, Tensor | None]:
    """Compute `chunk_delta_rule` token by token, with its arguments and results, but with all derivatives.

    On CUDA it serves heads of any size.
    """
    per_channel = isinstance(g, Tensor) and g.dim() == 4
    gate_axes = "BTHK" if per_channel else "BTH"
    if normalize:
        q = common.l2_normalize(q)
        k = common.l2_normalize(k)
    return _fused_recurrent(q, k, v, g, gate_axes, beta=beta, **options)


class _StateMode(threading.local):
    """Store for each thread whether it updates states in place, so that no thread overwrites another's states."""

    in_place = False


_state_mode = _StateMode()


@contextmanager
def states_in_place() -> Iterator[None]:
    """Let the fused_recurrent operators write the final state over `initial_state` and return that tensor.

    A decoder that owns its states needs half the memory this way, and its buffers keep the addresses that a CUDA graph
    captured. The context has no effect on packed sequences, on calls that are differentiated, or in compiled code.
    """
    previous = _state_mode.in_place
    _state_mode.in_place = True
    try:
        yield
    finally:
        _state_mode.in_place = previous


def _fused_recurrent(
    q, k, v, g, gate_axes, normalizer=None,
    *, beta=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, context=None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute the recurrence of a gate with the axes `gate_axes` of B, T, H and K, or of none, or the delta rule."""
    if context is not None:
        raise ValueError("context: only the chunkwise operators serve sequences that several processes share")
    common.check_inputs(q, k, v, g, initial_state, cu_seqlens, gate_axes, normalizer, grouped=beta is None)
    if beta is not None:
        common.check_shape("beta", beta, "BTH", dict(zip("BTH", q.shape, strict=False)))
    g = common.log_gate(g, normalizer)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    # torch.compile does not guard on the mode, so compiled code ignores it.
    in_place = not torch.compiler.is_compiling() and _state_mode.in_place
    tensors = (q, k, v, g, beta, initial_state)
    if common.needs_gradient(*tensors) or common.active_transform(*tensors):
        o, final_state = run_recurrence(q, k, v, g, scale, initial_state, cu_seqlens, beta)
    elif in_place and initial_state is not None and cu_seqlens is None:
        o = update_operator(q, k, v, g, scale, initial_state, beta)
        final_state = initial_state
    else:
        o, final_state = forward_operator(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, beta)
    return o, final_state if output_final_state else None


def run_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, S0: Tensor | None, cu_seqlens: Tensor | None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute o [B, T, Hq, V] and the final states [N, H, K, V] from S0, in PyTorch, not waiting for a device."""
    common.check_values(g, q, cu_seqlens)
    B, T, H, K = k.shape
    dtype = common.wide_dtype(q)
    if S0 is None:
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        S0 = q.new_zeros(N, H, K, v.shape[3], dtype=dtype)
    decay = None if g is None else common.expand_gate(g.to(dtype), k).exp()
    group = common.heads_per_group(q, k)
    q = q.unflatten(2, (H, group)).to(dtype) * scale
    k = k.to(dtype)
    values = v.to(dtype)
    beta = None if beta is None else beta.to(dtype)
    if cu_seqlens is not None:
        sequence = common.sequence_ids(cu_seqlens, T)
        starts = cu_seqlens[sequence] == torch.arange(T, device=q.device)
    final_state = S0.clone()
    S = S0[:B]
    outputs = []
    for t in range(T):
        if cu_seqlens is not None:
            S = torch.where(starts[t], S0.index_select(0, sequence[t : t + 1]), S)
        if decay is not None:
            S = S * decay[:, t, :, :, None]
        update = values[:, t]
        if beta is not None:
            update = beta[:, t, :, None] * (update - (k[:, t, :, :, None] * S).sum(2))
        S = torch.addcmul(S, k[:, t, :, :, None], update[:, :, None, :])
        # A product and a sum instead of a matmul, which autocast or TF32 would round.
        outputs.append((q[:, t, :, :, :, None] * S[:, :, None]).sum(3).flatten(1, 2))
        if cu_seqlens is not None:  # The last token of a sequence writes last.
            final_state.index_copy_(0, sequence[t : t + 1], S)
    if T:
        o = torch.stack(outputs, 1).to(v.dtype)
    else:
        o = common.empty_output(v.repeat_interleave(group, 2), q, k, g, beta)
    return o, S if cu_seqlens is None and T else final_state


# Registered operators ---------------------------------------------------------------------------------------


def recurrent_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute o and the final states, or an empty tensor if they are not asked for."""
    if not common.has_kernel(q):
        o, final_state = run_recurrence(q, k, v, g, scale, initial_state, cu_seqlens, beta)
        return o, final_state if output_final_state else q.new_empty(0)
    from glalm.kernels.triton.recurrent import forward  # A machine without a GPU may lack Triton.

    _, final_state = recurrent_forward_fake(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)
    o = forward(q, k, v, g, scale, initial_state, final_state if output_final_state else None, cu_seqlens, beta)
    return o, final_state


def recurrent_forward_fake(
    q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, beta=None
) -> tuple[Tensor, Tensor]:
    """Return uninitialized tensors of the shapes and dtypes that recurrent_forward returns."""
    B, _, H, K = k.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (N, H, K, v.shape[3])
    final_state = q.new_empty(shape, dtype=common.wide_dtype(q)) if output_final_state else q.new_empty(0)
    return v.new_empty(*q.shape[:3], v.shape[3]), final_state


def recurrent_update(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, state: Tensor, beta: Tensor | None = None
) -> Tensor:
    """Compute o and overwrite `state` with the final states."""
    if common.has_kernel(q) and state.is_contiguous():
        from glalm.kernels.triton.recurrent import forward

        return forward(q, k, v, g, scale, state, state, None, beta)
    o, final_state = recurrent_forward(q, k, v, g, scale, state, True, None, beta)
    state.copy_(final_state)
    return o


def recurrent_update_fake(q, k, v, g, scale, state, beta=None) -> Tensor:
    """Return an uninitialized tensor of the shape and dtype that recurrent_update returns."""
    return v.new_empty(*q.shape[:3], v.shape[3])


forward_operator = common.register_operator("fused_recurrent", recurrent_forward, recurrent_forward_fake)
update_operator = common.register_operator(
    "fused_recurrent_update", recurrent_update, recurrent_update_fake, ("state",)
)
