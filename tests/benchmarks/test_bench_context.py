"""Run the benchmark of shared sequences at sizes for a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "context_parallel.py"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_table(*command: str) -> list[list[str]]:
    """Return the cells of the table's rows that the command prints."""
    done = subprocess.run([sys.executable, *command], env=ENV, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    return rows[2:]


@pytest.mark.slow
def test_turns_give_the_results_of_one_call():
    [row] = run_table(str(SCRIPT), "--lengths", "256", "--size", "4")
    assert row[:2] == ["256", "4"]
    assert float(row[6]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_processes_train_each_mixer(processes):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    rows = run_table(*torchrun, str(SCRIPT), "--train", "--tiny", "--lengths", "128", "--steps", "1")
    assert [row[:2] for row in rows] == [["gla", "128"], ["attention", "128"]]
    assert all(9 < float(row[4]) < 12 for row in rows)  # a vocabulary of 32,000, random tokens
