import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_shapes.py"


@pytest.mark.slow
def test_each_length_is_a_row():
    command = [sys.executable, SCRIPT, "--tiny", "--steps", "2"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert rows == ["sequences x tokens", "4 x 32", "2 x 64"]
