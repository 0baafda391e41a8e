"""Estimates compared with the parameters, activations and optimizer states of real models."""

import dataclasses

import pytest
import torch

from glalm.config.run import OptimConfig, TrainConfig
from glalm.config.strict import ConfigError
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.model.flops import model_cost
from glalm.train import estimate as estimate_module
from glalm.train.estimate import (
    GIB,
    GPU,
    count_parameters,
    describe_needs,
    describe_time,
    estimate_memory,
    explain_out_of_memory,
    measure_activations,
)
from glalm.train.optim import build_optimizers
from glalm.train.state import BatchPlan

MODEL = {"hidden_size": 64, "num_hidden_layers": 3, "num_heads": 2, "intermediate_size": 128, "vocab_size": 100}
H200 = GPU("NVIDIA H200", 140 * GIB, True)


def estimate(config, world_size: int, local_world_size: int, bf16: bool, compiled: bool) -> dict[str, int]:
    plan = BatchPlan.from_config(config, world_size)
    return estimate_memory(config, plan, local_world_size, bf16, compiled)


def real(config, **changes) -> CausalLM:
    return CausalLM(dataclasses.replace(config.model, **changes))


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


def test_no_part_is_negative(run_config, change):
    """Mamba saves one state less than it has chunks, so a linear fit of its activations starts below 0."""
    config = change(run_config, model=ModelConfig(**MODEL, mixer="mamba"), **{"data.seq_len": 256})
    assert all(size >= 0 for size in estimate(config, 1, 1, True, True).values())


def test_full_checkpointing_saves_only_a_blocks_input():
    kept = measure_activations(ModelConfig(**MODEL), "gla", TrainConfig(activation_checkpointing="full"), True, False)
    assert kept.per_token == 2 * 64 and abs(kept.fixed) < 1000


def test_more_recomputation_saves_less():
    model = ModelConfig(**MODEL)
    eager = measure_activations(model, "gla", TrainConfig(), True, False).per_token
    compiled, lean, selective = (
        measure_activations(model, "gla", TrainConfig(activation_checkpointing=how), True, True).per_token
        for how in ("none", "elementwise", "selective")
    )
    assert eager > compiled > lean > 4 * 64 and compiled > selective > 4 * 64


def test_sharding_divides_the_memory(run_config, change):
    """Over 4 processes, each holds a quarter of weights, gradients and moments, and gathered weights and gradients."""
    one = estimate(run_config, 1, 1, False, False)
    four = estimate(change(run_config, **{"parallel.mode": "fsdp2", "train.micro_batch_size": 1}), 4, 4, False, False)
    size = count_parameters(run_config)
    assert one["weights"] == 4 * size.total and one["optimizer"] == 8 * size.total and one["gathered"] == 0
    assert [four[part] * 4 for part in ("weights", "gradients", "optimizer")] == pytest.approx(
        [4 * size.total, 4 * size.total, 8 * size.total], abs=16
    )
    root = size.total - size.blocks
    assert four["gathered"] == 4 * (root + 2 * size.largest_block) + 4 * (root + 2 * size.largest_block)
    accumulating = change(run_config, **{"parallel.mode": "fsdp2", "train.batch_size": 8, "train.micro_batch_size": 1})
    assert (
        estimate(accumulating, 4, 4, False, False)["gathered"] == 4 * (root + 2 * size.largest_block) + 4 * size.total
    )
    segments = change(run_config, **{"train.tbptt_length": 4})
    assert estimate(segments, 1, 1, False, False)["activations"] * 4 == pytest.approx(one["activations"], rel=1e-6)


def test_report_of_a_dry_run(run_config, change):
    config = change(run_config, **{"train.steps": 1000, "train.assumed_mfu": 0.5, "train.compile": False})
    text = "\n".join(describe_needs(config, 2, H200))
    total, tokens = count_parameters(config).total, 1000 * 4 * 16
    hours = tokens * model_cost(config.model, 16).training / (0.5 * 989e12) / 2 / 3600
    assert f"{total:,}; {total - 2 * 320 * 32:,} without" in text
    assert "4 x 16 = 64 tokens: 2 x NVIDIA H200, each 1 x 2 sequences, ddp" in text
    assert "1,000 (6.4e-05B tokens), warm-up over the first 2" in text
    assert f"{hours:,.1f} hours" in text and f"{12 * total / 1e9:.2f} GB each" in text
    assert "WARNING" not in text
    small = "\n".join(describe_needs(config, 2, GPU("A small one", 2**16, True)))
    assert "WARNING: more than the 0.0 GiB of A small one. Set a smaller train.micro_batch_size" in small
    assert "the peak of A small one is unknown" in small


def test_dry_run_prints_the_costs(run_config, change):
    config = change(run_config, **{"train.assumed_mfu": 0.5, "train.assumed_price": 2.5})
    text = describe_time(config, 2, H200, flops_per_token=1e9, tokens=10**15)
    gpu_hours = 1e9 * 1e15 / (0.5 * 989e12) / 3600
    assert f"{gpu_hours:,.0f} GPU hours for {2.5 * gpu_hours:,.0f}, at 50%" in text


def test_indivisible_batch_is_refused(run_config, change):
    with pytest.raises(ConfigError, match="Choose a multiple of 3"):
        list(describe_needs(run_config, 3, H200))


def test_dry_run_needs_no_data_and_writes_nothing(run_config, change, capsys):
    from glalm.train.trainer import train

    config = change(run_config, **{"train.dry_run": True, "train.assumed_gpus": 2, "data.path": "nowhere"})
    config.train.compile = False
    assert train(config) == 0 and not config.folder.exists()
    assert "2 x NVIDIA H200" in capsys.readouterr().out or torch.cuda.is_available()


def test_dry_run_names_the_vocabulary_of_the_data_or_its_assumption(run_config, change, capsys, monkeypatch):
    monkeypatch.setattr(estimate_module, "current_gpu", lambda: H200)
    config = change(run_config, **{"model.vocab_size": None, "train.compile": False})
    assert estimate_module.dry_run(config) == 0 and config.model.vocab_size == 300
    with_data = capsys.readouterr().out
    assert with_data.startswith(f"vocabulary    300 tokens, those of {config.data.path}\nparameters    ")
    config = change(run_config, **{"model.vocab_size": None, "train.compile": False, "data.path": "nowhere"})
    assert estimate_module.dry_run(config) == 0 and config.model.vocab_size == 32000
    without = capsys.readouterr().out
    assert "32,000 tokens are assumed, because model.vocab_size is null and nowhere/manifest.json is missing" in without

    def parameters(text: str) -> int:
        return int(text.splitlines()[1].split()[1].strip(";").replace(",", ""))

    assert parameters(without) - parameters(with_data) == 2 * 32 * (32000 - 300)


def test_out_of_memory_names_the_estimate_and_what_to_change(run_config, monkeypatch):
    monkeypatch.setattr(estimate_module, "current_gpu", lambda: H200)
    run_config.train.compile = False
    message = explain_out_of_memory(run_config, BatchPlan.from_config(run_config, 1))
    assert message.startswith("NVIDIA H200 with 140.0 GiB is out of memory. The estimate was 0.0 GiB per GPU: ")
    assert "train.micro_batch_size" in message
