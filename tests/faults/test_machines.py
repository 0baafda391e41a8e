"""A machine of several is lost. Two torchruns on one machine stand for torchrun on two machines."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import until
from sameness import assert_same

from glalm.train.checkpoint import latest_checkpoint
from glalm.train.watchdog import WATCHDOG_EXIT_CODE

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def start_machines(rendezvous: str, arguments: list[str], folder: Path) -> list[subprocess.Popen]:
    """Start one torchrun of one process for each machine. The first one serves the rendezvous."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launchers = []
    for i in (0, 1):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        if rendezvous == "static":
            command += [f"--node-rank={i}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        else:
            command += ["--rdzv-backend=c10d", "--rdzv-id=two", f"--rdzv-endpoint=127.0.0.1:{port}"]
            command += [f"--rdzv-conf=is_host={i == 0}", "--local-addr=127.0.0.1"]
        with open(folder / f"machine_{i}.log", "wb") as log:
            launchers.append(subprocess.Popen([*command, *arguments], cwd=ROOT, env=ENV, stdout=log, stderr=log))
    return launchers


def kill_machine(launcher: subprocess.Popen) -> None:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for pid in (launcher.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="The processes of a launcher are read from /proc.")
@pytest.mark.parametrize("rendezvous, lost", [("static", 0), ("static", 1), ("c10d", 1)])
def test_other_machine_ends_and_the_same_command_on_both_resumes(rendezvous, lost, token_folder, tmp_path):
    arguments = ["-m", "glalm", "train", f"runs_dir={tmp_path}", f"data.path={token_folder}", "train.batch_size=4"]
    arguments += ["data.seq_len=16", "model.hidden_size=32", "model.intermediate_size=32", "model.num_hidden_layers=1"]
    arguments += ["optim.warmup_steps=1", "train.log_every=1", "train.eval_every=400", "train.guard.hang_seconds=10"]
    arguments += ["train.steps=400", "train.checkpoint.every=40", "train.checkpoint.keep_last=99"]
    launchers = start_machines(rendezvous, [*arguments, "name=unbroken"], tmp_path)
    assert [launcher.wait(240) for launcher in launchers] == [0, 0], (tmp_path / "machine_0.log").read_text()

    broken = tmp_path / "broken"
    launchers = start_machines(rendezvous, [*arguments, "name=broken"], tmp_path)
    until(lambda: (broken / "checkpoints" / "step_40").exists(), 120)
    kill_machine(launchers[lost])
    for launcher in launchers:
        launcher.wait(120)
    log = (tmp_path / f"machine_{1 - lost}.log").read_text()
    line = re.search(r"rank (\d) ends the run: rank (?!\1)\d has died.*Last collectives: (\S+)", log)
    assert line, log
    assert Path(line[2]) == broken / f"flight_record_rank_{line[1]}" and Path(line[2]).stat().st_size
    assert re.search(rf"exitcode *: {WATCHDOG_EXIT_CODE}\b", log), log
    saved = latest_checkpoint(broken / "checkpoints").name
    assert saved != "step_400"

    launchers = start_machines(rendezvous, [*arguments, "name=broken"], tmp_path)
    assert [launcher.wait(240) for launcher in launchers] == [0, 0], (tmp_path / "machine_0.log").read_text()
    logs = [(tmp_path / f"machine_{i}.log").read_text() for i in (0, 1)]
    assert f"resuming after step {saved.removeprefix('step_')}" in "".join(logs)
    assert_same(broken, tmp_path / "unbroken")
