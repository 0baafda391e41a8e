"""The Slurm template with srun and scontrol replaced by what they do on one machine."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glalm.train.watchdog import WATCHDOG_EXIT_CODE

ROOT = Path(__file__).parents[2]
SRUN = f"""#!{sys.executable}
# Ends with the highest of the exit codes. By --kill-on-bad-exit=1 the first that is not 0 ends the others by SIGTERM.
import os, subprocess, sys, time
command = sys.argv[1:]
options = []
while command[0].startswith("--"):
    options.append(command.pop(0))
open("srun.log", "a").write(" ".join(options) + chr(10))
place = lambda i: os.environ | dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID"), str(i))
count = 1 if "--ntasks=1" in options else 2
tasks = [subprocess.Popen(command, env=place(i)) for i in range(count)]
while None in [task.poll() for task in tasks]:
    if "--kill-on-bad-exit=1" in options and any(task.returncode for task in tasks):
        [task.terminate() for task in tasks]
    time.sleep(0.02)
sys.exit(max(code if code >= 0 else 128 - code for code in [task.returncode for task in tasks]))
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> scontrol.log
[ "$1" = requeue ] || echo localhost
"""
# Python, which composes the config in order to know the run's folder, takes seconds.
PYTHON = """#!/bin/sh
echo runs/mine
"""


@pytest.fixture
def job(tmp_path):
    """job(*args, program, code): runs the template in tmp_path, with `program` as the command glalm. Returns stderr."""

    def write_command(name: str, text: str) -> None:
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        write_command(name, text)

    def run(*args: str, program: str, code: int) -> str:
        write_command("glalm", program)
        slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
        slurm |= {"SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_NAME": "glalm"}
        env = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        script = str(ROOT / "glalm/commands/pretrain.sbatch")
        done = subprocess.run(
            ["bash", script, *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr

    return run


def count_requeues(folder: Path) -> int:
    return (folder / "scontrol.log").read_text().count("requeue 77")


def test_every_process_knows_its_place(job, tmp_path):
    code = f"#!{sys.executable}\nimport os, sys\nnames = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR'\n"
    code += "place = [os.environ[name] for name in [*names.split(), 'MASTER_PORT']]\n"
    code += "open(f'rank_{place[0]}', 'w').write(f'{place} {sys.argv[1:]}')\n"
    job("experiment=gla_340m", "name='a b'", program=code, code=0)
    arguments = ["train", "experiment=gla_340m", "name='a b'"]
    for i in ("0", "1"):
        place = [i, i, "2", "2", "localhost", "20077"]
        assert (tmp_path / f"rank_{i}").read_text() == f"{place} {arguments}"
    assert (tmp_path / "scontrol.log").read_text() == "show hostnames n1\n"
    assert "--cpus-per-task=8" in (tmp_path / "srun.log").read_text()  # since 22.05 srun has it from nowhere else


@pytest.mark.parametrize("signal_number", ["ABRT", "BUS", "KILL", "SEGV"])
def test_a_run_that_a_signal_killed_is_queued_again(job, tmp_path, signal_number):
    code = 128 + signal.Signals[f"SIG{signal_number}"]
    job(program=f'#!/bin/sh\n[ "$RANK" = 0 ] && exit {WATCHDOG_EXIT_CODE}\nkill -{signal_number} $$\n', code=code)
    assert count_requeues(tmp_path) == 1


@pytest.mark.parametrize(
    "code, requeued",
    [(128 + signal.SIGUSR1, 1), (WATCHDOG_EXIT_CODE, 1), (0, 0), (1, 0), (2, 0), (128 + signal.SIGTERM, 0)],
)
def test_only_what_a_restart_mends_is_queued_again(job, tmp_path, code, requeued):
    job(program=f"#!/bin/sh\nexit {code}\n", code=code)
    assert count_requeues(tmp_path) == requeued


def check_that_three_starts_in_vain_are_the_last(job, folder: Path, saves: list[bool]) -> None:
    """Start the template again and again. Each start saves a checkpoint or not, and is ended by the watchdog."""
    for number, is_saving in enumerate(saves, 1):
        step = f"mkdir -p runs/mine/checkpoints/step_{100 * number}\n" if is_saving else ""
        stderr = job(program=f"#!/bin/sh\n{step}exit 70\n", code=70)
        is_over = number >= 3 and not any(saves[number - 3 : number])
        assert ("scontrol requeue 77" in stderr) == is_over
        if is_over:
            assert "glalm-77.failures" in stderr
            assert count_requeues(folder) == number - 1
            return
    assert count_requeues(folder) == len(saves)


def test_three_starts_without_a_new_checkpoint_end_the_job(job, tmp_path):
    check_that_three_starts_in_vain_are_the_last(job, tmp_path, [False, False, True, False, False, False])


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_any_starts_in_vain(job, tmp_path, saves):
    for name in ("runs", "glalm-77.failures", "scontrol.log"):
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    check_that_three_starts_in_vain_are_the_last(job, tmp_path, saves)


@pytest.mark.slow
def test_a_wrong_setting_is_refused_once(job, tmp_path):
    """Here the real Python composes the config, before the run is started on all nodes."""
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    stderr = job("train.stepz=5", program="#!/bin/sh\ntouch started\n", code=2)
    assert "ConfigError: " in stderr and "did you mean train.steps?" in stderr
    assert not (tmp_path / "started").exists()
    assert count_requeues(tmp_path) == 0
    # Its answer is the run's folder.
    program = "#!/bin/sh\nmkdir -p elsewhere/own/checkpoints/step_$(cat glalm-77.failures | wc -l)\nexit 70\n"
    job("name=own", "runs_dir=elsewhere", program=program, code=70)
    assert count_requeues(tmp_path) == 1 and not (tmp_path / "glalm-77.failures").exists()


def test_the_limit_stops_processes_that_do_not_leave_at_once(job, tmp_path):
    late = "#!/bin/bash\nfor _ in $(seq $((10 - 10 * RANK))); do sleep 0.1; done\nexit 138\n"  # rank 0 uploads its log
    job(program=late, code=138)
    assert count_requeues(tmp_path) == 1
