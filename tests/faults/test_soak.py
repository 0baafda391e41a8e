"""Random faults for as long as a test may take. `soak.py --minutes 30` takes longer."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("soak.py")


@pytest.mark.slow
def test_five_minutes_of_random_faults_lose_nothing():
    command = [sys.executable, str(SCRIPT), "--minutes", "5"]
    done = subprocess.run(command, cwd=SCRIPT.parents[2], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0 and "nothing lost" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
