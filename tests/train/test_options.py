"""Options of the optimiser, the loss and the reports, through a whole run."""

import json

import pytest

from glalm.config import OptimConfig
from glalm.data.files import read_jsonl
from glalm.train import loop


def rows(config) -> list[dict]:
    return [row for row in read_jsonl(config.folder / "metrics.jsonl") if "loss" in row]


def test_muon_wsd_lengths_in_tokens_and_a_profile(run_config, change):
    config = run_config
    config.train.steps, config.train.tokens = None, 6 * 64
    config.train.batch_size, config.train.batch_tokens = None, 64
    optim = {"name": "muon", "schedule": "wsd", "decay_fraction": 0.5, "decay_shape": "linear"}
    config = change(
        config,
        optim=OptimConfig(**optim, lr=1e-2, min_lr=1e-3, warmup_steps=None, warmup_tokens=128),
        **{"train.profile_steps": (2, 3)},
    )
    assert loop.train(config) == 0
    found = rows(config)
    assert [row["lr"] for row in found] == pytest.approx([5.5e-3, 1e-2, 1e-2, 7e-3, 4e-3, 1e-3])
    assert found[-1]["loss"] < found[0]["loss"] - 0.2 and found[-1]["tokens"] == 6 * 64
    assert {"mfu", "tokens_per_second_per_gpu", "grad_norm", "data_wait_seconds"} <= found[0].keys()
    assert (config.folder / "profile" / "rank_0.json.gz").exists()
    record = json.loads((config.folder / "run.json").read_text())
    assert record["config"]["optim"]["name"] == "muon" and {"git", "device", "versions"} <= record.keys()


def test_z_loss_is_trained_with_but_not_validated(run_config, change):
    loop.train(run_config)
    penalised = change(run_config, name="penalised", **{"train.z_loss": 0.1})
    loop.train(penalised)
    one, two = rows(run_config)[0], rows(penalised)[0]
    assert two["loss"] > one["loss"] + 2  # logsumexp of 320 equal logits is 5.8, its square 33
    first = [read_jsonl(c.folder / "metrics.jsonl")[0]["val_loss"] for c in (run_config, penalised)]
    assert first[0] == first[1]
