"""A run on a GPU, killed with -9 and started again: the unbroken one's bits; on two GPUs, its tokens."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sameness import assert_same, rows

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
SHAPE = ["model.vocab_size=320", "model.hidden_size=256", "model.num_hidden_layers=2", "model.num_heads=2"]
STEPS = ["train.steps=120", "train.batch_size=8", "train.micro_batch_size=4", "train.log_every=1", "data.seq_len=128"]
SAVES = ["train.eval_every=40", "train.eval_sequences=8", "train.checkpoint.every=10", "train.checkpoint.keep_last=99"]
# In bf16, or with AdamW's usual eps, the last bit of a gradient is 10% of a loss 100 steps later.
IN_FP32 = ["train.precision=fp32", "optim.eps=1e-4"]
# Else torch.compile times tilings that round differently, and what another test beside this one does decides.
ENVIRONMENT = os.environ | {"TORCHINDUCTOR_DETERMINISTIC": "1"}


def start(name: str, data: Path, runs: Path, *more: str, gpus: int = 1) -> subprocess.Popen:
    """train.py as it is launched: bf16, compiled blocks, the fused optimiser."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else []
    choices = [f"name={name}", f"runs_dir={runs}", f"data.path={data}", "optim=adamw", "optim.warmup_steps=20"]
    command = [sys.executable, *launcher, "train.py", *choices, *SHAPE, *STEPS, *SAVES, *more]
    with open(runs / f"{name}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=ENVIRONMENT)


def finish(process: subprocess.Popen, log: Path) -> None:
    assert process.wait(timeout=300) == 0, log.read_text()[-3000:]


def kill_after(process: subprocess.Popen, checkpoint: Path, log: Path) -> None:
    """kill -9 while it makes the steps after that checkpoint."""
    end = time.monotonic() + 300
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -9, "it was done before it could be killed"


@pytest.fixture(scope="module")
def whole(token_folder, tmp_path_factory):
    """A run that nothing broke."""
    runs = tmp_path_factory.mktemp("runs")
    finish(start("whole", token_folder, runs), runs / "whole.log")
    return runs / "whole"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_twice_it_ends_as_the_unbroken_run_bit_for_bit(whole, token_folder, asynchronous):
    runs, name = whole.parent, f"killed-{asynchronous}"
    options = [f"train.checkpoint.asynchronous={asynchronous}"]
    for step in (30, 70):
        process = start(name, token_folder, runs, *options)
        kill_after(process, runs / name / "checkpoints" / f"step_{step}", runs / f"{name}.log")
    finish(start(name, token_folder, runs, *options), runs / f"{name}.log")
    assert (runs / f"{name}.log").read_text().count("resuming after step") == 2
    assert_same(whole, runs / name)


@pytest.fixture(scope="module")
def whole_in_fp32(token_folder, tmp_path_factory):
    runs = tmp_path_factory.mktemp("fp32")
    finish(start("whole", token_folder, runs, *IN_FP32), runs / "whole.log")
    return runs / "whole"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_killed_on_one_gpu_it_goes_on_with_two(whole_in_fp32, token_folder, mode):
    """The same tokens at every step, and the losses but for the order in which gradients are summed."""
    runs, name, options = whole_in_fp32.parent, f"onto-two-{mode}", [*IN_FP32, f"parallel={mode}"]
    one = start(name, token_folder, runs, *options)
    kill_after(one, runs / name / "checkpoints" / "step_50", runs / f"{name}.log")
    finish(start(name, token_folder, runs, *options, gpus=2), runs / f"{name}.log")
    expected, got = rows(whole_in_fp32), rows(runs / name)
    assert [row["step"] for row in got] == [row["step"] for row in expected]
    assert [row.get("tokens") for row in got] == [row.get("tokens") for row in expected]
    assert [row for row in got if row["step"] < 50] == [row for row in expected if row["step"] < 50]  # of the one GPU
    losses = [(a["loss"], b["loss"]) for a, b in zip(got, expected, strict=True) if "loss" in a]
    assert len(losses) >= 120
    assert [(a, b) for a, b in losses if a != pytest.approx(b, rel=1e-3)] == []
