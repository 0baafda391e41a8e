"""The recurrence token by token, for every gate: decoding, where a state is carried and T is mostly 1.

On CUDA, without gradients, one Triton kernel: the state is read once and written once, cu_seqlens is read on the
device. With gradients, on the CPU and in float64, plain PyTorch with autograd.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from glalm.kernels.common import check_values, expand_gate, has_kernel, register_operator, sequence_ids, wide_dtype


class Mode(threading.local):
    """Each thread's own: one that decodes must not have another's kept states written over."""

    in_place = False


_mode = Mode()


@contextmanager
def states_in_place() -> Iterator[None]:
    """Inside, the fused_recurrent operators write the final state over a given initial one and return that.

    For a decoder that owns its states: half of the memory, and buffers that stay where a CUDA graph has them.
    Without gradients, and not for packed sequences nor in compiled code, which do as before.
    """
    before, _mode.in_place = _mode.in_place, True
    try:
        yield
    finally:
        _mode.in_place = before


def in_place() -> bool:
    return not torch.compiler.is_compiling() and _mode.in_place  # no guard of a compiled graph would see it change


def fused_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(g_t) S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t. g: [B, T, H, K], [B, T, H], [H], or None for no gate.

    The other arguments and results are those of `chunk_gla`; the public operators have checked them.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    inputs = [x for x in (q, k, v, g, initial_state) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        o, final_state = recurrent(q, k, v, g, scale, initial_state, cu_seqlens)
    elif in_place() and initial_state is not None and cu_seqlens is None:
        o, final_state = update_op(q, k, v, g, scale, initial_state), initial_state
    else:
        o, final_state = forward_op(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)
    return o, final_state if output_final_state else None


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, initial: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """In PyTorch: o [B, T, H, V] and the final states [N, H, K, V]. No accelerator is waited for."""
    check_values(g, q, cu_seqlens)
    (B, T, H, K), V = q.shape, v.shape[3]
    if initial is None:
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        initial = q.new_zeros(N, H, K, V, dtype=wide_dtype(q))
    decay = None if g is None else expand_gate(g.to(wide_dtype(q)), q).exp()
    q, k, values = q.to(initial.dtype) * scale, k.to(initial.dtype), v.to(initial.dtype)
    final, S, outputs = initial.clone(), initial[:B], []
    if cu_seqlens is not None:
        owner = sequence_ids(cu_seqlens, T)
        starts = cu_seqlens[owner] == torch.arange(T, device=q.device)
    for t in range(T):
        if cu_seqlens is not None:
            S = torch.where(starts[t], initial.index_select(0, owner[t : t + 1]), S)
        S = S if decay is None else S * decay[:, t, :, :, None]
        S = torch.addcmul(S, k[:, t, :, :, None], values[:, t, :, None, :])
        # Not a matmul, which autocast and TF32 would round.
        outputs.append((q[:, t, :, :, None] * S).sum(2))
        if cu_seqlens is not None:  # the last token's stays
            final.index_copy_(0, owner[t : t + 1], S)
    o = torch.stack(outputs, 1).to(v.dtype) if T else torch.empty_like(v)
    return o, S if cu_seqlens is None and T else final


def recurrent_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if not has_kernel(q):
        o, final_state = recurrent(q, k, v, g, scale, initial_state, cu_seqlens)
        return o, final_state if output_final_state else q.new_empty(0)
    from glalm.kernels.triton.recurrent import forward  # here, since a machine without a GPU may lack triton

    _, final_state = recurrent_forward_fake(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)
    o = forward(q, k, v, g, scale, initial_state, final_state if output_final_state else None, cu_seqlens)
    return o, final_state


def recurrent_forward_fake(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens):
    (B, _, H, K), V = q.shape, v.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = q.new_empty(N, H, K, V, dtype=wide_dtype(q)) if output_final_state else q.new_empty(0)
    return v.new_empty(v.shape), final_state


def recurrent_update(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, state: Tensor) -> Tensor:
    if has_kernel(q) and state.is_contiguous():
        from glalm.kernels.triton.recurrent import forward

        return forward(q, k, v, g, scale, state, state, None)
    o, final_state = recurrent_forward(q, k, v, g, scale, state, True, None)
    state.copy_(final_state)
    return o


def recurrent_update_fake(q, k, v, g, scale, state):
    return v.new_empty(v.shape)


forward_op = register_operator("fused_recurrent", recurrent_forward, recurrent_forward_fake)
update_op = register_operator("fused_recurrent_update", recurrent_update, recurrent_update_fake, mutates=("state",))
