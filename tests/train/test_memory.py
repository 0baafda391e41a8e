"""Estimates of memory compared with the parameters, activations, optimizer states and measured peaks of real models."""

import dataclasses
from functools import partial

import pytest
import torch
from choices import CHOICES

from glalm.cli import compose_config
from glalm.config.run import OptimConfig, TrainConfig
from glalm.config.strict import ConfigError
from glalm.evals.options import TrainingRun
from glalm.kernels import gated_norm
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.train import memory
from glalm.train.estimate import Device, describe_needs
from glalm.train.memory import GIB, count_parameters, estimate_memory, measure_activations
from glalm.train.optim import build_optimizers
from glalm.train.state import BatchPlan

MODEL = {"hidden_size": 64, "num_hidden_layers": 3, "num_heads": 2, "intermediate_size": 128, "vocab_size": 100}


def estimate(config, world_size: int, local_world_size: int, bf16: bool, compiled: bool) -> dict[str, int]:
    plan = BatchPlan.from_config(config, world_size)
    return estimate_memory(config, plan, local_world_size, bf16, compiled)


def real(config, **changes) -> CausalLM:
    return CausalLM(dataclasses.replace(config.model, **changes))


@pytest.mark.parametrize("choice", [*CHOICES.values(), {"gla": {"initial_half_lives": [4, 256]}}], ids=str)
def test_every_choice_is_measured_for_a_gpu(choice):
    """On tensors without numbers, so nothing that builds or runs a model may ask for one."""
    model = ModelConfig(**MODEL | choice)
    for mixer in {*model.layer_mixers()}:
        found = measure_activations(model, mixer, TrainConfig(), length=256, bf16=True, compiled=False, is_gpu=True)
        assert found.per_token > found.largest_per_token > 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parameters_and_moments_are_exact(run_config, change, optimizer):
    config = change(
        run_config,
        model=ModelConfig(**MODEL, layers="gla+attention"),
        optim=OptimConfig(name=optimizer, warmup_steps=1),
    )
    model = real(config)
    made = build_optimizers(model, config.optim)
    model(torch.zeros(1, 8, dtype=torch.long), shift_labels=torch.zeros(1, 8, dtype=torch.long)).loss.backward()
    kept = 0
    for each in made:
        each.step()
        kept += sum(x.numel() for state in each.state.values() for x in state.values() if x.ndim)
    size = count_parameters(config)
    assert size.total == sum(p.numel() for p in model.parameters()) and size.moments == kept
    assert size.averages == 0
    assert count_parameters(change(config, **{"train.ema_decay": 0.9})).averages == size.total
    assert size.largest_block == max(sum(p.numel() for p in block.parameters()) for block in model.model.layers)


@pytest.mark.parametrize("mixer", ["gla", "attention", "mamba2"])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_a_model_saves(run_config, change, mixer, bf16):
    """Compare with everything that autograd saves in a forward pass with the loss, without the parameters."""
    config = change(run_config, model=ModelConfig(**MODEL, mixer=mixer), **{"data.seq_len": 192})
    model, ids = real(config), torch.randint(100, (2, 192))  # a micro-batch
    saved, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model(ids, shift_labels=ids)
    parts = estimate(config, 1, 1, bf16, compiled=False)
    found = sum(x.untyped_storage().nbytes() for x in saved.values())
    loss = 2 * 192 * 64 * 3 * (2 if bf16 else 4)  # the last norm's input and output, and the head's gradient
    assert parts["activations"] + parts["bf16 weights"] + loss == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("segment", [64, 128])
def test_validation_cannot_use_the_memory_of_graphs(run_config, change, segment):
    """Nothing else changes: gradients have the place of activations in a graph as well, here with one segment."""
    config = change(run_config, model=ModelConfig(**MODEL), **{"data.seq_len": 128, "train.tbptt_length": segment})
    plan = BatchPlan.from_config(config, 1)
    eager = estimate_memory(config, plan, 1, True, False)
    captured = estimate_memory(config, plan, 1, True, False, captured=True)
    loss = memory._loss_bytes(config.model, plan.micro_batch * segment, True)
    assert captured == eager | {"validation": 128 // segment * eager["one block's backward"] + loss}
    with pytest.raises(ConfigError, match=r"train.cuda_graph=true: it needs a GPU"):
        list(describe_needs(change(run_config, **{"train.cuda_graph": True}), 1, Device("CPU", GIB, False, False)))


@pytest.mark.slow
def test_no_part_is_negative(run_config, change):
    """Mamba saves states between chunks, one less than it has chunks."""
    config = change(run_config, model=ModelConfig(**MODEL, mixer="mamba"), **{"data.seq_len": 256})
    assert all(size >= 0 for size in estimate(config, 1, 1, True, True).values())


def test_full_checkpointing_saves_only_a_blocks_input():
    train = TrainConfig(activation_checkpointing="full")
    kept = measure_activations(ModelConfig(**MODEL), "gla", train, length=256, bf16=True, compiled=False)
    assert kept.per_token == 2 * 64 and abs(kept.fixed) < 1000


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gla", "retention", "gated_deltanet", "kda"])
def test_the_kernel_of_gated_norms_saves_no_more_than_pytorch(mixer, monkeypatch):
    """It does not save the results, and recomputes what PyTorch saves: each head's root mean square, in float32."""
    config = TrainConfig(activation_checkpointing="elementwise")
    kept = {}
    for width in (gated_norm.MAX_WIDTH, 0):
        monkeypatch.setattr(gated_norm, "MAX_WIDTH", width)
        model = ModelConfig(**MODEL)
        kept[width] = measure_activations(model, mixer, config, length=256, bf16=True, compiled=True, is_gpu=True)
    with_kernel, with_pytorch = kept.values()
    assert with_kernel.per_token == with_pytorch.per_token - 4 * model.num_heads


@pytest.mark.slow
def test_more_recomputation_saves_less():
    model = ModelConfig(**MODEL)
    measure = partial(measure_activations, model, "gla", length=256, bf16=True)
    eager = measure(TrainConfig(), compiled=False).per_token
    compiled, lean, selective = (
        measure(TrainConfig(activation_checkpointing=how), compiled=True).per_token
        for how in ("none", "elementwise", "selective")
    )
    assert eager > compiled > lean > 4 * 64 and compiled > selective > 4 * 64


def test_a_dense_form_takes_memory_for_each_pair_of_tokens(run_config, change):
    """The weights of all pairs of a sequence, 2 heads in float32, and in the backward pass their gradients."""
    config = change(run_config, model=ModelConfig(**MODEL, mixer="rpe_attention"), **{"data.seq_len": 256})
    found = measure_activations(config.model, "rpe_attention", TrainConfig(), length=256, bf16=True, compiled=False)
    assert found.largest_per_token == 4 * 2 * 256
    plan = BatchPlan.from_config(config, 1)
    backward = estimate_memory(config, plan, 1, bf16=True, compiled=False)["one block's backward"]
    assert backward == 2 * 4 * 2 * 256 * 256 * plan.micro_batch


def test_sharding_divides_the_memory(run_config, change):
    """Over 4 processes, each holds a quarter of weights, gradients and moments, and gathered weights and gradients."""
    one = estimate(run_config, 1, 1, False, False)
    four = estimate(change(run_config, **{"parallel.mode": "fsdp2", "train.micro_batch_size": 1}), 4, 4, False, False)
    size = count_parameters(run_config)
    assert one["weights"] == 4 * size.total and one["optimizer"] == 8 * size.total and one["gathered"] == 0
    assert [four[part] * 4 for part in ("weights", "optimizer")] == pytest.approx(
        [4 * size.total, 8 * size.total], abs=16
    )
    root = size.total - size.blocks
    assert four["gathered"] == 4 * (root + 2 * size.largest_block) + 4 * (root + 2 * size.largest_block)
    accumulating = change(run_config, **{"parallel.mode": "fsdp2", "train.batch_size": 8, "train.micro_batch_size": 1})
    parts = estimate(accumulating, 4, 4, False, False)
    assert parts["gathered"] == 4 * (root + 2 * size.largest_block) + 4 * size.total
    assert parts["gradients"] == size.total
    segments = change(run_config, **{"train.tbptt_length": 4})
    assert estimate(segments, 1, 1, False, False)["activations"] * 4 == pytest.approx(one["activations"], rel=1e-6)


def test_gradients_of_one_micro_batch_take_the_place_of_activations(run_config, change):
    size = 4 * count_parameters(run_config).total
    split = change(run_config, **{"train.micro_batch_size": 2})  # two micro-batches
    assert estimate(split, 1, 1, False, False)["gradients"] == size
    one = estimate(split, 2, 2, False, False)
    assert one["gradients"] == size  # DDP's buckets
    sharded = estimate(change(split, **{"parallel.mode": "fsdp2"}), 2, 2, False, False)
    assert sharded["gradients"] == max(0, size // 2 - sharded["activations"])
    short = change(split, **{"parallel.mode": "fsdp2", "data.seq_len": 2})
    parts = estimate(short, 2, 2, False, False)
    assert parts["gradients"] == size // 2 - parts["activations"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, batch, seq_len, checkpointing, peak",
    [
        ("gla_340m", 32, 2048, "elementwise", 46.6),
        ("gla_1b3", 8, 2048, "elementwise", 36.3),
        ("attention_340m", 32, 2048, "elementwise", 40.6),
        ("retention_340m", 32, 2048, "elementwise", 53.6),
        ("kda_340m", 32, 2048, "elementwise", 67.8),
        ("mamba2_340m", 32, 2048, "elementwise", 62.1),
        ("gla_340m", 1, 65536, "full", 10.9),
        ("gla_340m", 1, 786432, "full", 81.7),
    ],
)
def test_peaks_measured_on_an_h200(model, batch, seq_len, checkpointing, peak):
    """The GiB are torch's peaks: docs/launch.md."""
    changes = [f"train.batch_size={batch}", f"train.micro_batch_size={batch}", f"data.seq_len={seq_len}"]
    changes += ["train.steps=9", "optim.warmup_steps=0", f"train.activation_checkpointing={checkpointing}"]
    config = compose_config(TrainingRun, "train", [f"model={model}", "optim=adamw", *changes])
    parts = estimate_memory(config, BatchPlan.from_config(config, 1), 1, True, True, is_gpu=True)
    assert sum(parts.values()) / GIB == pytest.approx(peak, rel=0.05)
