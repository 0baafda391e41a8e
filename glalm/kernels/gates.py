"""What a gate argument may be: one a key channel, one a head or none; its logarithm, or logits of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels.checks import check_normalizer
from glalm.kernels.precision import at_least_float32, wide_dtype


def channels(g: Tensor | None, q: Tensor) -> Tensor:
    """Any gate, [B, T, H, K], [B, T, H], [H] or None, as one a key channel, [B, T, H, K], without a copy.

    A gate of four dimensions and another shape is left to check_inputs.
    """
    if q.dim() != 4:
        return q  # which check_inputs refuses
    if g is None:
        return q.new_zeros((), dtype=wide_dtype(q)).expand(q.shape)
    if g.dim() == 4 and g.shape != q.shape:
        return g
    expected = {1: q.shape[2:3], 3: q.shape[:3]}.get(g.dim(), q.shape)
    if g.shape != expected:
        raise ValueError(f"g: expected the shape {list(expected)}, as q is {list(q.shape)}, got {list(g.shape)}")
    return (g if g.dim() == 4 else g[..., None]).expand(q.shape)


def log_gate(g: Tensor | None, normalizer: float | None) -> Tensor | None:
    """logsigmoid(g) / normalizer in float32 or wider; without a normalizer g is the log gate already."""
    check_normalizer(normalizer)
    if g is None or normalizer is None:
        return g
    return F.logsigmoid(at_least_float32(g)) / normalizer


def has_gradient(g: Tensor | None) -> bool:
    """Whether there is a gradient of this gate: one a token gets it, [H], the same for all tokens, does not."""
    return g is not None and g.dim() > 1


def gate_gradient(dg: Tensor, g: Tensor | None, normalizer: float | None) -> Tensor | None:
    """From the gradient of the log gates, one a key channel, to that of g as it was given; None of a fixed one."""
    if not has_gradient(g):
        return None
    if g.dim() == 3:
        dg = dg.sum(-1)
    if normalizer is not None:
        dg = dg * torch.sigmoid(-g.to(dg.dtype)) / normalizer
    return dg.to(g.dtype)
