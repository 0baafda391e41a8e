"""RMSNorm, and with a gate."""

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's, with the weight in x's dtype: under autocast they differ, and torch then warns and leaves its kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class GatedRMSNorm(RMSNorm):
    """RMSNorm over the last axis, then a swish output gate: norm(x) * weight * silu(gate)."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * F.silu(gate)
