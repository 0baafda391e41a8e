"""Truncated backpropagation through time: the state is carried from segment to segment, the gradient is not."""

import pytest
import torch

from glalm.config.run import RunConfig
from glalm.config.strict import ConfigError
from glalm.model.decoder import CausalLM
from glalm.train import parallel
from glalm.train.state import plan_batches
from glalm.train.trainer import Trainer

T, SEGMENT, ROWS = 32, 8, 4
MIXERS = [
    "gla",
    "linear",
    "retention",
    "regla",
    "mamba",
    "mamba2",
    "deltanet",
    "gated_deltanet",
    "kda",
    "transnormer_diag+transnormer",
    "memsizer",
    "hyena",
    "rpe_attention",
    "gla+attention",
]


@pytest.fixture
def segmented(run_config, change):
    def make(layers: str = "gla", **more) -> RunConfig:
        given = {"data.seq_len": T, "train.tbptt_length": SEGMENT, "train.batch_size": ROWS, "model.layers": layers}
        return change(run_config, **{"model.attention.window": 6, "train.micro_batch_size": 2, **given, **more})

    return make


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(320, (ROWS, T + 1), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def build_model(config: RunConfig) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(config.model)
    with torch.no_grad():  # for gates and states that matter
        for p in model.parameters():
            p.mul_(3) if p.dim() > 1 else None
    return model.double()


def trained(config: RunConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and gradients of one step."""
    accelerator = parallel.start_processes(config)
    trainer = Trainer(config, plan_batches(config, accelerator.num_processes), accelerator)
    trainer.module = build_model(config)
    loss = trainer.accumulate_gradients(batch())
    return loss.item(), {name: p.grad for name, p in trainer.module.named_parameters()}


@pytest.mark.parametrize("layers", MIXERS)
def test_loss_equals_that_of_the_full_window(segmented, layers):
    loss, _ = trained(segmented(layers))
    whole, _ = trained(segmented(layers, **{"train.tbptt_length": None}))
    assert loss == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("layers", ["gla", "mamba2", "gla+attention"])
def test_gradients_equal_those_of_segments_from_constant_states(segmented, layers):
    """Compare with runs of the window up to each segment, with gradients in that segment only."""
    config = segmented(layers)
    _, found = trained(config)
    model, rows = build_model(config).train(), batch()
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


def test_gradient_does_not_flow_between_segments(segmented):
    _, cut = trained(segmented())
    _, whole = trained(segmented(**{"train.tbptt_length": None}))
    name = "model.layers.0.attn.k_proj.weight"
    assert (cut[name] - whole[name]).norm() > 0.01 * whole[name].norm()


def test_activations_of_one_segment_are_alive_at_a_time(segmented, monkeypatch):
    """Count the segments whose graph is alive."""
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
def test_contradictory_settings_are_refused(segmented, more, message):
    with pytest.raises(ConfigError, match=message):
        segmented("gla+attention", **more)
