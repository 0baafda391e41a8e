"""Compare training steps of glalm with a plain loop, as the benchmark does, and check its statistics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glalm.config.strict import ConfigError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "same_training.py"


@pytest.fixture(scope="module")
def script(load_benchmark):
    return load_benchmark("same_training")


def test_nudge_is_relative_and_that_of_the_run(script):
    before = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    nudged = []
    for run in (1, 1, 2):
        model = torch.nn.Linear(100, 200, bias=False)
        model.weight.data.copy_(before)
        script.nudge_weights(model, run)
        nudged.append(model.weight.detach())
    relative = nudged[0].double() / before.double() - 1
    assert relative.std() == pytest.approx(1e-6, rel=0.02) and relative.mean().abs() < 5e-8
    assert torch.equal(nudged[0], nudged[1]) and not torch.equal(nudged[0], nudged[2])


def test_difference_is_compared_with_the_spread_of_runs(script):
    one = [[9.0] * 18 + [1.0, 3.0], [9.0] * 18 + [3.0, 5.0]]  # means of the last two: 2 and 4
    other = [[9.0] * 18 + [4.0, 4.0], [9.0] * 18 + [6.0, 6.0], [9.0] * 18 + [5.0, 5.0]]
    summary = script.summarize({"one": one, "other": other})
    assert summary["one"] == {"runs": [2.0, 4.0], "mean": 3.0, "spread": pytest.approx(2**0.5)}
    assert summary["other"]["difference"] == 2.0 and summary["other"]["spread"] == 1.0
    assert summary["other"]["error"] == pytest.approx((2 / 2 + 1 / 3) ** 0.5)


@pytest.mark.parametrize("change", ["data.document_boundaries=reset_state", "train.z_loss=1e-4", "model=mamba2_tiny"])
def test_what_the_plain_loop_cannot_do_is_refused(script, change):
    with pytest.raises(ConfigError, match=r"compared with|plain loop"):
        script.compose_run_config([change])


@pytest.mark.slow
def test_plain_loop_trains_as_the_product_does(token_folder, tmp_path):
    record_path = tmp_path / "runs.json"
    command = [sys.executable, str(SCRIPT), "--json", str(record_path), "--models", "glalm", "transformers"]
    command += [
        "--set",
        f"data.path={token_folder}",
        "data.seq_len=32",
        "model.vocab_size=320",
        "model.num_hidden_layers=2",
    ]
    command += ["train.steps=6", "train.batch_size=8", "train.micro_batch_size=4", "optim.warmup_steps=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*arguments: str) -> str:
        done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=540)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("--runs", "1")
    [product, plain] = sorted(json.loads(record_path.read_text())["runs"], key=lambda each: each["model"])
    assert plain["losses"] == pytest.approx(product["losses"], abs=2e-4)
    assert product["losses"][-1] < product["losses"][0] - 0.05
    assert "glalm, run 1" not in run("--runs", "1", "--figure", str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").exists()
