"""The precision that a device can compute in, and the one that it is asked to compute in."""

import torch
from torch import Tensor

from glalm.config.strict import ConfigError
from glalm.kernels.common import constant_when_compiled


def has_bf16(device: torch.device) -> bool:
    """Return whether the device is a GPU that computes in bfloat16 without emulating it."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def choose_precision(wanted: str, device: torch.device, key: str = "precision") -> str:
    """Return "bf16" or "fp32" for the config key `key`. "auto" is bf16 on GPUs with bfloat16, and fp32 elsewhere.

    Raises ConfigError if bf16 is wanted on a GPU that would emulate it.
    """
    if wanted == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    if wanted == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise ConfigError(f"{key}=bf16: {torch.cuda.get_device_name(device)} has no bfloat16. Use {key}=fp32.")
    return wanted


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products of x: that of autocast if it applies to x, else its own."""
    device = x.device.type
    # Autocast leaves float64 alone.
    cast = x.dtype != torch.float64 and has_autocast(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast else x.dtype


@constant_when_compiled  # Dynamo in torch 2.11 does not trace torch's function.
def has_autocast(device: str) -> bool:
    """Return whether autocast supports this type of device."""
    return torch.amp.is_autocast_available(device)
