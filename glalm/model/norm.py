"""RMSNorm, with a gate, and of parts."""

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's, with the weight in x's dtype: under autocast they differ, and torch then warns and leaves its kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class GroupedRMSNorm(nn.RMSNorm):
    """RMSNorm of each of `groups` equal parts of the last axis by itself; the weight is for all of the axis."""

    def __init__(self, size: int, groups: int, eps: float):
        super().__init__(size, eps=eps)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (self.groups, -1))
        return F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * self.weight


class GatedRMSNorm(RMSNorm):
    """RMSNorm over the last axis, then a swish output gate: norm(x) * weight * silu(gate)."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * F.silu(gate)
