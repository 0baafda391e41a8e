"""Sweeps by `glalm train --multirun`: each job has a run of its own, whatever launcher starts it."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import current_process, get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra.core.utils import JobReturn, JobStatus

from glalm import launcher
from glalm.cli import PLUGIN_SOURCES, check_plugins, normalize_overrides
from glalm.config.saved_run import name_sweep_run
from glalm.config.strict import ConfigError, RunError
from glalm.train.metrics import read_metrics

ROOT = Path(__file__).parent.parent


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Train models of a second by `train.py --multirun`, and return how it has ended."""
    sizes = ["model.vocab_size=320", "model.hidden_size=32", "model.num_hidden_layers=1", "data.seq_len=16"]
    budget = ["train.batch_size=4", "train.steps=4", "train.eval_every=4", "optim.warmup_steps=1", "optim.min_lr=0"]
    command = [sys.executable, "train.py", "--multirun", "name=a", f"runs_dir={folder}", *sizes, *budget, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def final_losses(folder: Path) -> dict[str, float]:
    return {path.parent.name: read_metrics(path)[0][-1]["val_loss"] for path in sorted(folder.glob("*/metrics.jsonl"))}


LAUNCHERS = {
    "basic": [],
    "processes": ["hydra.launcher.at_once=2"],
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra.launcher.timeout_min=5"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_each_job_trains_and_a_refused_one_does_not_stop_the_others(name, token_folder, tmp_path):
    command = [f"data.path={token_folder}", f"hydra/launcher={name}", *LAUNCHERS[name], "optim.lr=1e-3,-1,3e-3"]
    done = sweep(tmp_path, *command)
    assert done.returncode == 2, done.stderr
    assert "ConfigError: optim.min_lr=0.0 must lie between 0 and optim.lr=-1.0" in done.stderr
    losses = final_losses(tmp_path)
    assert list(losses) == ["a-lr-0.001", "a-lr-0.003"]
    assert losses["a-lr-0.003"] < losses["a-lr-0.001"]
    for folder, rate in (("a-lr-0.001", 1e-3), ("a-lr-0.003", 3e-3)):
        assert json.loads((tmp_path / folder / "run.json").read_text())["config"]["optim"]["lr"] == rate


@pytest.mark.slow
def test_one_command_trains_several_decays_from_one_checkpoint(token_folder, tmp_path):
    """Each branch has the rate of its own decay: 1 - x after its first step, of two or four."""
    stages = "train.stages={stable: {tokens: 256, schedule: constant}, decay: {tokens: 64, schedule: linear, lr: 0}}"
    command = [f"data.path={token_folder}", "optim.lr=1e-3", "train.steps=null", "train.log_every=1", stages]
    assert sweep(tmp_path, *command).returncode == 0
    start = tmp_path / "a" / "checkpoints" / "step_4"
    done = sweep(tmp_path, *command, "name=b", f"train.resume_from={start}", "train.stages.decay.tokens=128,256")
    assert done.returncode == 0, done.stderr
    rates = {}
    for name in ("a", "b-tokens-128", "b-tokens-256"):
        rows, _ = read_metrics(tmp_path / name / "metrics.jsonl")
        rates[name] = [row["lr"] for row in rows if row["step"] > 4]
    assert rates["a"] == [0.0]
    assert rates["b-tokens-128"] == pytest.approx([5e-4, 0])
    assert rates["b-tokens-256"] == pytest.approx([7.5e-4, 5e-4, 2.5e-4, 0])


@pytest.mark.slow
def test_optuna_minimizes_the_validation_loss_and_resumes(token_folder, tmp_path):
    command = [f"data.path={token_folder}", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3"]
    command += ["hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=1", "optim.lr=tag(log,interval(1e-4,1e-2))"]
    done = sweep(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    losses = final_losses(tmp_path)
    found = yaml.safe_load((tmp_path / "a-sweep" / "optimization_results.yaml").read_text())
    assert len(losses) == 3
    assert found["best_value"] == min(losses.values())
    assert losses[f"a-lr-{found['best_params']['optim.lr']}"] == found["best_value"]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/step_4/config.json")}
    assert len(times) == 3
    assert sweep(tmp_path, *command).returncode == 0  # The seed chooses the same rates, and no run is repeated.
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/step_4/config.json")}


@pytest.mark.parametrize(
    "swept, name",
    [
        (["optim.lr=0.001", "seed=2"], "mine-lr-0.001-seed-2"),
        (["model=gla_tiny"], "mine-model-gla_tiny"),
        (["data.seq_len=8", "model.seq_len=9"], "mine-data.seq_len-8-model.seq_len-9"),
        ([], "mine"),
        (["name=other", "seed=2"], "mine"),
    ],
)
def test_a_run_is_named_by_what_is_swept(swept, name):
    assert name_sweep_run({"name": "mine", "resume": None}, swept, swept)["name"] == name


def test_values_that_differ_have_names_that_differ():
    values = ["data/a b", "data/a/b", "data/a_b", "data_a_b", "[data,a,b]"]
    names = [name_sweep_run({"name": "mine", "resume": None}, [], [f"data.path={value}"])["name"] for value in values]
    assert names[3] == "mine-path-data_a_b" and len(set(names)) == len(values)
    assert all(re.fullmatch(r"mine-path-data_a_b(-[0-9a-f]{8})?", name) for name in names)


def test_a_name_of_long_values_fits_a_folders():
    mixers = ["gla", "attention"] * 20
    layers = [[*mixers, "gla"], [*mixers, "mamba"], ["é" * 200]]
    swept = [f"model.layers=[{','.join(names)}]" for names in layers]
    names = [name_sweep_run({"name": "mine", "resume": None}, [], [override])["name"] for override in swept]
    assert len(set(names)) == 3 and all(len(name.encode()) <= 200 for name in names)
    assert names[0].startswith("mine-layers-gla_attention_gla_")


def test_a_name_of_the_user_stays():
    tree = {"name": "mine-2", "resume": None}
    assert name_sweep_run(tree, ["name=mine-$\\{seed}", "seed=2"], ["seed=2"]) == tree
    resumed = {"name": "mine", "resume": "runs/mine"}
    assert name_sweep_run(resumed, ["resume=runs/mine", "seed=2"], ["seed=2"]) == resumed


def test_what_is_not_swept_is_written_as_sweepers_write_it():
    args = ["-m", "--config-dir", "mine", 'name="a b"', "+x={a: 1}", "~track", "seed=1,2", "optim.lr=choice(1,2)"]
    assert normalize_overrides(args) == ['name="a b"', "+x={a:1}", "~track=null"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["hydra/launcher=proceses"], "hydra/launcher has no proceses; did you mean processes?"),
        (["hydra/launcher=mars"], "hydra/launcher=mars needs another package: pip install hydra-mars"),
        (["hydra/launcher=processes", "hydra.launcher.atonce=2"], "did you mean hydra.launcher.at_once?"),
        (["hydra.sweeper.max_batch=2"], "did you mean hydra.sweeper.max_batch_size?"),
    ],
)
def test_keys_of_launchers_and_sweepers_are_checked(args, message, monkeypatch):
    monkeypatch.setitem(PLUGIN_SOURCES, "mars", "hydra-mars")
    launcher.register_launcher()
    check_plugins(["hydra.sweep.dir=x", "hydra/launcher=processes", "hydra.launcher.at_once=2"])
    with pytest.raises(ConfigError) as error:
        check_plugins(args)
    assert message in str(error.value)


def test_a_worker_of_joblib_has_one_gpu_for_all_of_its_jobs(monkeypatch):
    monkeypatch.setattr(launcher, "visible_gpus", lambda: os.environ["CUDA_VISIBLE_DEVICES"].split(","))
    for number, gpu in ((1, "4"), (2, "6"), (3, "4")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
        monkeypatch.setattr(current_process(), "_name", f"LokyProcess-{number}")
        for _ in range(2):
            launcher.choose_gpu_of_worker()
            assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu


def fork_job(number: int, run: Callable) -> launcher.Job:
    """Start run(pipe) in a process that ends at SIGTERM, and return its job when it runs."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    is_ready = context.Event()

    def start() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        is_ready.set()
        run(sender)

    process = context.Process(target=start)
    process.start()
    is_ready.wait()
    sender.close()
    return launcher.Job(number, ["optim.lr=1"], None, process, receiver)


def wait_for_signal(pipe) -> None:
    signal.pause()


def launch(folder: Path, monkeypatch, start_job: Callable, at_once: int = 2, jobs: int = 2) -> list[JobReturn]:
    """Launch jobs that start_job(number) starts."""
    monkeypatch.setattr(launcher, "visible_gpus", list)
    monkeypatch.setattr(launcher, "limit_threads", lambda jobs: None)
    monkeypatch.setattr(launcher, "start_job", lambda _, number, overrides, gpu: start_job(number))
    processes = launcher.ProcessLauncher(at_once)
    processes.config = SimpleNamespace(hydra=SimpleNamespace(sweep=SimpleNamespace(dir=folder)))
    return processes.launch([["optim.lr=1"]] * jobs, 0)


def test_jobs_share_the_cores_that_this_process_may_use(monkeypatch):
    """A container or a job of Slurm may have few of the machine's."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5, 7})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "3"})
    launcher.limit_threads(2)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["TORCHINDUCTOR_COMPILE_THREADS"]) == ("3", "2")
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "environ", {})
    launcher.limit_threads(2)
    assert os.environ["OMP_NUM_THREADS"] == "32"


def test_an_error_of_the_launcher_stops_the_jobs(tmp_path, monkeypatch):
    started = []

    def start_job(number: int) -> launcher.Job:
        if started:
            raise OSError("no memory")
        started.append(fork_job(number, wait_for_signal))
        return started[0]

    with pytest.raises(OSError, match="no memory"):
        launch(tmp_path, monkeypatch, start_job)
    assert started[0].process.exitcode == -signal.SIGTERM


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_job_starts_stops_it_and_starts_no_other(signum, tmp_path, monkeypatch):
    started = []

    def start_job(number: int) -> launcher.Job:
        started.append(fork_job(number, wait_for_signal))
        os.kill(os.getpid(), signum)
        return started[-1]

    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt):
        launch(tmp_path, monkeypatch, start_job)
    assert [job.process.exitcode for job in started] == [-signal.SIGTERM]
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]


def test_a_killed_job_frees_its_slot_although_its_child_holds_the_pipe(tmp_path, monkeypatch):
    ends = os.pipe()

    def start_child_and_die(pipe) -> None:
        os.close(ends[1])
        if os.fork() == 0:
            os.read(ends[0], 1)  # It returns when the test closes the other end.
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    def send_result(pipe) -> None:
        pipe.send(JobReturn(status=JobStatus.COMPLETED, _return_value=7))

    def start_job(number: int) -> launcher.Job:
        return fork_job(number, send_result if number else start_child_and_die)

    first, second = launch(tmp_path, monkeypatch, start_job, at_once=1)
    os.close(ends[1])
    os.close(ends[0])
    with pytest.raises(
        RunError, match=r"job 0 \(optim.lr=1\) was ended by SIGKILL. Linux does that when memory runs out"
    ):
        assert first.return_value
    assert second.return_value == 7


def test_a_job_that_hangs_after_its_result_is_killed(tmp_path, monkeypatch):
    def send_result_and_hang(pipe) -> None:
        pipe.send(JobReturn(status=JobStatus.COMPLETED, _return_value=7))
        signal.pause()

    monkeypatch.setattr(launcher, "TEARDOWN_SECONDS", 0.1)
    (job,) = launch(tmp_path, monkeypatch, lambda number: fork_job(number, send_result_and_hang), jobs=1)
    assert job.return_value == 7


class TwoArguments(Exception):
    def __init__(self, a, b):
        super().__init__(a)


def test_an_error_that_cannot_be_sent_keeps_its_message():
    done = JobReturn(status=JobStatus.FAILED, _return_value=TwoArguments("full disk", 1))
    received = pickle.loads(pickle.dumps(launcher.make_sendable(done)))
    with pytest.raises(RunError, match="TwoArguments: full disk"):
        assert received.return_value
    done = JobReturn(status=JobStatus.COMPLETED, _return_value=7)
    assert pickle.loads(pickle.dumps(launcher.make_sendable(done))).return_value == 7


def test_no_jobs_at_once_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.at_once must be at least 1, not 0"):
        launch(tmp_path, monkeypatch, lambda number: None, at_once=0)
