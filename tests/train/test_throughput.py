import copy
import subprocess
import time

import pytest
import torch

from glalm.model.decoder import model_cost
from glalm.train import throughput
from glalm.train.environment import describe_commit, describe_environment, peak_flops
from glalm.train.parallel import start_processes
from glalm.train.state import BatchPlan, plan_batches
from glalm.train.throughput import ThroughputMeter
from glalm.train.trainer import Trainer


def build_meter(config, world_size: int, step: int) -> ThroughputMeter:
    return ThroughputMeter(config, BatchPlan.from_config(config, world_size), torch.device("cpu"), step)


def test_speed_and_mfu(run_config, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(throughput, "peak_flops", lambda device: 1e9)
    meter = build_meter(run_config, world_size=2, step=10)

    def stream():
        for _ in range(4):
            now[0] += 0.25
            yield None

    for _ in meter.time_waiting(stream()):
        now[0] += 1.75
    row = meter.metrics(14)
    assert row["tokens_per_second"] == pytest.approx(4 * 4 * 16 / 8)  # 4 steps of 4 sequences of 16 tokens in 8 s
    assert row["tokens_per_second_per_gpu"] == pytest.approx(4 * 4 * 16 / 8 / 2)
    assert row["data_wait_seconds"] == pytest.approx(0.25)
    operations = 3 * model_cost(run_config.model, 16).forward
    assert row["mfu"] == pytest.approx(4 * 4 * 16 / 8 / 2 * operations / 1e9)
    meter.restart(14)
    now[0] += 1
    assert meter.metrics(15)["tokens_per_second"] == pytest.approx(64) and meter.metrics(15)["data_wait_seconds"] == 0


def test_tokens_continue_from_those_of_the_checkpoint(run_config):
    """If the batch size has changed since, a step adds the tokens of its own batch."""
    accelerator = start_processes(run_config)
    trainer = Trainer(run_config, plan_batches(run_config, 1), accelerator)
    trainer.state.step = 2
    trainer.state.tokens = 100
    ids = torch.ones(4, 16, dtype=torch.int64)
    for _ in range(4):
        trainer.step({"input_ids": ids, "labels": ids})
    assert (trainer.state.step, trainer.state.tokens) == (6, 100 + 4 * 4 * 16)


def test_state_dict_of_one_trainer_makes_another_equal(run_config, change):
    """Its next step is the same, with the moments, the guard and the random states."""
    accelerator = start_processes(run_config)
    plans = plan_batches(run_config, 1)
    one, other = (Trainer(change(run_config, seed=seed), plans, accelerator) for seed in (1, 2))
    ids = torch.arange(64).view(4, 16)
    batch = {"input_ids": ids, "labels": ids}
    one.step(batch)
    saved = copy.deepcopy(one.state.state_dict())
    expected = one.step(batch), torch.rand(3)
    other.state.load_state_dict(saved)
    found = other.step(batch), torch.rand(3)
    assert found[0].loss == expected[0].loss and torch.equal(found[1], expected[1])
    states = [trainer.state.state_dict() for trainer in (one, other)]
    assert states[0]["step"] == states[1]["step"] == 2 and states[0]["tokens"] == states[1]["tokens"] == 128
    for group in ("model", "training"):
        assert all(torch.equal(tensor, states[1][group][name]) for name, tensor in states[0][group].items())


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GH200 480GB", 989),
    ],
)
def test_peaks_by_name(name, tera):
    assert peak_flops(name) == tera * 1e12


def test_unknown_device_has_no_peak(run_config):
    assert peak_flops("NVIDIA L400") is None and peak_flops("x86_64") is None
    assert peak_flops("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None
    meter = build_meter(run_config, world_size=1, step=0)
    assert meter.mfu_per_speed is None and meter.metrics(1)["mfu"] is None


def test_commit_and_whether_the_source_differs_from_it(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")

    def git(*args):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    assert describe_commit(package) is None  # inside a repository that does not hold it
    git("add", ".")
    git("commit", "-m", "one")
    assert describe_commit(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "elsewhere.txt").write_text("no part of the package")
    assert not describe_commit(package)["dirty"]
    (package / "__init__.py").write_text("1\n")
    assert describe_commit(package)["dirty"]


def test_versions_and_device(monkeypatch):
    """The device is the one that is used. ACCELERATE_USE_CPU lets a run leave a GPU idle."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert describe_environment(torch.device("cpu"))["device"] != "NVIDIA H100"
    assert describe_environment(torch.device("cuda"))["device"] == "NVIDIA H100"
    versions = describe_environment(torch.device("cpu"))["versions"]
    assert versions["torch"] == torch.__version__ and {"glalm", "python", "transformers"} <= versions.keys()
