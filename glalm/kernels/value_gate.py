"""Linear attention gated on the value axis of its state, in plain PyTorch with autograd.

    S_t = S_{t-1} diag(exp g_t) + k_t^T v_t        o_t = scale * q_t S_t

Written out, o_t = scale * sum_{s <= t} (q_t . k_s) exp(g_{s+1} + ... + g_t) * v_s. The gate is no part of the scores,
so these are one matmul a chunk, and the pairs' decays are [C, C, V]: small chunks, for models of an ablation's size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels.common import check_inputs, check_values, expand_gate, map_sequences, sequence_masks, wide_dtype

CHUNK = 16


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
    """As `chunk_gla`, but for g: [B, T, H, V], v's shape.

    Computes in float32 (float64 for float64 inputs). cu_seqlens is read on the host where states go
    in or out.
    """
    check_inputs(q, k, v, expand_gate(None, q), initial_state, cu_seqlens)
    if g.shape != v.shape:
        raise ValueError(f"g: expected the shape of v, {list(v.shape)}, got {list(g.shape)}")
    check_values(g, q, cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    dtype = wide_dtype(q)
    inputs = [q.to(dtype) * scale, *(x.to(dtype) for x in (k, v, g))]
    with torch.autocast(q.device.type, enabled=False):
        o, state = map_sequences(chunks, inputs, initial_state, output_final_state, cu_seqlens)
    return o.to(v.dtype), state


def chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor | None, sequence: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The outputs and the last state; sequence [T]: which of several packed ones each token belongs to."""
    (B, T, H, K), V = q.shape, v.shape[3]
    S = q.new_zeros(B, H, K, V) if S is None else S
    q, k, v, g = (F.pad(x, (0, 0, 0, 0, 0, -T % CHUNK)).unflatten(1, (-1, CHUNK)) for x in (q, k, v, g))
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    # As in delta.py, sums of the gates between two tokens and no differences.
    between = g[:, :, :, None].masked_fill(~later.tril(-1)[:, :, None, None], 0).cumsum(2)
    decay = between.masked_fill(~later[:, :, None, None], -torch.inf).exp()
    entering, leaving = g.cumsum(2).exp(), between[:, :, -1].exp()
    if sequence is not None:
        together, before, after = (x[..., None] for x in sequence_masks(sequence, CHUNK))
        decay, entering, leaving = decay * together[..., None], entering * before, leaving * after
    scores = torch.einsum("bnihk,bnjhk->bnijh", q, k)
    inside = (scores[..., None] * decay * v[:, :, None]).sum(3)
    values, through = v * leaving, entering[:, :, -1]
    outputs = []
    # unbind and not indexing, whose gradients would each be as large as the whole.
    for parts in zip(*(x.unbind(1) for x in (q, k, values, entering, through, inside)), strict=True):
        qn, kn, values_n, entering_n, through_n, inside_n = parts
        outputs.append(inside_n + torch.einsum("bihk,bhkv->bihv", qn, S) * entering_n)
        S = S * through_n[:, :, None] + torch.einsum("bihk,bihv->bhkv", kn, values_n)
    return torch.cat(outputs, 1)[:, :T] if outputs else v.flatten(1, 2), S
