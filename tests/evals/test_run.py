import dataclasses
import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glalm.config import (
    DataConfig,
    EvalConfig,
    ExtrapolationConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from glalm.data.loader import Windows
from glalm.data.prepare import prepare
from glalm.data.shards import TokenSet
from glalm.evals.run import evaluate
from glalm.model import GLALMForCausalLM
from glalm.strict import ConfigError
from glalm.train.loop import train

MODEL = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    source, folder = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("data")
    words = random.Random(0)
    for i in range(24):
        text = " ".join(words.choice(("alpha", "beta", "gamma", "delta")) for _ in range(60 if i % 2 else 300))
        (source / f"{i}.txt").write_text(text)
    held_out = {"validation": 0.3, "test": 0.4}
    prepare([source], folder, vocab_size=300, held_out=held_out, progress=False)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> RunConfig:
    config = RunConfig(
        name="tiny",
        runs_dir=str(tmp_path_factory.mktemp("runs")),
        model=ModelConfig(**MODEL),
        data=DataConfig(str(data), 16),
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
        train=TrainConfig(steps=4, batch_size=2, checkpoint_every=2),
    )
    train(config)
    return config


@pytest.fixture
def run(trained, tmp_path) -> RunConfig:
    """A run of four steps with two checkpoints, T = 16, to do with as a test likes."""
    shutil.copytree(trained.folder, tmp_path / "runs" / trained.name)
    return dataclasses.replace(trained, runs_dir=str(tmp_path / "runs"))


def wanted(run: RunConfig, **changes) -> EvalConfig:
    settings = {
        "name": run.name,
        "runs_dir": run.runs_dir,
        "batch_size": 3,
        "extrapolation": ExtrapolationConfig(max_length=160, documents=2),
        "samples": SampleConfig(tokens=5, prompts=["alpha ", "[bold]beta"]),
    }
    return EvalConfig(**settings | changes)


@torch.no_grad()
def true_perplexity(run: RunConfig, step: int) -> float:
    model = GLALMForCausalLM.from_pretrained(run.folder / "checkpoints" / f"step_{step}").eval()
    windows = Windows(TokenSet(run.data.path, "validation"), 16)
    rows = torch.from_numpy(np.stack([windows[i] for i in range(len(windows))]).astype(np.int64))
    return F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten()).exp().item()


def test_every_evaluator_leaves_its_record(run, capsys):
    assert evaluate(wanted(run)) == 0
    written = sorted(
        str(p.relative_to(run.folder)) for kind in ("eval", "plots") for p in (run.folder / kind).iterdir()
    )
    assert written == [
        *(f"eval/{name}.json" for name in ("extrapolation", "perplexity", "samples")),
        *(f"plots/{name}.png" for name in ("extrapolation", "training")),
    ]
    results = {name: json.loads((run.folder / f"eval/{name}.json").read_text()) for name in wanted(run).evals}
    weights = (run.folder / "checkpoints/step_4/model.safetensors").read_bytes()
    for name, result in results.items():
        assert (result["evaluator"], result["run"], result["checkpoint"]) == (name, "tiny", "step_4")
        assert result["checkpoint_sha256"] == hashlib.sha256(weights).hexdigest()
        assert result["seconds"] > 0
        assert {"glalm", "torch", "transformers", "python"} <= result["versions"].keys()
        assert result["settings"]["precision"] == ("bf16" if torch.cuda.is_available() else "fp32")

    tolerance = 1e-2 if torch.cuda.is_available() else 1e-4
    assert results["perplexity"]["results"]["perplexity"] == pytest.approx(true_perplexity(run, 4), rel=tolerance)
    assert results["perplexity"]["settings"]["split"] == "validation"
    assert [*results["extrapolation"]["results"]["ratios"]] == ["2", "4", "8", "10"]
    assert results["extrapolation"]["results"]["buckets"][0]["documents"] == 2
    assert results["extrapolation"]["settings"]["split"] == "test"
    out = capsys.readouterr().out
    for sample, prompt in zip(results["samples"]["results"], ("alpha ", "[bold]beta"), strict=True):
        assert sample["prompt"] == prompt
        assert prompt + sample["continuation"] in out
    for path in written:
        assert f"wrote {run.folder / path}" in out


def test_a_part_of_an_older_checkpoint(run):
    assert evaluate(wanted(run, checkpoint="step_2", evals=["perplexity"])) == 0
    assert [p.name for p in (run.folder / "eval").iterdir()] == ["perplexity.json"]
    result = json.loads((run.folder / "eval/perplexity.json").read_text())
    assert result["checkpoint"] == "step_2"
    assert result["results"]["perplexity"] == pytest.approx(true_perplexity(run, 2), rel=1e-2)
    assert result["results"]["perplexity"] != pytest.approx(true_perplexity(run, 4), rel=3e-2)


def test_a_run_that_does_not_exist(run):
    with pytest.raises(ConfigError, match=r"run\.json is missing.*python train\.py name=other"):
        evaluate(wanted(run, name="other"))


def test_a_checkpoint_that_does_not_exist(run):
    with pytest.raises(ConfigError, match=r"no checkpoint step_7 .*there: step_2, step_4"):
        evaluate(wanted(run, checkpoint="step_7"))


def test_a_damaged_checkpoint(run):
    file = run.folder / "checkpoints/step_4/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"step_4/model\.safetensors is damaged"):
        evaluate(wanted(run))
    assert not (run.folder / "eval").exists()


def test_lengths_are_checked_first(run, tmp_path):
    short = ExtrapolationConfig(max_length=15)
    with pytest.raises(ConfigError, match=r"write extrapolation.max_length=160"):
        evaluate(wanted(run, extrapolation=short))
    assert evaluate(wanted(run, extrapolation=short, evals=["samples"])) == 0  # it reads no documents
    with pytest.raises(ConfigError, match="needs documents of 100001 tokens"):
        evaluate(wanted(run, extrapolation=ExtrapolationConfig(max_length=100_000)))


def test_data_that_is_missing_or_is_not_the_runs(run, data, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.*manifest\.json is missing"):
        evaluate(wanted(run, data_path=str(tmp_path / "nowhere")))

    record = json.loads((run.folder / "run.json").read_text())
    record["identity"]["data fingerprint"] = "other"
    (run.folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="prepared anew since"):
        evaluate(wanted(run))
    assert evaluate(wanted(run, data_path=str(data), evals=["perplexity"])) == 0  # asked for by name

    record["config"]["model"]["vocab_size"] = 256
    (run.folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="a vocabulary of 300, the model one of 256"):
        evaluate(wanted(run, data_path=str(data)))
