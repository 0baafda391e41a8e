"""In which numbers a device can compute, and in which it does."""

import torch
from torch import Tensor


def has_bf16(device: torch.device) -> bool:
    """Whether it is a GPU that computes in bfloat16 without emulating it."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """That of x's products: autocast's where there is one, which leaves float64 alone, else x's own."""
    device = x.device.type
    cast = x.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast else x.dtype
