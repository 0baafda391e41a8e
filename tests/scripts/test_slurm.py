"""The Slurm template with srun and scontrol replaced by what they do on one machine."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRUN = """#!/usr/bin/env bash
shift  # --kill-on-bad-exit=1
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids="$pids $!"; done
for pid in $pids; do wait $pid || code=$?; done
exit ${code:-0}
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


@pytest.mark.parametrize("code, requeued", [(128 + signal.SIGUSR1, True), (1, False), (128 + signal.SIGTERM, False)])
def test_only_a_run_that_the_limit_stopped_is_queued_again(job, tmp_path, code, requeued):
    job(python=f"#!/bin/sh\nexit {code}\n", code=code)
    assert ("requeue 77" in (tmp_path / "scontrol.log").read_text()) == requeued
