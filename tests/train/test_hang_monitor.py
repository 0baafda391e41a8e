"""A process that holds the GIL, or is stopped, seen from outside. Each test starts a Python without torch."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm.train import hang_monitor

if sys.platform != "linux":
    pytest.skip("Processes are watched from outside on Linux only.", allow_module_level=True)

SCRIPT = f"""
import ctypes, runpy, sys, time
module = runpy.run_path({hang_monitor.__file__!r}, run_name="hang_monitor")
monitor = module["HangMonitor"](1.0, 70, "rank 0")

def report(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        monitor.report("in step 3")
        print("ready", flush=True)
        time.sleep(0.1)
"""


def start(body: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT + body], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


SLOWLY = "ctypes.PyDLL(None).usleep"
HANGS = {
    # `usleep` as the comparison of qsort waits in a C loop, which no signal ends.
    "loop": f"ctypes.PyDLL(None).qsort((ctypes.c_int * 10**7)(), 10**7, 4, {SLOWLY})",
    "sleep": f"{SLOWLY}(30_000_000)",
    "pause": "ctypes.PyDLL(None).pause()",
    "builtin": "sum(range(10**12))",
}


@pytest.mark.parametrize(
    "hang", [name if name == "loop" else pytest.param(name, marks=pytest.mark.slow) for name in HANGS]
)
def test_process_that_holds_the_gil_ends_with_its_stack(hang):
    process = start(f"report(0.3)\n{HANGS[hang]}\ntime.sleep(0.5)\nmonitor.close()\n")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 70
    assert "rank 0 ends the run: it hangs, in step 3 for 1 s, in code that holds Python's lock" in errors
    assert 'File "<string>", line' in errors


@pytest.mark.slow
def test_stopped_process_goes_on():
    process = start("report(2.0)\nmonitor.close()\nprint('done')\n")
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    assert hang_monitor.is_stopped(process.pid)
    process.send_signal(signal.SIGCONT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "") and output.endswith("done\n")


def test_monitor_ends_with_its_process():
    process = start("report(0.3)\nprint(monitor._process.pid)\nreport(60)\n")
    line = next(line for line in process.stdout if line != "ready\n")
    monitor = Path(f"/proc/{int(line)}")
    assert monitor.exists()
    process.kill()
    process.communicate(timeout=60)
    end = time.monotonic() + 10
    while monitor.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not monitor.exists()


@pytest.mark.slow
def test_process_whose_monitor_was_killed_goes_on():
    process = start("monitor._process.kill()\nreport(1.5)\nmonitor.close()\n")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


class Process:
    """A process, its clock and its monitor's, for `watch`: waits of `delays` seconds, and a state after each."""

    def __init__(self, steps):
        self.steps = iter(steps)
        self.now = 0.0
        self.is_stopped = False
        self.has_ended = False

    def select(self, *_):
        kind, seconds = next(self.steps, ("ended", 0.0))
        self.now += seconds
        self.is_stopped = kind == "stopped"
        self.has_ended = kind == "ended"
        return ([1] if kind in ("reports", "ended") else [], [], [])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["reports", "silent", "stopped", "frozen"]), st.floats(0.5, 1.0)), max_size=60)
)
def test_only_seconds_awake_and_silent_count(steps):
    """A poll takes 0.5 to 1 s here, or an hour if both processes are frozen. Compare with a sum over the steps."""
    world = Process((kind, 3600.0 if kind == "frozen" else seconds) for kind, seconds in steps)
    silence, expected = 0.0, False
    for kind, seconds in steps:
        silence = 0.0 if kind == "reports" else silence + {"silent": seconds, "frozen": 1.0}.get(kind, 0.0)
        if silence > 6.0:
            expected = True
            break
    ended = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hang_monitor.select, "select", world.select)
        patch.setattr(hang_monitor.time, "monotonic", lambda: world.now)
        patch.setattr(hang_monitor.time, "sleep", lambda _: None)
        patch.setattr(hang_monitor.os, "read", lambda *_: b"" if world.has_ended else b"in step 3\n")
        patch.setattr(hang_monitor.os, "write", lambda *arguments: ended.append(arguments))
        patch.setattr(hang_monitor.os, "getppid", lambda: 5)
        patch.setattr(hang_monitor.os, "kill", lambda *_: None)
        patch.setattr(hang_monitor, "is_stopped", lambda _: world.is_stopped)
        hang_monitor.watch(5, 0, 1, 6.0, "rank 0")
    assert ended == ([(1, b"x")] if expected else [])
