"""Fifty steps of a tiny GLA model against a stored curve, so that a silent change of training shows.

Everything that training is made of but reading files: initial weights, model, loss, accumulation, clipping, optimiser,
schedule. float32 sums in another order, with another vector width (AVX-512, AVX2, none), move these losses by 2e-7 of
their value and the gradients' norms by 1e-5; the tolerances are far above, and far below what a change does that
matters. The learning rate is kept low for this: at 1e-2 the same differences grow to 4 % within the fifty steps.

After a change that is meant: python tests/train/test_golden.py
"""

import json
from pathlib import Path

import pytest
import torch

from glalm.config.run import DataConfig, OptimConfig, RunConfig, TrainConfig
from glalm.model.config import ModelConfig
from glalm.train import parallel
from glalm.train.state import plan_batches
from glalm.train.trainer import Trainer

GOLDEN = Path(__file__).parent / "golden.json"
VOCABULARY, T, BATCH, STEPS = 61, 48, 4, 50


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_heads=2, intermediate_size=64
        ),
        data=DataConfig(seq_len=T),
        optim=OptimConfig(lr=2e-3, min_lr=2e-4, warmup_steps=10, weight_decay=0.1, grad_clip=0.5),
        train=TrainConfig(steps=STEPS, batch_size=BATCH, micro_batch_size=2, z_loss=1e-3, precision="fp32"),
    )


def batch(step: int) -> dict[str, torch.Tensor]:
    """Sequences in which the next token is a fixed function of the last two, by integer arithmetic alone."""
    ids = torch.empty(BATCH, T + 1, dtype=torch.long)
    rows = torch.arange(BATCH) + BATCH * step
    ids[:, 0], ids[:, 1] = rows * 7 % VOCABULARY, rows * rows % VOCABULARY
    for t in range(2, T + 1):
        ids[:, t] = (3 * ids[:, t - 1] + ids[:, t - 2] ** 2 + 5) % 23
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def curve() -> dict[str, list[float]]:
    run = config()
    accelerator = parallel.start_processes(run)
    trainer = Trainer(run, plan_batches(run, accelerator.num_processes), accelerator)
    found = {"loss": [], "grad_norm": []}
    for step in range(1, STEPS + 1):
        result = trainer.step(batch(step))
        found["loss"].append(result.loss.item())
        found["grad_norm"].append(result.grad_norm.item())
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="the curve is a CPU's")
def test_losses_are_the_stored_ones():
    found, golden = curve(), json.loads(GOLDEN.read_text())
    assert found["loss"] == pytest.approx(golden["loss"], rel=1e-4)
    assert found["grad_norm"] == pytest.approx(golden["grad_norm"], rel=1e-3)
    assert golden["loss"][-1] < 0.7 * golden["loss"][0]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({k: [round(x, 7) for x in v] for k, v in curve().items()}, indent=1) + "\n")
