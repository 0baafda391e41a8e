"""The relatives of gated linear attention whose gate is simpler: one a head, a fixed one a head, or none.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

    simple_gla    g: [B, T, H], given         (the state-space dual of Mamba-2, arXiv 2405.21060)
    retention     g = log(1 - 2^(-5-h))       (RetNet, arXiv 2307.08621)
    linear_attn   g = 0                       (arXiv 2006.16236, without its feature map and normaliser)

Each has the arguments, results and errors of `chunk_gla` and `fused_recurrent_gla`, but for g.
"""

import torch
from torch import Tensor

from glalm.kernels.gla import chunk_gla, fused_recurrent_gla


def chunk_simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    """`chunk_gla` with one gate a head: g [B, T, H], log of the forget gate, <= 0.

    Raises ValueError, as chunk_gla does, when a shape, dtype or device does not fit.
    """
    return chunk_gla(q, k, v, spread(g, q), **options)


def fused_recurrent_simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_gla` with one gate a head: g [B, T, H]."""
    return fused_recurrent_gla(q, k, v, spread(g, q), **options)


def chunk_retention(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    """`chunk_gla` with RetNet's decay 1 - 2^(-5-h) of head h = 0, 1, ..."""
    return chunk_gla(q, k, v, spread(retention_decay(q), q), **options)


def fused_recurrent_retention(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_gla` with RetNet's decay 1 - 2^(-5-h) of head h = 0, 1, ..."""
    return fused_recurrent_gla(q, k, v, spread(retention_decay(q), q), **options)


def chunk_linear_attn(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    """`chunk_gla` without a gate: S_t = S_{t-1} + k_t^T v_t."""
    return chunk_gla(q, k, v, spread(ungated(q), q), **options)


def fused_recurrent_linear_attn(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_gla` without a gate: S_t = S_{t-1} + k_t^T v_t."""
    return fused_recurrent_gla(q, k, v, spread(ungated(q), q), **options)


def retention_decay(q: Tensor) -> Tensor:
    """log(1 - 2^(-5-h)) of every token and head: [B, T, H], float32 (float64 for float64 q)."""
    check_rank(q)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads = torch.arange(q.shape[2], device=q.device, dtype=dtype)
    return torch.log1p(-torch.exp2(-5 - heads)).expand(q.shape[:3])


def ungated(q: Tensor) -> Tensor:
    check_rank(q)
    return q.new_zeros((), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32).expand(q.shape[:3])


def spread(g: Tensor, q: Tensor) -> Tensor:
    """A gate a head as a gate a channel; autograd sums the channels' gradients up again."""
    check_rank(q)
    if g.shape != q.shape[:3]:
        raise ValueError(f"g: expected the shape [B, T, H] = {list(q.shape[:3])}, got {list(g.shape)}")
    return g[..., None].expand(q.shape)


def check_rank(q: Tensor) -> None:
    if q.dim() != 4:
        raise ValueError(f"q: expected the shape [B, T, H, K] with K > 0, got {list(q.shape)}")
