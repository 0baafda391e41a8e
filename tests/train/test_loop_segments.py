"""Truncated backpropagation: the state is handed from segment to segment, the gradient is not."""

import pytest
import torch

from glalm.config.run import RunConfig
from glalm.config.strict import ConfigError
from glalm.model.decoder import CausalLM
from glalm.train import parallel
from glalm.train.state import BatchPlan
from glalm.train.trainer import Trainer

T, SEGMENT, ROWS = 32, 8, 4
MIXERS = ["gla", "linear", "retention", "regla", "mamba", "mamba2", "deltanet", "gated_deltanet", "gla+attention"]


@pytest.fixture
def segmented(run_config, change):
    def make(layers: str = "gla", **more) -> RunConfig:
        given = {"data.seq_len": T, "train.tbptt_length": SEGMENT, "train.batch_size": ROWS, "model.layers": layers}
        return change(run_config, **{"model.attention.window": 6, "train.micro_batch_size": 2, **given, **more})

    return make


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(320, (ROWS, T + 1), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def model_of(config: RunConfig) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(config.model)
    with torch.no_grad():  # for gates and states that matter
        for p in model.parameters():
            p.mul_(3) if p.dim() > 1 else None
    return model.double()


def trained(config: RunConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and gradients of one step."""
    accelerator = parallel.start_processes(config)
    trainer = Trainer(config, BatchPlan.from_config(config, accelerator.num_processes), accelerator)
    trainer.module = model_of(config)
    loss = trainer.accumulate_gradients(batch())
    return loss.item(), {name: p.grad for name, p in trainer.module.named_parameters()}


@pytest.mark.parametrize("layers", MIXERS)
def test_losses_are_those_of_the_whole_window(segmented, layers):
    loss, _ = trained(segmented(layers))
    whole, _ = trained(segmented(layers, **{"train.tbptt_length": None}))
    assert loss == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("layers", ["gla", "mamba2", "gla+attention"])
def test_gradients_are_those_of_each_segment_from_its_given_state(segmented, layers):
    """Against the window run from its start up to each segment, with gradients in that segment alone."""
    config = segmented(layers)
    _, found = trained(config)
    model, rows = model_of(config).train(), batch()
    for start in range(0, T, SEGMENT):
        state = None
        if start:
            with torch.no_grad():
                state = model(rows["input_ids"][:, :start], return_cache=True).cache
        inputs, labels = (rows[name][:, start : start + SEGMENT] for name in ("input_ids", "labels"))
        loss = model(inputs, cache=state, shift_labels=labels).loss
        (loss * SEGMENT / T).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_the_cut_is_a_cut(segmented):
    _, cut = trained(segmented())
    _, whole = trained(segmented(**{"train.tbptt_length": None}))
    name = "model.layers.0.attn.k_proj.weight"
    assert (cut[name] - whole[name]).norm() > 0.01 * whole[name].norm()


def test_memory_is_that_of_a_segment(segmented, monkeypatch):
    """No more than one segment's activations are alive at a time."""
    alive, most = 0, []
    forward = CausalLM.forward

    def counted(self, *args, **kwargs):
        nonlocal alive
        out = forward(self, *args, **kwargs)
        alive += 1
        most.append(alive)

        def freed(_):
            nonlocal alive
            alive -= 1

        out.loss.register_hook(freed)
        return out

    monkeypatch.setattr(CausalLM, "forward", counted)
    trained(segmented())
    assert most == [1] * (T // SEGMENT * ROWS // 2)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"train.tbptt_length": 7}, r"train.tbptt_length=7 does not divide data.seq_len=32; set it to one of 1, 2, 4"),
        ({"data.document_boundaries": "reset_state"}, "data.document_boundaries=reset_state drops it"),
        ({"model.attention.window": None}, "set model.attention.window=N or train.tbptt_length=null"),
    ],
)
def test_what_makes_no_sense_is_refused(segmented, more, message):
    with pytest.raises(ConfigError, match=message):
        segmented("gla+attention", **more)
