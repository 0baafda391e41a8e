"""The relatives of gated linear attention whose gate is simpler: one a head, a fixed one a head, or none.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

    simple_gla    g: [B, T, H], given         (the state-space dual of Mamba-2, arXiv 2405.21060)
    retention     g = log(1 - 2^(-5-h))       (RetNet, arXiv 2307.08621)
    linear_attn   g = 0                       (arXiv 2006.16236, without its feature map and normaliser)

Each has the arguments, results and errors of `chunk_gla` and `fused_recurrent_gla`, but for g.

On CUDA they run on the kernels of triton/head_gate.py, simpler and at least as quick as those of a gate a channel;
on the CPU the gate is spread over the channels.
"""

import torch
from torch import Tensor

from glalm.kernels.common import check_inputs, expand_gate, log_gate, wide_dtype
from glalm.kernels.gla import chunk
from glalm.kernels.recurrent import fused_recurrent


def chunk_simple_gla(
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
    """`chunk_gla` with one gate a head: g [B, T, H], log of the forget gate, <= 0, or logits of it.

    Raises ValueError, as chunk_gla does, when a shape, dtype or device does not fit.
    """
    check_gate(q, k, v, g, initial_state, cu_seqlens)
    return chunk(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, gate_logit_normalizer)


def fused_recurrent_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, gate_logit_normalizer: float | None = None, **options
) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_gla` with one gate a head: g [B, T, H]."""
    check_gate(q, k, v, g, options.get("initial_state"), options.get("cu_seqlens"))
    return fused_recurrent(q, k, v, log_gate(g, gate_logit_normalizer), **options)


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gla` with RetNet's decay 1 - 2^(-5-h) of head h = 0, 1, ..."""
    g = head_decay(q)
    check_inputs(q, k, v, expand_gate(g, q), initial_state, cu_seqlens)
    return chunk(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_retention(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_gla` with RetNet's decay 1 - 2^(-5-h) of head h = 0, 1, ..."""
    g = head_decay(q)
    check_inputs(q, k, v, expand_gate(g, q), options.get("initial_state"), options.get("cu_seqlens"))
    return fused_recurrent(q, k, v, g, **options)


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gla` without a gate: S_t = S_{t-1} + k_t^T v_t."""
    check_inputs(q, k, v, expand_gate(None, q), initial_state, cu_seqlens)
    return chunk(q, k, v, None, scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_linear_attn(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_gla` without a gate: S_t = S_{t-1} + k_t^T v_t."""
    check_inputs(q, k, v, expand_gate(None, q), options.get("initial_state"), options.get("cu_seqlens"))
    return fused_recurrent(q, k, v, None, **options)


def head_decay(q: Tensor) -> Tensor:
    """log(1 - 2^(-5-h)) of every head: [H], float32 (float64 for float64 q)."""
    if q.dim() != 4:
        raise ValueError(f"q: expected the shape [B, T, H, K] with K > 0, got {list(q.shape)}")
    heads = torch.arange(q.shape[2], device=q.device, dtype=wide_dtype(q))
    return torch.log1p(-torch.exp2(-5 - heads))


def check_gate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """check_inputs for one gate a head."""
    if q.dim() == 4 and g.shape != q.shape[:3]:
        raise ValueError(f"g: expected the shape [B, T, H] = {list(q.shape[:3])}, got {list(g.shape)}")
    check_inputs(q, k, v, expand_gate(g, q), initial_state, cu_seqlens)
