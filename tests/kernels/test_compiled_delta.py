"""Compile the delta rule's kernels for every architecture, which needs no GPU."""

import pytest
import torch
from interpreter import INTERPRETED
from test_compiled import KIBIBYTES, check_parameters, compile_kernel

from glalm.kernels.triton import delta, launch

SIZES = [(64, 64), (128, 256), (256, 512)]
GATES = ["nothing", "head", "channel"]
# All sizes and gates where the table was measured and where there is least memory. Elsewhere each kernel once (without
# a gate they are those of one per head): at the largest sizes, but at the smallest for 80 and 89, whose launches and
# instructions are those of 86 and which have no less memory.
CASES = [(capability, sizes, per) for capability in (86, 90) for sizes in SIZES for per in GATES]
CASES += [(capability, (256, 512), per) for capability in (100, 120) for per in GATES[1:]]
CASES += [(capability, (64, 64), per) for capability in (80, 89) for per in GATES[1:]]


@pytest.fixture
def launches(monkeypatch):
    """The (kernel, arguments, constants, options) of every launch. No kernel runs."""
    recorded = []
    monkeypatch.setattr(delta, "launch", lambda kernel, programs, *call: recorded.append((kernel, *call)))
    return recorded


def run_both_passes(K: int, V: int, per: str, dtype: torch.dtype) -> None:
    q, v = (torch.zeros(1, 64, 1, n, dtype=dtype) for n in (K, V))
    beta = torch.zeros(1, 64, 1)
    g = {"nothing": None, "head": beta, "channel": q.float()}[per]
    S = torch.zeros(1, 1, K, V)
    args = q, q, v, beta, g, 1.0, dtype == torch.bfloat16, S
    *_, saved = delta.forward(*args, True, None)
    delta.backward(*args, None, saved, v, S)


def check_shared_memory(launches, capability: int) -> None:
    for kernel, args, constants, options in launches:
        shared, _ = compile_kernel(kernel, args, constants, options, capability)
        assert shared <= KIBIBYTES[capability] * 1024, (kernel.__name__, shared)


@pytest.mark.parametrize("per", GATES)
def test_launches_give_every_parameter(per, launches):
    run_both_passes(64, 64, per, torch.bfloat16)
    check_parameters(launches)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability, sizes, per", CASES, ids=str)
def test_shared_memory_suffices(capability, sizes, per, launches, monkeypatch):
    monkeypatch.setattr(launch, "architecture", lambda device: capability // 10)
    run_both_passes(*sizes, per, torch.bfloat16)
    check_shared_memory(launches, capability)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_shared_memory_suffices_in_float32(launches):
    run_both_passes(64, 64, "head", torch.float32)
    check_shared_memory(launches, 86)
