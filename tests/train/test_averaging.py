"""The moving average of the weights: its values, its checkpoints, who reads it, and that training is as without it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from injection import before_steps, send_signal
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from glalm.config.strict import ConfigError
from glalm.data.files import read_jsonl
from glalm.evals.in_training import make_evaluator
from glalm.evals.options import EvalConfig, TrainEvalsConfig, TrainingRun
from glalm.evals.runner import evaluate
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.train import parallel
from glalm.train.averaging import WeightAverage
from glalm.train.checkpoint import CheckpointError, load_model, verify_checkpoint
from glalm.train.run_dir import open_data
from glalm.train.state import plan_batches
from glalm.train.trainer import Trainer, train


def full(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).double().numpy()


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def weighted_mean(weights: list[np.ndarray], decay: float) -> np.ndarray:
    """Return the mean of weights in which the newest has the share 1, the one before it decay, and so on."""
    shares = [decay**age for age in reversed(range(len(weights)))]
    return sum(share * each for share, each in zip(shares, weights, strict=True)) / sum(shares)


def checkpoint_of(config, step: int = 6):
    return config.folder / "checkpoints" / f"step_{step}"


@given(st.floats(0.01, 0.9999), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=20)
def test_average_is_the_mean_with_exponential_shares(decay, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(3, 2)
    average = WeightAverage(model, decay)
    seen = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        average.update(step)
        seen.append(weights_of(model))
    for name, tensor in average.tensors.items():
        np.testing.assert_allclose(tensor.numpy(), weighted_mean([each[name] for each in seen], decay), atol=1e-5)
        assert tensor.dtype == torch.float32


def test_swapped_weights_return_bit_for_bit():
    model = nn.Linear(3, 2)
    nn.init.constant_(model.bias, -0.0)
    average = WeightAverage(model, 0.5)
    for tensor in average.tensors.values():
        tensor.add_(1)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    averages = {name: tensor.clone() for name, tensor in average.tensors.items()}
    with pytest.raises(KeyError), average.swapped():
        assert all(torch.equal(parameter, averages[name]) for name, parameter in model.named_parameters())
        raise KeyError
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach().view(torch.int32), weights[name].view(torch.int32))
        assert torch.equal(average.tensors[name], averages[name])


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_training_averages_the_weights_after_each_step(run_config, change, mode):
    config = change(run_config, **{"train.ema_decay": 0.7, "parallel.mode": mode, "train.steps": 4})
    accelerator = parallel.start_processes(config)
    windows, validation = open_data(config)
    trainer = Trainer(config, plan_batches(config, 1), accelerator)
    average = trainer.state.average
    seen = []
    for batch in trainer.iterate_batches(windows):
        trainer.step(batch)
        with average.swapped():  # FSDP2 gathers the average, and must free it.
            trainer.validate(validation)
        seen.append(weights_of(trainer.state.model))
    for name, tensor in average.tensors.items():
        assert isinstance(tensor, DTensor) == (mode == "fsdp2")
        np.testing.assert_allclose(full(tensor), weighted_mean([each[name] for each in seen], 0.7), atol=1e-6)


def test_average_resumes_bit_for_bit_and_training_is_as_without_it(run_config, change):
    plain = change(run_config, name="plain", **{"train.steps": 4, "train.eval_every": 2})
    unbroken = change(plain, name="unbroken", **{"train.ema_decay": 0.7})
    broken = change(unbroken, name="broken")
    for config in (plain, unbroken):
        assert train(config) == 0
    with before_steps({3: send_signal}):
        train(broken)
    assert train(broken) == 0
    averages, resumed = (load_file(checkpoint_of(config, 4) / "average.safetensors") for config in (unbroken, broken))
    assert averages.keys() == resumed.keys() and all(torch.equal(averages[name], resumed[name]) for name in averages)
    models = {(checkpoint_of(config, 4) / "model.safetensors").read_bytes() for config in (plain, unbroken, broken)}
    assert len(models) == 1
    assert not (checkpoint_of(plain, 4) / "average.safetensors").exists()
    rows = [read_jsonl(config.folder / "metrics.jsonl") for config in (plain, unbroken, broken)]
    without, *losses = [
        {row["step"]: row.get("average/val_loss") for row in each if "val_loss" in row} for each in rows
    ]
    assert losses[0] == losses[1] and [*losses[0]] == [0, 2, 4] and None not in losses[0].values()
    assert set(without.values()) == {None}
    (checkpoint_of(broken, 4) / "average.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"average\.safetensors is missing"):
        verify_checkpoint(checkpoint_of(broken, 4))


def test_validation_and_evaluators_measure_the_average(run_config, change):
    """What training logs of the average is what `glalm eval weights=average` finds, and not that of the weights."""
    fields = {field.name: getattr(run_config, field.name) for field in dataclasses.fields(run_config)}
    fields["train"] = dataclasses.replace(run_config.train, steps=3, ema_decay=0.7, eval_sequences=10**6)
    config = TrainingRun(**fields, train_evals=TrainEvalsConfig(evals=["perplexity"], every=3, weights="average"))
    assert train(config, make_evaluator(config)) == 0
    row = read_jsonl(config.folder / "metrics.jsonl")[-1]
    found = {}
    for weights in ("current", "average"):
        evaluate(EvalConfig(name=config.name, runs_dir=config.runs_dir, evals=["perplexity"], weights=weights))
        record = json.loads((config.folder / "eval" / "perplexity.json").read_text())
        found[weights] = record["results"]["perplexity"]
        prefix = "average/" if weights == "average" else ""
        assert row[f"{prefix}val_bits_per_byte"] == pytest.approx(record["results"]["bits_per_byte"], rel=1e-6)
    assert len(list((config.folder / "eval").glob("perplexity*.json"))) == 2
    assert found["average"] == pytest.approx(row["average/perplexity/perplexity"], rel=1e-6)
    assert found["average"] == pytest.approx(row["average/val_perplexity"], rel=1e-6)
    assert found["current"] == pytest.approx(row["val_perplexity"], rel=1e-6)
    assert abs(found["average"] / found["current"] - 1) > 1e-3


@pytest.mark.slow
def test_a_run_that_begins_to_average_starts_from_the_loaded_weights(run_config, change):
    config = change(run_config, **{"train.checkpoint.keep_last": 9})
    train(config)
    fork = {"name": "fork", "train.ema_decay": 0.7, "train.resume_from": str(checkpoint_of(config, 4))}
    with pytest.raises(ConfigError, match=r"train\.ema_decay: None -> 0\.7"):
        train(change(config, **fork))
    fork = change(config, **fork, **{"train.allow_changes": ["train.ema_decay"], "train.checkpoint.every": 1})
    train(fork)
    start = load_file(checkpoint_of(config, 4) / "model.safetensors")
    after = [load_file(checkpoint_of(fork, step) / "model.safetensors") for step in (5, 6)]
    average = load_file(checkpoint_of(fork) / "average.safetensors")
    shares = [0.3 / (1 - 0.7**step) for step in (5, 6)]
    for name, weight in start.items():
        expected = weight.double()
        for share, each in zip(shares, after, strict=True):
            expected += share * (each[name].double() - expected)
        torch.testing.assert_close(average[f"average.{name}"].double(), expected, rtol=0, atol=1e-6)


def test_what_cannot_be_averaged_is_refused_early(run_config, change):
    for decay in (0.0, 1.0, -1.0):
        with pytest.raises(ConfigError, match=r"train\.ema_decay must lie between 0 and 1, for example 0\.999"):
            change(run_config, **{"train.ema_decay": decay})
    with pytest.raises(ConfigError, match=r"write train\.ema_decay=0\.999, or train_evals\.weights=current"):
        TrainingRun(train_evals=TrainEvalsConfig(weights="average"))
    train(run_config)
    model = GLALMForCausalLM(GLALMConfig.from_model_config(run_config.model))
    with pytest.raises(CheckpointError, match="step_6 has no moving average"):
        load_model(checkpoint_of(run_config), model, "average")
    config = EvalConfig(name=run_config.name, runs_dir=run_config.runs_dir, weights="average")
    with pytest.raises(ConfigError, match="step_6 has no moving average"):
        evaluate(config)
