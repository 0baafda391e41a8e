"""Options of the optimizer, the loss and the metrics, tested by complete runs."""

import json
import math

import numpy as np
import pytest

from glalm.config.run import OptimConfig
from glalm.data.files import read_jsonl
from glalm.data.loader import Windows
from glalm.data.shards import TokenSet
from glalm.hf import GLALMForCausalLM
from glalm.train import trainer
from glalm.train.throughput import ThroughputMeter


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
    assert trainer.train(config) == 0
    found = rows(config)
    assert [row["lr"] for row in found] == pytest.approx([5.5e-3, 1e-2, 1e-2, 7e-3, 4e-3, 1e-3])
    assert found[-1]["loss"] < found[0]["loss"] - 0.2 and found[-1]["tokens"] == 6 * 64
    assert {"mfu", "tokens_per_second_per_gpu", "grad_norm", "data_wait_seconds"} <= found[0].keys()
    assert (config.folder / "profile" / "rank_0.json.gz").exists()
    record = json.loads((config.folder / "run.json").read_text())
    assert record["config"]["optim"]["name"] == "muon" and {"git", "device", "versions"} <= record.keys()


def test_validation_uses_eval_sequences_windows(run_config, change):
    """They are evenly spaced, here in two batches of unequal size."""
    config = change(run_config, **{"train.eval_sequences": 3, "train.steps": 2, "train.eval_every": 2})
    assert trainer.train(config) == 0
    windows = Windows(TokenSet(config.data.path, "validation"), 16)
    batch = windows.load_batch(np.arange(3) * len(windows) // 3)
    model = GLALMForCausalLM.from_pretrained(config.folder / "checkpoints" / "step_2")
    expected = model(batch["input_ids"], shift_labels=batch["labels"]).loss.item()
    assert len(windows) > 3 and rows(config)[-1]["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_last_step_is_always_validated_and_saved(run_config, change):
    config = change(run_config, **{"train.steps": 5, "train.checkpoint.every": 3, "train.log_every": 3})
    assert trainer.train(config) == 0
    found = read_jsonl(config.folder / "metrics.jsonl")
    assert [row["step"] for row in found if "val_loss" in row] == [0, 3, 5]
    assert [row["step"] for row in found if "loss" in row] == [3, 5]
    assert {p.name for p in (config.folder / "checkpoints").iterdir()} == {"step_3", "step_5"}


def test_speed_is_measured_since_the_previous_row(run_config, change, monkeypatch):
    steps = []
    metrics = ThroughputMeter.metrics

    def count_steps(self, step, *others):
        steps.append(step - self.step)
        return metrics(self, step, *others)

    monkeypatch.setattr(ThroughputMeter, "metrics", count_steps)
    assert trainer.train(change(run_config, **{"train.log_every": 2, "train.eval_every": 6})) == 0
    assert steps == [2, 2, 2]


@pytest.mark.parametrize("loss, found", [(math.inf, {}), (800.0, {"loss": 800.0}), (2.0, {"loss": 2.0})])
def test_a_loss_that_is_not_finite_has_no_perplexity(loss, found):
    if loss < 700:
        found["perplexity"] = pytest.approx(7.389, abs=1e-3)
    assert trainer.drop_non_finite({"loss": loss, "perplexity": trainer.perplexity(loss)}) == found


def test_a_validation_that_is_not_finite_is_warned_of_and_timed(run_config, change, monkeypatch, capsys):
    """Step 3 validates and has no other row. The speed at step 6 is that of the steps after it."""
    steps = []
    metrics = ThroughputMeter.metrics
    monkeypatch.setattr(
        ThroughputMeter, "metrics", lambda self, step, *_: steps.append(self.step) or metrics(self, step)
    )
    monkeypatch.setattr(trainer.Trainer, "validate", lambda *_: {"val_loss": math.nan, "val_perplexity": math.nan})
    config = change(run_config, **{"train.log_every": 6, "train.checkpoint.every": 6})
    assert trainer.train(config) == 0 and steps == [3]
    found = read_jsonl(config.folder / "metrics.jsonl")
    assert found[:2] == [{"step": 0}, {"step": 3}] and found[2]["step"] == 6 and "val_loss" not in found[2]
    lost = "val_loss, val_perplexity, val_bits_per_byte"
    assert f"warning: not finite at step 3, and left out of metrics.jsonl: {lost}.\n" in capsys.readouterr().err


def test_z_loss_is_part_of_training_only(run_config, change):
    trainer.train(run_config)
    penalised = change(run_config, name="penalised", **{"train.z_loss": 0.1})
    trainer.train(penalised)
    one, two = rows(run_config)[0], rows(penalised)[0]
    assert two["loss"] > one["loss"] + 2  # logsumexp of 320 equal logits is 5.8, its square 33
    first = [read_jsonl(c.folder / "metrics.jsonl")[0]["val_loss"] for c in (run_config, penalised)]
    assert first[0] == first[1]
