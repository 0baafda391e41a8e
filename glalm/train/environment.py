"""What a run computes with: versions, the source's commit, the device and its speed."""

import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import accelerate
import torch
import transformers
from torch.utils._triton import has_triton_package

import glalm

# bfloat16 matrix products with float32 sums, FLOP/s without sparsity, from NVIDIA's data sheets. The first that fits.
PEAKS = {
    r"\bB200\b": 2250e12,
    r"\bH100 PCIe\b": 756e12,
    r"\bH100 NVL\b": 835e12,
    r"\b(H200|H100|GH200)\b": 989e12,
    r"\bA100\b": 312e12,
    r"\bL40S\b": 362e12,
    r"\bL4\b": 121e12,
}


def environment(float8: bool = False) -> dict:
    """{"versions", "git", "device"}, for a run's record; with train.float8 also torchao's version."""
    versions = {m.__name__: m.__version__ for m in (glalm, torch, transformers, accelerate)}
    versions |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    if has_triton_package():
        import triton  # some builds are called otherwise when installed

        versions["triton"] = triton.__version__
    if float8:
        versions["torchao"] = metadata.version("torchao")
    return {"versions": versions, "git": git_state(), "device": device_name(torch.cuda.is_available())}


def device_name(cuda: bool) -> str:
    return torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()


def git_state(folder: Path = Path(glalm.__file__).parent) -> dict | None:
    """{"commit", "dirty"} of the package's source: dirty when it differs from the commit. None where git has none."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not a repository that merely holds an installed copy
        return {"commit": git("rev-parse", "HEAD"), "dirty": git("status", "--porcelain", "--", ".") != ""}
    except (OSError, subprocess.SubprocessError):
        return None


def peak_flops(device: torch.device | str) -> float | None:
    """The device's peak in bfloat16, FLOP/s; a device by its name. None where it is not in the table."""
    name = device if isinstance(device, str) else device_name(device.type == "cuda")
    return next((peak for pattern, peak in PEAKS.items() if re.search(pattern, name)), None)
