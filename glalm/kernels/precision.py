"""The dtype that operators compute in and keep states in, whatever their inputs are of."""

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """float64 of float64 tensors, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is: for what autocast or half-precision weights must not round."""
    return x.to(wide_dtype(x))
