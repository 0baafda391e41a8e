"""Micro-batches by CUDA graphs, on the CPU: a replay calls the captured function again, on the same tensors."""

import dataclasses
import logging
import math
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from injection import before_steps, poisoned_steps, send_signal
from safetensors.torch import load_file

from glalm.config.run import RunConfig, may_change
from glalm.config.stages import StageConfig
from glalm.config.strict import ConfigError
from glalm.data.files import read_jsonl
from glalm.train import parallel, trainer
from glalm.train.state import plan_batches
from glalm.train.step_graph import MIN_FREE_SHARE, StepGraph, check_graph_support, is_captured
from glalm.train.trainer import Trainer

TIMES = {"tokens_per_second", "tokens_per_second_per_gpu", "mfu", "data_wait_seconds"}


class ReplayedCapture:
    """Stands for GraphCapture. Like a GPU, it computes nothing during a capture, and a replay moves no Python object.

    Args:
        parameters: Those of the model.
        failing: The calls ("rehearse 1", "capture 2") that fail.
        free: What free_share returns.
    """

    def __init__(self, parameters, failing=(), free=1.0):
        self.parameters = list(parameters)
        self.failing = failing
        self.free = free
        self.calls = []

    def record(self, name):
        self.calls.append(name)
        if f"{name} {self.calls.count(name)}" in self.failing:
            raise RuntimeError(f"no {name}\nwith details")

    def warm_up(self, function):
        self.record("warm up")
        return function()

    def rehearse(self, function):
        before = self.gradients()
        result = function()
        try:
            self.record("rehearse")
        except RuntimeError:
            assert all(gradient is None for gradient in before)
            raise
        return result

    def gradients(self):
        return [parameter.grad for parameter in self.parameters]

    def set_gradients(self, gradients):
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def capture(self, function, pool=None):
        before = self.gradients()
        values = [None if x is None else x.clone() for x in before]
        results = function()
        static = self.gradients()
        for x, value in zip(static, values, strict=True):
            x.fill_(math.nan) if value is None else x.copy_(value)
        for x in results:
            x.fill_(math.nan)
        assert (pool is None) == all(x is None for x in before)
        self.record("capture")

        def replay():
            self.record("replay")
            found = self.gradients()
            self.set_gradients(before)
            for x, value in zip(results, function(), strict=True):
                x.copy_(value)
            for x, value in zip(static, self.gradients(), strict=True):
                x.copy_(value)
            self.set_gradients(found)

        return SimpleNamespace(replay=replay, pool=lambda: "the pool"), results

    def free_share(self):
        return self.free

    def peak_bytes(self):
        return 0


def build_trainer(config: RunConfig, graph: bool, is_required: bool = True, **capture) -> Trainer:
    torch.manual_seed(0)
    accelerator = parallel.start_processes(config)
    built = Trainer(config, plan_batches(config, 1), accelerator)
    if graph:
        parameters = list(built.state.model.parameters())
        built.graph = StepGraph(parameters, ReplayedCapture(parameters, **capture), is_required)
    return built


def batch(step: int, rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(320, (rows, length + 1), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def train(built: Trainer, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses of the steps, and the weights after them."""
    config = built.config
    losses = []
    for step in range(steps):
        shape = config.phase_at(built.state.step + 1).config
        losses.append(built.step(batch(step, shape.batch_size, shape.data.seq_len)).loss.item())
    return losses, dict(built.state.model.named_parameters())


def check_equal(config: RunConfig, steps: int = 6, **capture) -> ReplayedCapture:
    """Train with graphs and eagerly, and compare. Return the capture."""
    eager_losses, eager_weights = train(build_trainer(config, graph=False), steps)
    graphed = build_trainer(config, graph=True, **capture)
    losses, weights = train(graphed, steps)
    assert losses == eager_losses
    assert all(torch.equal(weights[name], weight) for name, weight in eager_weights.items())
    return graphed.graph.capture


def test_third_step_is_captured_once_for_its_first_micro_batch_and_once_for_the_others(run_config, change):
    config = change(run_config, **{"train.batch_size": 6})  # three micro-batches
    calls = check_equal(config, steps=4).calls
    warm_up = ["warm up", "warm up", "warm up", "rehearse", "warm up", "warm up"]
    assert calls == [*warm_up, "capture", "replay", "capture", "replay", "replay", "replay", "replay", "replay"]


def test_one_micro_batch_needs_one_graph(run_config, change):
    calls = check_equal(change(run_config, **{"train.micro_batch_size": 4}), steps=4).calls
    assert calls == ["warm up", "rehearse", "capture", "replay", "replay"]


@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    micro_batch=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    segments=st.sampled_from([1, 2, 4]),
    layers=st.sampled_from(["gla", "mamba2+gla", "gated_deltanet"]),
    tied=st.booleans(),
    optimizer=st.sampled_from(["adamw", "muon"]),
)
def test_weights_and_losses_are_those_of_eager_steps(
    run_config, change, micro_batch, accumulation, segments, layers, tied, optimizer
):
    batches = {"train.batch_size": micro_batch * accumulation, "train.micro_batch_size": micro_batch}
    model = {"model.layers": layers, "model.tie_word_embeddings": tied, "model.num_hidden_layers": 2}
    more = {"train.tbptt_length": 16 // segments, "optim.name": optimizer, "train.ema_decay": 0.9}
    check_equal(change(run_config, **batches, **model, **more), steps=5)


def test_stages_of_other_shapes_are_captured_anew_and_free_the_graphs_before(run_config):
    stages = {
        "one": StageConfig(tokens=4 * 64),
        "two": StageConfig(tokens=4 * 64, seq_len=8, batch_size=8),
        "three": StageConfig(tokens=4 * 64),
    }
    config = dataclasses.replace(run_config, train=dataclasses.replace(run_config.train, steps=None, stages=stages))
    capture = check_equal(config, steps=12)
    assert capture.calls.count("rehearse") == 3 and capture.calls.count("capture") == 6
    graphed = build_trainer(config, graph=True)
    train(graphed, 4)
    assert graphed.graph.graphs.keys() == {True, False}
    graphed.step(batch(5, 8, 8))
    assert not graphed.graph.graphs and not graphed.graph.inputs


def test_skipped_steps_leave_the_same_weights(run_config):
    found = []
    for graph in (False, True):
        with poisoned_steps({2, 4, 5}, gradient=math.nan):
            found.append(train(build_trainer(run_config, graph), 7)[1])
    assert all(torch.equal(found[1][name], weight) for name, weight in found[0].items())


def test_gradients_of_others_are_added_to(run_config):
    """Gradients that the graphs have not created, for example of a call of one's own, are not overwritten."""
    found = []
    for graph in (False, True):
        built = build_trainer(run_config, graph)
        train(built, 4)
        for parameter in built.state.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        built.accumulate_gradients(batch(4, 4, 16))
        found.append([parameter.grad for parameter in built.state.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("failing", ["rehearse 1", "capture 1", "capture 2"])
def test_what_cannot_be_captured_runs_eagerly_with_one_warning(run_config, caplog, failing):
    with caplog.at_level(logging.WARNING, "glalm"):
        capture = check_equal(run_config, is_required=False, failing=[failing])
    assert capture.calls[-1] in ("rehearse", "capture")
    [record] = caplog.records
    name = failing.split()[0]
    expected = f"train.cuda_graph=auto: the run trains on without CUDA graphs: no {name}."
    assert record.getMessage().startswith(expected)


@pytest.mark.parametrize("failing", ["rehearse 1", "capture 1", "capture 2"])
def test_what_must_be_captured_raises(run_config, failing):
    with pytest.raises(RuntimeError, match=f"no {failing.split()[0]}"):
        train(build_trainer(run_config, graph=True, failing=[failing]), 4)


def test_auto_leaves_memory_free(run_config, caplog):
    with caplog.at_level(logging.WARNING, "glalm"):
        calls = check_equal(run_config, is_required=False, free=MIN_FREE_SHARE / 2).calls
    assert "replay" not in calls and "they would leave only 8% of the GPU's memory to validation" in caplog.text
    assert "replay" in check_equal(run_config, is_required=True, free=0.0).calls


@pytest.fixture
def graphs_on_the_cpu(monkeypatch):
    monkeypatch.setattr(trainer, "check_graph_support", lambda *_: None)
    monkeypatch.setattr(trainer, "is_captured", lambda config, *_: config.train.cuda_graph is True)
    monkeypatch.setattr(trainer, "GraphCapture", lambda device: None)

    def build(parameters, capture, is_required):
        parameters = list(parameters)
        return StepGraph(parameters, ReplayedCapture(parameters), is_required)

    monkeypatch.setattr(trainer, "StepGraph", build)


@pytest.mark.slow
def test_a_run_that_validates_and_is_resumed_ends_as_the_eager_one(run_config, change, graphs_on_the_cpu):
    more = {"train.steps": 8, "train.statistics_every": 2, "train.ema_decay": 0.9}
    eager = change(run_config, name="eager", **more)
    assert trainer.train(eager) == 0
    graphed = change(run_config, **{"train.cuda_graph": True}, **more)
    with before_steps({4: partial(send_signal, signal.SIGINT)}):
        assert trainer.train(graphed) == signal.SIGINT
    assert trainer.train(graphed) == 0
    tensors = []
    rows = []
    for config in (eager, graphed):
        files = sorted((config.folder / "checkpoints" / "step_8").glob("*.safetensors"))
        tensors.append({name: x for file in files for name, x in load_file(file).items()})
        found = read_jsonl(config.folder / "metrics.jsonl")
        rows.append([{key: value for key, value in row.items() if key not in TIMES} for row in found])
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[1][name], x) for name, x in tensors[0].items())
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "changes, world_size, is_gpu, obstacle",
    [
        ({}, 1, True, None),
        ({"train.tbptt_length": 8, "train.float8": True, "train.compile": False}, 1, True, None),
        ({}, 1, False, "it needs a GPU"),
        ({}, 2, True, "it needs one process and parallel=ddp"),
        ({"parallel.mode": "fsdp2"}, 1, True, "it needs one process and parallel=ddp"),
        ({"data.document_boundaries": "reset_state"}, 1, True, "the number of documents varies between batches"),
    ],
)
def test_choice(run_config, change, changes, world_size, is_gpu, obstacle):
    def choose(wanted: bool | str) -> bool:
        config = change(run_config, **{"train.cuda_graph": wanted}, **changes)
        check_graph_support(config, world_size, is_gpu)
        return is_captured(config, world_size, is_gpu)

    assert choose("auto") == (obstacle is None) and not choose(False)
    if obstacle is None:
        assert choose(True)
    else:
        with pytest.raises(ConfigError, match=f"train.cuda_graph=true: .*{obstacle}. Set train.cuda_graph=auto."):
            choose(True)


def test_a_stage_whose_batches_have_no_shape_counts(run_config):
    stages = {"one": StageConfig(tokens=640), "two": StageConfig(tokens=640, document_boundaries="reset_state")}
    train = dataclasses.replace(run_config.train, steps=None, stages=stages, cuda_graph="auto")
    assert not is_captured(dataclasses.replace(run_config, train=train), 1, True)


def test_a_run_without_a_gpu_is_refused_before_it_begins(run_config, change):
    with pytest.raises(ConfigError, match=r"train.cuda_graph=true: it needs a GPU"):
        trainer.train(change(run_config, **{"train.cuda_graph": True}))
    assert not run_config.folder.exists() and may_change("train.cuda_graph")
