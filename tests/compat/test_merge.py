"""The average of checkpoints, from the command to a model that is evaluated and trained further."""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from glalm.commands.checkpoints import average_checkpoints
from glalm.compat.export import export_run, load_weighted_sum
from glalm.compat.merge import merge_checkpoints
from glalm.config.run import CheckpointConfig
from glalm.config.strict import RunError
from glalm.evals.options import EvalConfig
from glalm.evals.runner import evaluate
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.train.checkpoint import CheckpointError, CheckpointSaver
from glalm.train.state import TrainState
from glalm.train.trainer import train


@pytest.fixture
def averaging(run_config, change):
    """A run of three steps with an average of its weights, and a checkpoint after each."""
    config = change(
        run_config,
        **{"train.ema_decay": 0.7, "train.steps": 3, "train.checkpoint.every": 1, "train.checkpoint.keep_last": 9},
    )
    assert train(config) == 0
    return config


def saved(config, step: int, kind: str = "model") -> dict[str, torch.Tensor]:
    tensors = load_file(config.folder / "checkpoints" / f"step_{step}" / f"{kind}.safetensors")
    return {name.removeprefix("average."): tensor.double() for name, tensor in tensors.items()}


def assert_mean(folder, models: list[dict], shares: list[float]) -> None:
    """Assert that the exported weights are the weighted mean, which float64 computes here."""
    found = load_file(folder / "model.safetensors")
    for name, tensor in found.items():
        expected = sum(share * each[name] for share, each in zip(shares, models, strict=True)) / sum(shares)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
        assert tensor.dtype == torch.float32


def test_merged_model_is_the_mean_is_evaluated_and_starts_a_run(averaging, change, tmp_path, monkeypatch):
    out = tmp_path / "merged"
    run = str(averaging.folder)
    monkeypatch.setattr(sys, "argv", ["glalm merge", run, "--steps", "1", "2", "3", "--out", str(out)])
    average_checkpoints()
    assert_mean(out, [saved(averaging, step) for step in (1, 2, 3)], [1, 1, 1])
    card = (out / "README.md").read_text()
    assert card.count("0.3333 times tiny/step_") == 3 and "No scores were measured" in card

    weighted = tmp_path / "weighted"
    arguments = ["glalm merge", run, "--steps", "3", "1", "--shares", "3", "1", "--weights", "average"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(weighted)])
    average_checkpoints()
    assert_mean(weighted, [saved(averaging, 3, "average"), saved(averaging, 1, "average")], [3, 1])

    # The sum of these shares is no float.
    huge = tmp_path / "huge"
    monkeypatch.setattr(
        sys, "argv", ["glalm merge", run, "--steps", "1", "2", "--shares", "1e308", "1e308", "--out", str(huge)]
    )
    average_checkpoints()
    assert_mean(huge, [saved(averaging, step) for step in (1, 2)], [1, 1])

    path = averaging.data.path
    evaluate(EvalConfig(checkpoint=str(out), runs_dir=averaging.runs_dir, data_path=path, evals=["perplexity"]))
    results = json.loads((tmp_path / "runs" / "merged" / "eval" / "perplexity.json").read_text())["results"]
    start = change(averaging, name="start", **{"train.init_from": str(out), "train.eval_sequences": 10**6})
    assert train(start) == 0
    first = json.loads((start.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["val_perplexity"] == pytest.approx(results["perplexity"], rel=1e-5)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=4))
@settings(max_examples=8, deadline=None)
def test_weighted_sum_is_that_of_float64(shares):
    shape = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "intermediate_size": 8}
    model = CausalLM(ModelConfig(**shape))
    with TemporaryDirectory() as folder:
        paths = {}
        models = []
        for step, share in enumerate(shares):
            torch.manual_seed(step)
            state = TrainState(CausalLM(ModelConfig(**shape)), [], step=step)
            with CheckpointSaver(Path(folder), CheckpointConfig(asynchronous=False, keep_last=9)) as saver:
                saver.save(state, {})
            paths[Path(folder) / f"step_{step}"] = share
            models.append(state.model)
        load_weighted_sum(paths, model)
    for parameter, *originals in zip(model.parameters(), *(each.parameters() for each in models), strict=True):
        expected = sum(share * each.double() for share, each in zip(shares, originals, strict=True))
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-6, atol=1e-7)


def test_export_of_the_average(averaging, tmp_path):
    export_run(averaging.folder, "step_2", tmp_path / "out", weights="average")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(averaging.folder / "checkpoints" / "step_2" / "average.safetensors")
    assert all(torch.equal(tensor, expected[f"average.{name}"]) for name, tensor in exported.items())
    assert "| checkpoint | step_2, moving average, weights sha256" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_merged_is_refused(averaging, change, tmp_path):
    out = tmp_path / "out"
    run = averaging.folder
    other = tmp_path / "runs" / "other"
    shutil.copytree(run, other)
    record = json.loads((run / "run.json").read_text())
    record["config"]["model"] |= {"num_heads": 4}
    (other / "run.json").write_text(json.dumps(record))
    twin = tmp_path / "runs" / "twin"
    assert train(change(averaging, name="twin", **{"optim.lr": 3e-2})) == 0
    branch = tmp_path / "runs" / "branch"
    continued = {"train.resume_from": str(run / "checkpoints" / "step_2"), "train.allow_changes": ["seed"]}
    assert train(change(averaging, name="branch", seed=averaging.seed + 1, **continued)) == 0
    merge_checkpoints([run, branch], ["latest"], tmp_path / "of a branch")
    for message, runs, names, shares in (
        ("two different checkpoints or more", [run], ["latest"], None),
        ("two different checkpoints or more", [run], ["step_3", "latest"], None),
        ("There is no checkpoint step_5 in", [run], ["step_5", "step_3"], None),
        ("--shares has 1 numbers for 2 checkpoints", [run], ["step_2", "step_3"], [1.0]),
        ("--shares 1.0 -1.0: every share must be positive", [run], ["step_2", "step_3"], [1.0, -1.0]),
        ("--shares nan 1.0: every share", [run], ["step_2", "step_3"], [math.nan, 1.0]),
        ("different models, which cannot be averaged:\n  model.num_heads: 2 -> 4", [run, other], ["latest"], None),
        ("were trained independently, so the average", [run, twin], ["latest"], None),
    ):
        with pytest.raises(RunError, match=re.escape(message)):
            merge_checkpoints(runs, names, out, shares)
        assert not out.exists()
    (run / "checkpoints" / "step_2" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="is damaged"):
        merge_checkpoints([run], ["step_2", "step_3"], out)
    out.mkdir()
    with pytest.raises(RunError, match=r"exists\. Choose another --out"):
        merge_checkpoints([run], ["step_1", "step_3"], out)
