import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHILD = "from glalm.data.processes import call_without_parent; import os, time; "
CHILD += "call_without_parent(lambda: (open('called', 'w').close(), os._exit(0))); print(os.getpid(), flush=True); "
CHILD += "time.sleep(60)"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"


def test_orphan_is_called(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    child = int(parent.stdout.readline())
    time.sleep(0.7)
    assert not (tmp_path / "called").exists()
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while not (tmp_path / "called").exists():
        assert time.monotonic() < end, f"process {child} outlived its parent"
        time.sleep(0.05)
