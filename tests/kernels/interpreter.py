"""Triton's interpreter is chosen by an environment variable when triton is imported: such tests run in a process of
their own, which one test of the file starts."""

import os
import subprocess
import sys

import numpy
import pytest
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file: str) -> None:
    """All tests of the file in a new process, in the interpreter."""
    if release(triton) < (3, 7) and release(numpy) >= (2, 4):
        pytest.skip("triton's interpreter before 3.7 cannot loop with numpy 2.4 or later: pip install 'numpy<2.4'")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", "-W", "ignore", file]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert " passed" in result.stdout


def release(package) -> tuple[int, ...]:
    return tuple(int(part) for part in package.__version__.split(".")[:2])
