"""Rotary positions (Su et al., arXiv 2104.09864), in LLaMA's layout: channel i turns with channel i + D/2."""

import torch
from torch import Tensor

from glalm.kernels.common import wide_dtype


def rotate(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """x: [B, T, H, D], D even; positions: [B or 1, T]. Channel pair i turns by position * theta^(-2i/D) radians.

    The angles are float32 (float64 for float64 x), the result in x's dtype. q_s . k_t then depends on s - t alone.
    """
    half, dtype = x.shape[-1] // 2, wide_dtype(x)
    frequencies = theta ** -(torch.arange(half, device=x.device, dtype=dtype) / half)
    angles = positions[..., None, None].to(dtype) * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
