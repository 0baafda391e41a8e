"""What a run computes with: versions, the commit of the source, and the device with its peak speed."""

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

# FLOP/s of bfloat16 matrix products with float32 accumulation, from NVIDIA's data sheets. Most of them print the speed
# with sparsity, which is twice this: 5,000 TFLOPS for the GB200's GPUs, 1,671 for the H200 NVL. The first pattern that
# matches the device's name counts.
PEAK_FLOPS = {
    r"\bMIG\b": None,  # The device is a part of a GPU.
    r"\bGB200\b": 2500e12,
    r"\bB200\b": 2250e12,
    r"\bH100 PCIe\b": 756e12,
    r"\b(H200|H100) NVL\b": 835e12,
    r"\b(H200|H100|GH200)\b": 989e12,
    r"\bA100\b": 312e12,
    r"\bL40S\b": 362e12,
    r"\bL4\b": 121e12,
}


def describe_environment(device: torch.device | None = None, float8: bool = False) -> dict:
    """Return {"versions", "git", "device"} for a record of what was computed.

    Args:
        device: Where it was computed; None is a GPU if there is one.
        float8: Add the version of torchao.
    """
    use_gpu = device.type == "cuda" if device else torch.cuda.is_available()
    versions = {module.__name__: module.__version__ for module in (glalm, torch, transformers, accelerate)}
    versions |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    if has_triton_package():
        import triton  # The package's metadata does not help: some builds are installed under other names.

        versions["triton"] = triton.__version__
    if float8:
        versions["torchao"] = metadata.version("torchao")
    return {"versions": versions, "git": describe_commit(), "device": device_name(use_gpu)}


def device_name(use_gpu: bool) -> str:
    """Return the name of the current GPU, or of the processor."""
    return torch.cuda.get_device_name() if use_gpu else platform.processor() or platform.machine()


def describe_commit(folder: Path = Path(glalm.__file__).parent) -> dict | None:
    """Return {"commit", "dirty"} of the package's source, or None if it is not in a git repository.

    "dirty" is whether the source differs from the commit.
    """

    def run_git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        # This fails in a repository that merely contains an installed copy of the package.
        run_git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": run_git("rev-parse", "HEAD"), "dirty": run_git("status", "--porcelain", "--", ".") != ""}
    except (OSError, subprocess.SubprocessError):
        return None


def peak_flops(device: torch.device | str) -> float | None:
    """Return the peak FLOP/s in bfloat16 of a device, or of the device of this name. None if it is unknown."""
    name = device if isinstance(device, str) else device_name(device.type == "cuda")
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(pattern, name)), None)
