"""Micro-batches captured as CUDA graphs: the losses and weights of eager steps, bit for bit."""

import dataclasses
import gc
import logging
import math
import signal
from functools import partial

import pytest
import torch
from injection import before_steps, poisoned_steps, send_signal
from safetensors.torch import load_file
from torch.utils._pytree import tree_map_only

from glalm.config.run import RunConfig
from glalm.config.stages import StageConfig
from glalm.train import parallel, trainer
from glalm.train.state import plan_batches
from glalm.train.trainer import Trainer

pytestmark = pytest.mark.gpu
STEPS, ROWS, T = 20, 8, 1024
MODEL = {"hidden_size": 256, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 512, "vocab_size": 320}


@pytest.fixture
def config(run_config, change) -> RunConfig:
    """Two micro-batches a step, without graphs."""
    model = {f"model.{name}": value for name, value in MODEL.items()}
    batches = {"data.seq_len": T, "train.batch_size": ROWS, "train.micro_batch_size": ROWS // 2}
    eager = {"train.compile": False, "train.cuda_graph": False}
    return change(run_config, **model, **batches, **eager, **{"train.steps": STEPS + 1})


def build_trainer(config: RunConfig) -> Trainer:
    torch.manual_seed(0)
    accelerator = parallel.start_processes(config)
    return Trainer(config, plan_batches(config, 1), accelerator)


def batch(step: int, rows: int = ROWS, length: int = T) -> dict[str, torch.Tensor]:
    ids = torch.randint(320, (rows, length + 1), generator=torch.Generator().manual_seed(step)).cuda()
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def train(built: Trainer, steps: int = STEPS) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Return the losses of the steps, and the weights after them."""
    losses = []
    for step in range(steps):
        shape = built.config.phase_at(built.state.step + 1).config
        losses.append(built.step(batch(step, shape.batch_size, shape.data.seq_len)).loss)
    return losses, {name: parameter.detach().clone() for name, parameter in built.state.model.named_parameters()}


def check_equal(config: RunConfig, change, steps: int = STEPS) -> Trainer:
    """Train eagerly and with graphs, and compare. Return the latter trainer."""
    eager_losses, eager_weights = train(build_trainer(config), steps)
    graphed = build_trainer(change(config, **{"train.cuda_graph": True}))
    losses, weights = train(graphed, steps)
    assert torch.stack(losses).tolist() == torch.stack(eager_losses).tolist()
    different = [name for name, weight in eager_weights.items() if not torch.equal(weights[name], weight)]
    assert different == []
    return graphed


@pytest.mark.parametrize("layers", ["gla", "mamba2", "gated_deltanet"])
def test_losses_and_weights_are_those_of_eager_steps(config, change, layers):
    graphed = check_equal(change(config, **{"model.layers": layers}), change)
    assert graphed.graph.graphs.keys() == {True, False}


@pytest.mark.parametrize("changes", [{}, {"train.tbptt_length": T // 4}])
def test_compiled_blocks(config, change, changes):
    """One trainer takes the same steps twice: torch.compile may choose other tilings for another one."""
    built = build_trainer(change(config, **{"train.compile": True, "train.cuda_graph": True}, **changes))
    graph = built.graph
    built.graph = StepsWithoutGraph(graph.capture)
    train(built, 1)
    start = tree_map_only(torch.Tensor, lambda x: x.detach().clone(), built.state.state_dict())
    eager_losses, eager_weights = train(built)
    built.state.load_state_dict(start)
    built.graph = graph
    losses, weights = train(built)
    assert torch.stack(losses).tolist() == torch.stack(eager_losses).tolist()
    assert [name for name, weight in eager_weights.items() if not torch.equal(weights[name], weight)] == []
    assert graph.graphs.keys() == {True, False}


class StepsWithoutGraph:
    """Run micro-batches on the stream of a StepGraph, to which compiled blocks tie the sums of gradients."""

    def __init__(self, capture):
        self.capture = capture

    def run(self, function, *args):
        return self.capture.warm_up(partial(function, *args))


def test_segments_of_one_micro_batch(config, change):
    segments = {"train.tbptt_length": T // 4, "train.micro_batch_size": ROWS, "train.ema_decay": 0.9}
    recomputed = change(config, **segments, **{"train.activation_checkpointing": "full"})
    assert check_equal(recomputed, change).graph.graphs.keys() == {True}


def test_stages_of_other_shapes(config, change):
    tokens = 6 * ROWS * T
    longer = StageConfig(tokens=tokens, seq_len=2 * T, batch_size=ROWS // 2, micro_batch_size=ROWS // 2)
    stages = {"short": StageConfig(tokens=tokens), "long": longer}
    staged = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=None, stages=stages))
    assert check_equal(staged, change, steps=12).graph.graphs.keys() == {True}


def test_skipped_steps(config, change):
    with poisoned_steps({2, 7, 8, STEPS + 2, STEPS + 7, STEPS + 8}, gradient=math.nan):
        check_equal(config, change)


def test_a_run_that_validates_and_is_resumed_ends_as_the_eager_one(config, change):
    more = {"data.seq_len": 64, "train.steps": 12, "train.statistics_every": 4, "train.ema_decay": 0.9}
    eager = change(config, name="eager", **more)
    assert trainer.train(eager) == 0
    graphed = change(config, **more, **{"train.cuda_graph": True})
    with before_steps({6: partial(send_signal, signal.SIGINT)}):
        assert trainer.train(graphed) == signal.SIGINT
    assert trainer.train(graphed) == 0
    tensors = []
    for run in (eager, graphed):
        files = (run.folder / "checkpoints" / "step_12").glob("*.safetensors")
        tensors.append({name: x for file in files for name, x in load_file(file).items()})
    assert tensors[0].keys() == tensors[1].keys()
    assert [name for name, x in tensors[0].items() if not torch.equal(tensors[1][name], x)] == []


def test_memory_is_that_of_eager_steps_and_is_freed(config, change):
    wide = {"model.hidden_size": 512, "model.num_hidden_layers": 4, "data.seq_len": 2048}
    peaks = []
    for graph in (False, True):
        built = build_trainer(change(config, **wide, **{"train.cuda_graph": graph}))
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        train(built, 5)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.1 * peaks[0] and built.graph.peak_bytes == peaks[1]
    reserved = torch.cuda.memory_reserved()
    built.graph._reset(None)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < reserved


@pytest.fixture
def waiting_model(monkeypatch):
    """Let the trainer's models wait for the GPU in their forward pass."""
    build = trainer.build_initial_model

    def build_waiting_model(*args):
        model = build(*args)
        model.model.norm.register_forward_hook(lambda module, inputs, output: output * (output.sum().item() * 0 + 1))
        return model

    monkeypatch.setattr(trainer, "build_initial_model", build_waiting_model)


def test_a_step_that_waits_for_the_gpu_is_not_captured(config, change, waiting_model, caplog):
    with caplog.at_level(logging.WARNING, "glalm"):
        built = build_trainer(change(config, **{"train.cuda_graph": "auto"}))
        losses, _ = train(built, 5)
    assert built.graph.has_failed and "called a synchronizing CUDA operation" in caplog.text
    eager, _ = train(build_trainer(config), 5)
    assert torch.equal(torch.stack(losses), torch.stack(eager))
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        train(build_trainer(change(config, **{"train.cuda_graph": True})), 5)


def test_training_goes_on_after_a_failed_capture(config, change, waiting_model, caplog, monkeypatch):
    """A capture that CUDA refuses, because no rehearsal has prevented it, leaves torch's allocator usable."""
    built = build_trainer(change(config, **{"train.cuda_graph": "auto"}))
    monkeypatch.setattr(built.graph.capture, "rehearse", built.graph.capture.warm_up)
    with caplog.at_level(logging.WARNING, "glalm"):
        losses, _ = train(built, 5)
    assert built.graph.has_failed and "without CUDA graphs" in caplog.text
    torch.cuda.empty_cache()
    torch.randn(8, device="cuda")
    eager, _ = train(build_trainer(config), 5)
    assert torch.equal(torch.stack(losses), torch.stack(eager))
