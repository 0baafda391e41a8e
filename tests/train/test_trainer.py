import json
import math
import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from injection import before_steps, fail, send_signal
from safetensors.torch import load_file

from glalm.config.strict import ConfigError, RunError
from glalm.data.files import read_jsonl
from glalm.kernels.common import multiplies_exactly
from glalm.train import trainer
from glalm.train.checkpoint import latest_checkpoint
from glalm.train.guards import BadSteps
from glalm.train.parallel import choose_precision, start_processes

ROOT = Path(__file__).parent.parent.parent
TIMES = {"tokens_per_second", "tokens_per_second_per_gpu", "mfu", "peak_memory_gib", "data_wait_seconds"}


def final_tensors(config) -> dict[str, torch.Tensor]:
    """Return all tensors of the checkpoint after the last step."""
    path = config.folder / "checkpoints" / f"step_{config.train.steps}"
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def rows(config) -> list[dict]:
    return read_jsonl(config.folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Hold the tensors and rows of an uninterrupted run, once the first test has run it."""
    return {}


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_interrupted_and_resumed_run_ends_with_the_same_bits(run_config, change, unbroken, stop):
    random.seed(stop)  # A run seeds these generators itself.
    np.random.seed(stop)
    if not unbroken:
        whole = change(run_config, name="whole")
        assert trainer.train(whole) == 0
        unbroken.update(tensors=final_tensors(whole), rows=rows(whole))
    with before_steps({stop: partial(send_signal, signal.SIGINT)}):
        assert trainer.train(run_config) == signal.SIGINT
    assert latest_checkpoint(run_config.folder / "checkpoints").name == f"step_{stop}"
    assert trainer.train(run_config) == 0
    got = final_tensors(run_config)
    assert got.keys() == unbroken["tensors"].keys()
    for name, tensor in unbroken["tensors"].items():
        assert torch.equal(got[name], tensor), name
    timeless = [{k: v for k, v in row.items() if k not in TIMES} for row in rows(run_config)]
    assert timeless == [{k: v for k, v in row.items() if k not in TIMES} for row in unbroken["rows"]]


def test_killed_run_repeats_only_the_steps_since_its_checkpoint(run_config):
    """For the files, an exception between checkpoints is as abrupt as a kill. The rows of lost steps are repeated."""
    with before_steps({4: fail}), pytest.raises(RuntimeError, match="injected"):
        trainer.train(run_config)
    assert [row["step"] for row in rows(run_config)] == [0, 1, 2, 3]
    trainer.train(run_config)
    assert [row["step"] for row in rows(run_config)] == [0, 1, 2, 3, 4, 5, 6]


def test_files_of_a_finished_run(run_config):
    trainer.train(run_config)
    left = {p.name for p in run_config.folder.iterdir()}
    assert left == {"run.json", "data.json", "metrics.jsonl", "checkpoints", ".lock"}
    assert {p.name for p in (run_config.folder / "checkpoints").iterdir()} == {"step_4", "step_6"}
    record = json.loads((run_config.folder / "run.json").read_text())
    assert record["config"]["optim"]["lr"] == 1e-2 and record["versions"]["torch"] == torch.__version__
    first, *_, last = rows(run_config)
    assert first["val_perplexity"] == pytest.approx(320, rel=0.1)  # untrained: uniform over the vocabulary
    assert last["val_perplexity"] < 0.8 * first["val_perplexity"]
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))
    assert last["tokens"] == 6 * 4 * 16 and last["lr"] == pytest.approx(1e-3)


def test_finished_run_is_not_changed(run_config):
    trainer.train(run_config)
    before = final_tensors(run_config), rows(run_config)
    assert trainer.train(run_config) == 0
    assert all(torch.equal(before[0][n], t) for n, t in final_tensors(run_config).items())
    assert rows(run_config) == before[1]


def test_accumulation_does_not_change_the_run(run_config, change):
    whole = change(run_config, name="whole", **{"train.micro_batch_size": 4})
    for config in (run_config, whole):
        trainer.train(config)
    for a, b in zip(rows(run_config), rows(whole), strict=True):
        for key in a.keys() - TIMES:
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)


def test_out_of_memory_error_says_what_to_change(run_config):
    def run_out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    message = r"The estimate was .* smaller train.micro_batch_size"
    with before_steps({1: run_out_of_memory}), pytest.raises(RunError, match=message):
        trainer.train(run_config)


def test_changed_config_is_refused_with_the_differences(run_config, change):
    trainer.train(change(run_config, **{"train.steps": 2}))
    with pytest.raises(ConfigError, match=r"optim.lr: 0.01 -> 0.02\n.*train.steps: 2 -> 6\n.*choose another name"):
        trainer.train(change(run_config, **{"optim.lr": 0.02}))


def test_some_keys_may_change(run_config, change):
    trainer.train(run_config)
    trainer.train(change(run_config, **{"train.log_every": 5, "train.micro_batch_size": 4, "track.project": "other"}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.path": "nowhere"}, "glalm prepare"),
        ({"model.vocab_size": 100}, "Write model.vocab_size=300"),
        ({"data.seq_len": 10**6}, "Choose shorter windows"),
    ],
)
def test_unsuitable_data_is_refused_before_any_work(run_config, change, changes, message):
    with pytest.raises(ConfigError, match=message):
        trainer.train(change(run_config, **changes))
    assert not run_config.folder.exists()


def test_refused_start_leaves_no_trace(run_config, change):
    """The same name can then be used with a correct config."""
    with pytest.raises(ConfigError, match=r"train.init_from=nowhere is not a folder with a model.safetensors"):
        trainer.train(change(run_config, **{"train.init_from": "nowhere"}))
    assert trainer.train(run_config) == 0


def test_non_finite_loss_stops_the_run_and_is_not_saved(run_config, change, monkeypatch):
    train_step = trainer.Trainer.step
    damaged_steps = []

    def step(self, batch):
        if self.state.step == 3:
            damaged_steps.append(4)
            next(iter(self.module.parameters())).data.fill_(math.nan)
        return train_step(self, batch)

    monkeypatch.setattr(trainer.Trainer, "step", step)
    with pytest.raises(BadSteps, match=r"in 1 consecutive updates, steps 4 to 4"):
        trainer.train(change(run_config, **{"train.guard.bad_steps": 1}))
    assert damaged_steps == [4]
    assert latest_checkpoint(run_config.folder / "checkpoints").name == "step_2"


@pytest.mark.slow
def test_ctrl_c_on_the_command_line(run_config, token_folder, tmp_path):
    """Ctrl-C ends the command with exit code 130. The shorter command that it names finishes the run."""
    command = [sys.executable, "train.py", f"runs_dir={tmp_path}", f"data.path={token_folder}", "name=cli"]
    command += ["train.steps=400", "train.checkpoint.every=400", "train.eval_every=400", "train.log_every=1"]
    command += ["data.seq_len=16", "model.hidden_size=32", "model.intermediate_size=32", "model.num_hidden_layers=1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 128 + signal.SIGINT, rest
    assert "run the same command again" in rest
    saved = latest_checkpoint(tmp_path / "cli" / "checkpoints")
    assert 3 <= int(saved.name.removeprefix("step_")) < 400
    command = [sys.executable, "train.py", f"resume={tmp_path / 'cli'}"]
    assert f"Shorter: glalm train resume={tmp_path / 'cli'}" in rest
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert f"resuming after step {saved.name.removeprefix('step_')}" in again.stderr
    steps = [r["step"] for r in read_jsonl(tmp_path / "cli" / "metrics.jsonl")]
    assert steps == list(range(401))


def test_precision():
    assert choose_precision("fp32", torch.device("cpu")) == "fp32"
    assert choose_precision("auto", torch.device("cpu")) == "fp32"


def test_runs_of_one_process_have_their_own_precision(run_config, change):
    """Like the runs of a sweep."""
    given = [change(run_config, **{"train.precision": precision}) for precision in ("fp32", "bf16", "fp32")]
    assert [start_processes(config).mixed_precision for config in given] == ["no", "bf16", "no"]


def test_float32_is_ieee(run_config):
    torch.set_float32_matmul_precision("high")
    start_processes(run_config)
    assert multiplies_exactly(torch.zeros(1)) and not torch.backends.cudnn.allow_tf32
