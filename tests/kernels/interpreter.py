"""Run the tests of a file in Triton's interpreter.

An environment variable selects the interpreter when triton is imported. So these tests run in a new process, which one
test of the file starts.
"""

import os
import subprocess
import sys
from types import ModuleType

import numpy
import pytest
import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
if INTERPRETED:
    # New tensors are then NaN, so a test fails if a kernel reads what none has written.
    torch.use_deterministic_algorithms(True)


def run_interpreted(file: str) -> None:
    """Run all tests of the file in a new process, in the interpreter."""
    if major_and_minor(triton) < (3, 7) and major_and_minor(numpy) >= (2, 4):
        pytest.skip("Triton's interpreter before 3.7 cannot run loops with numpy 2.4 or later: pip install 'numpy<2.4'")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", "-W", "ignore", file]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert " passed" in result.stdout


def record_launched(monkeypatch: pytest.MonkeyPatch, module: ModuleType, argument: str) -> list:
    """Return a list to which each launch of the module's kernels adds an argument, instead of running the kernel."""
    values = []

    def record(kernel, programs, args, *_):
        values.extend(x for name, x in zip(kernel.arg_names, args, strict=False) if name == argument)

    monkeypatch.setattr(module, "launch", record)
    return values


def major_and_minor(package) -> tuple[int, ...]:
    """Return the first two numbers of a package's version."""
    return tuple(int(part) for part in package.__version__.split(".")[:2])
