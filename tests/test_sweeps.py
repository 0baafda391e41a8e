"""Sweeps by `glalm train --multirun`: each job has a run of its own, whatever launcher starts it."""

import json
import os
import subprocess
import sys
from multiprocessing import current_process
from pathlib import Path

import pytest
import yaml

from glalm import launcher
from glalm.cli import PLUGIN_SOURCES, check_plugins, normalize_overrides
from glalm.config.saved_run import name_sweep_run
from glalm.config.strict import ConfigError
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
        (["data.path=data/a b"], "mine-path-data_a_b"),
        (["model.layers=[gla,attention]", "optim.betas=[0.9,0.95]"], "mine-layers-gla_attention-betas-0.9_0.95"),
        (["data.seq_len=8", "model.seq_len=9"], "mine-data.seq_len-8-model.seq_len-9"),
        ([], "mine"),
        (["name=other", "seed=2"], "mine"),
    ],
)
def test_a_run_is_named_by_what_is_swept(swept, name):
    assert name_sweep_run({"name": "mine", "resume": None}, swept, swept)["name"] == name


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
