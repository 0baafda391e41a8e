"""Checkpoints that are saved while the GPU is still computing the step that they belong to."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from glalm.config.run import CheckpointConfig, GuardConfig, OptimConfig
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.train.checkpoint import CheckpointSaver, load_train_state
from glalm.train.guards import UpdateGuard
from glalm.train.optim import build_optimizers
from glalm.train.state import TrainState

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
SLEEP_CYCLES = 2_000_000_000  # about a second on an H200, and longer than staging takes


def build_state(seed: int) -> TrainState:
    """Return the state of an untrained model of 20M parameters, large enough that a copy of it takes milliseconds."""
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=32000, hidden_size=256, num_hidden_layers=4, num_heads=2, intermediate_size=512)
    model = CausalLM(config).to(DEVICE)
    return TrainState(model, build_optimizers(model, OptimConfig(lr=1e-2)), UpdateGuard(GuardConfig(), DEVICE))


def queue_step(state: TrainState) -> None:
    """Queue an optimizer step on random gradients, without waiting for the GPU."""
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in state.model.parameters()])
    state.step += 1
    state.guard.step(state.optimizers, state.step, torch.zeros((), device=DEVICE), norm, 1.0)


def copy_tensors(state: TrainState) -> dict[str, Tensor]:
    """Queue a copy, on the GPU, of every tensor that a checkpoint holds of this state."""
    live = state.state_dict()
    return {name: tensor.detach().clone() for name, tensor in (live["model"] | live["training"]).items()}


@pytest.mark.parametrize("stream", ["default stream", "side stream"])
def test_save_between_queued_steps_holds_its_own_step(tmp_path: Path, stream: str):
    """Queue a long kernel, a step, a save and the next step at once: the checkpoint is of the first step.

    The second save reuses the host memory of the first one, whose checkpoint must not change by that.
    """
    state = build_state(seed=0)
    current = torch.cuda.Stream() if stream == "side stream" else torch.cuda.default_stream()
    current.wait_stream(torch.cuda.default_stream())
    expected = {}
    with torch.cuda.stream(current), CheckpointSaver(tmp_path, CheckpointConfig(keep_last=9)) as saver:
        queue_step(state)  # It creates the optimizer's state.
        saver.warm_up(state)
        spare_copies = [copy_tensors(state), copy_tensors(state)]
        del spare_copies  # They stay in the allocator's cache: a new allocation could wait for the GPU.
        for _ in range(2):
            saver.finish()  # A save that is still being written would keep the next one waiting until the GPU is idle.
            torch.cuda.synchronize()
            torch.cuda._sleep(SLEEP_CYCLES)
            slept = torch.cuda.Event()
            slept.record()
            queue_step(state)
            expected[state.step] = copy_tensors(state)
            saver.save(state, {})
            queue_step(state)
            assert not slept.query(), "the first step ran before the second one was queued: nothing was tested"
        saver.finish()
        last = copy_tensors(state)

    assert list(expected) == [2, 4]
    for step, tensors in expected.items():
        loaded = build_state(seed=1)
        load_train_state(tmp_path / f"step_{step}", loaded, seed=0)
        torch.cuda.synchronize()
        found = copy_tensors(loaded)
        assert loaded.step == step and found.keys() == tensors.keys()
        different = [name for name in tensors if not torch.equal(found[name], tensors[name])]
        assert different == []
        changed_later = [name for name in tensors if not torch.equal(tensors[name], last[name])]
        assert len(changed_later) >= len(list(state.model.parameters()))
