"""The Slurm template with srun and scontrol replaced by what they do on one machine."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glalm.commands.slurm import check_run
from glalm.config.run import DataConfig
from glalm.evals.options import TrainingRun
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
is_passed_on = lambda name: os.environ["SLURM_EXPORT_ENV"] == "ALL" or name.startswith("SLURM_")
environment = {{name: value for name, value in os.environ.items() if is_passed_on(name)}}
place = lambda i: environment | dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID"), str(i))
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
        slurm |= {"SLURM_EXPORT_ENV": "NONE"}  # as sbatch --export=NONE sets it
        env = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        script = str(ROOT / "glalm/commands/pretrain.sbatch")
        done = subprocess.run(
            ["bash", script, *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=180
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
        assert ("The job is not queued again" in stderr and "submit again" in stderr) == is_over
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
def test_a_wrong_setting_is_refused_once(job, tmp_path, token_folder):
    """Here the real Python composes the config, before the run is started on all nodes."""
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    stderr = job("train.stepz=5", program="#!/bin/sh\ntouch started\n", code=2)
    assert "ConfigError: " in stderr and "did you mean train.steps?" in stderr
    assert not (tmp_path / "started").exists()
    assert count_requeues(tmp_path) == 0
    stderr = job("data.path=nowhere", program="#!/bin/sh\ntouch started\n", code=2)
    assert stderr.count("nowhere/manifest.json is missing") == 1 and not (tmp_path / "started").exists()
    # Its answer is the run's folder.
    program = "#!/bin/sh\nmkdir -p elsewhere/own/checkpoints/step_$(cat glalm-77.failures | wc -l)\nexit 70\n"
    job("name=own", "runs_dir=elsewhere", f"data.path={token_folder}", program=program, code=70)
    assert count_requeues(tmp_path) == 1 and not (tmp_path / "glalm-77.failures").exists()


def check_run_of(capsys, *args: str) -> str:
    """Return what the template's check prints as the run's folder."""
    check_run([*args])
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_check_knows_the_run_and_its_data(token_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = f"data.path={token_folder}"
    assert check_run_of(capsys, "name=big", data) == "runs/big\n"
    # A run that is continued by its name has the path of its first start.
    config = dataclasses.asdict(TrainingRun(name="big", data=DataConfig(path=str(token_folder))))
    (tmp_path / "runs/big").mkdir(parents=True)
    (tmp_path / "runs/big/run.json").write_text(json.dumps({"config": config}))
    assert check_run_of(capsys, "name=big") == "runs/big\n"
    assert check_run_of(capsys, "resume=runs/big") == "runs/big\n"


@pytest.mark.parametrize(
    "args, message",
    [
        (["data.path=corpsu"], "ConfigError: data.path=corpsu: corpsu/manifest.json is missing"),
        (["name=big", "--nodes=2"], "--nodes=2: options of sbatch go before the template's name"),
        (["-N", "2"], "sbatch -N pretrain.sbatch"),
        (["paralel=hsdp"], "did you mean parallel?"),
    ],
)
def test_the_check_refuses_what_the_run_would_refuse(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        check_run(args)
    assert exited.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_the_limit_stops_processes_that_do_not_leave_at_once(job, tmp_path):
    late = "#!/bin/bash\nfor _ in $(seq $((10 - 10 * RANK))); do sleep 0.1; done\nexit 138\n"  # rank 0 uploads its log
    job(program=late, code=138)
    assert count_requeues(tmp_path) == 1
