"""Linear attention gated on the value axis of its state, in plain PyTorch with autograd.

    S_t = S_{t-1} diag(exp g_t) + k_t^T v_t        o_t = scale * q_t S_t

Written out, o_t = scale * sum_{s <= t} (q_t . k_s) exp(g_{s+1} + ... + g_t) * v_s. The gate is no part of the scores,
so these are one matmul a chunk, and the pairs' decays are [C, C, V]: small chunks, for models of an ablation's size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels.checks import check_inputs, check_values
from glalm.kernels.gates import channels
from glalm.kernels.sequences import each_sequence

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

    Computes in float32 (float64 for float64 inputs). cu_seqlens is read on the host.
    """
    check_inputs(q, k, v, channels(None, q), initial_state, cu_seqlens)
    if g.shape != v.shape:
        raise ValueError(f"g: expected the shape of v, {list(v.shape)}, got {list(g.shape)}")
    check_values(g, q, cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    inputs = [q.to(dtype) * scale, *(x.to(dtype) for x in (k, v, g))]
    with torch.autocast(q.device.type, enabled=False):
        if cu_seqlens is None:
            o, state = chunks(*inputs, initial_state)
        else:
            o, state = each_sequence(chunks, inputs, initial_state, cu_seqlens)
    return o.to(v.dtype), state if output_final_state else None


def chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor]:
    (B, T, H, K), V = q.shape, v.shape[3]
    S = q.new_zeros(B, H, K, V) if S is None else S
    q, k, v, g = (F.pad(x, (0, 0, 0, 0, 0, -T % CHUNK)).unflatten(1, (-1, CHUNK)) for x in (q, k, v, g))
    total = g.cumsum(2)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    # exp of what is masked could overflow, and its gradient would be NaN.
    decay = (total[:, :, :, None] - total[:, :, None]).masked_fill(~later[:, :, None, None], -torch.inf).exp()
    scores = torch.einsum("bnihk,bnjhk->bnijh", q, k)
    inside = (scores[..., None] * decay * v[:, :, None]).sum(3)
    values, last = v * (total[:, :, -1:] - total).exp(), total[:, :, -1].exp()
    outputs = []
    # unbind and not indexing, whose gradients would each be as large as the whole.
    for parts in zip(*(x.unbind(1) for x in (q, k, values, total.exp(), last, inside)), strict=True):
        qn, kn, values_n, through, last_n, inside_n = parts
        outputs.append(inside_n + torch.einsum("bihk,bhkv->bihv", qn, S) * through)
        S = S * last_n[:, :, None] + torch.einsum("bihk,bihv->bhkv", kn, values_n)
    return torch.cat(outputs, 1)[:, :T] if outputs else v.flatten(1, 2), S
