"""Compile the kernels of Mamba, Mamba-2, short convolutions and gated norms for every kind of GPU, which needs none.

Each configuration must fit the shared memory of the GPUs it is chosen for, and those of Hopper must fit as many
programs on a multiprocessor as they were chosen for.
"""

import math

import pytest
import torch
from interpreter import INTERPRETED
from test_compiled import REGISTERS, WARPS, check_parameters, compile_kernel

from glalm.kernels.gated_norm import ACTIVATIONS
from glalm.kernels.triton import gated_norm, launch, segments, selective_scan, short_conv, ssd

# The shared memory of a program in bytes, by compute capability.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# Programs on a multiprocessor of a Hopper, by kernel, and for the scan of Mamba-2 whether it runs backward in time.
PROGRAMS = {
    "gated_norm_kernel": 8,
    "gated_norm_backward_kernel": 4,
    "selective_scan_kernel": 8,
    "selective_scan_backward_kernel": 2,
    "conv_kernel": 16,
    "conv_backward_kernel": 8,
    "ssd_scan_kernel": 2,
    "ssd_gradients_kernel": 1,
}


@pytest.fixture
def launches(monkeypatch):
    """The (kernel, arguments, constants, options) of every launch. No kernel runs."""
    recorded = []
    for module in (gated_norm, selective_scan, short_conv, ssd, segments):
        monkeypatch.setattr(module, "launch", lambda kernel, programs, *call: recorded.append((kernel, *call)))
    return recorded


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def launch_selective_scan(count: int) -> None:
    x, coefficients, A, D = zeros(1, 128, 64), zeros(1, 128, 16), torch.zeros(64, 16), torch.zeros(64)
    plan = selective_scan.ScanPlan(x, x, A, coefficients, coefficients, D, x, D, None)
    plan.count_segments = lambda config: count
    _, _, checkpoints = plan.forward(None, True)
    plan.backward(None, checkpoints, x, None)


def launch_short_conv(count: int) -> None:
    x = zeros(1, 128, 256)
    plan = short_conv.ConvPlan(x, torch.zeros(256, 4), torch.zeros(256), None, None)
    plan.forward()
    plan.backward(x, None)


def launch_gated_norm(count: int) -> None:
    x = zeros(64, 256)
    for activation in ACTIVATIONS:
        gated_norm.forward(x, x, torch.ones(256), 1e-5, activation)
        gated_norm.backward(x, x, torch.ones(256), x, 1e-5, activation)


def launch_ssd(count: int) -> None:
    x, dt, A, k = zeros(1, 128, 2, 64), torch.zeros(1, 128, 2), torch.zeros(2), zeros(1, 128, 1, 128)
    plan = ssd.SSDPlan(x, dt, A, k, k, A, None)
    plan.count_segments = lambda config: count
    plan.forward(None, True)
    plan.backward(None, x, None)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("launch_all", [launch_gated_norm, launch_selective_scan, launch_short_conv, launch_ssd])
def test_launches_give_every_parameter(launch_all, count, launches):
    launch_all(count)
    check_parameters(launches)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("launch_all", [launch_gated_norm, launch_selective_scan, launch_short_conv, launch_ssd])
def test_every_kernel_compiles_for_every_gpu(launch_all, capability, launches, monkeypatch):
    for module in (launch, selective_scan, short_conv, ssd):
        if hasattr(module, "architecture"):
            monkeypatch.setattr(module, "architecture", lambda device: capability // 10)
    launch_all(1 if capability == 90 else 2)
    assert launches
    for kernel, args, constants, options in launches:
        shared, used = compile_kernel(kernel, args, constants, options, capability)
        assert shared <= SHARED[capability] * 1024, kernel.__name__
        if capability == 90:
            warps = options.get("num_warps", 4)
            by_registers = REGISTERS // (warps * math.ceil(used * 32 / 256) * 256)
            fit = min(by_registers, SHARED[90] * 1024 // (shared + 1024), WARPS // warps)
            assert fit >= PROGRAMS.get(kernel.__name__, 1), (kernel.__name__, used, shared)
