"""The Slurm template with srun and scontrol replaced by what they do on one machine."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRUN = f"""#!{sys.executable}
# Ends with the highest of the exit codes. By --kill-on-bad-exit=1 the first that is not 0 ends the others by SIGTERM.
import os, subprocess, sys, time
command = sys.argv[1:]
options = []
while command[0].startswith("--"):
    options.append(command.pop(0))
open("srun.log", "w").write(" ".join(options))
place = lambda i: os.environ | dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID"), str(i))
tasks = [subprocess.Popen(command, env=place(i)) for i in range(2)]
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


@pytest.fixture
def job(tmp_path):
    """job(*args, python): runs the template in tmp_path, with `python` as the program that trains."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*args: str, python: str, code: int) -> str:
        (tmp_path / "python").write_text(python)
        (tmp_path / "python").chmod(0o755)
        slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
        slurm["SLURM_CPUS_PER_TASK"] = "8"
        env = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        script = str(ROOT / "scripts/slurm/pretrain.sbatch")
        done = subprocess.run(
            ["bash", script, *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return run


def test_every_process_knows_its_place(job, tmp_path):
    code = f"#!{sys.executable}\nimport os, sys\nnames = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR'\n"
    code += "place = [os.environ[name] for name in [*names.split(), 'MASTER_PORT']]\n"
    code += "open(f'rank_{place[0]}', 'w').write(f'{place} {sys.argv[1:]}')\n"
    job("experiment=gla_340m", "name='a b'", python=code, code=0)
    arguments = ["train.py", "experiment=gla_340m", "name='a b'"]
    for i in ("0", "1"):
        place = [i, i, "2", "2", "localhost", "20077"]
        assert (tmp_path / f"rank_{i}").read_text() == f"{place} {arguments}"
    assert (tmp_path / "scontrol.log").read_text() == "show hostnames n1\n"
    assert "--cpus-per-task=8" in (tmp_path / "srun.log").read_text()  # since 22.05 srun has it from nowhere else


@pytest.mark.parametrize("code, requeued", [(128 + signal.SIGUSR1, True), (1, False), (128 + signal.SIGTERM, False)])
def test_only_a_run_that_the_limit_stopped_is_queued_again(job, tmp_path, code, requeued):
    job(python=f"#!/bin/sh\nexit {code}\n", code=code)
    assert ("requeue 77" in (tmp_path / "scontrol.log").read_text()) == requeued


def test_the_limit_stops_processes_that_do_not_leave_at_once(job, tmp_path):
    late = "#!/bin/bash\nfor _ in $(seq $((10 - 10 * RANK))); do sleep 0.1; done\nexit 138\n"  # rank 0 uploads its log
    job(python=late, code=138)
    assert "requeue 77" in (tmp_path / "scontrol.log").read_text()
