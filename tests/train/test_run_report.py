import subprocess
import time

import pytest
import torch

from glalm.model.decoder import CausalLM
from glalm.model.flops import forward_flops
from glalm.train import report
from glalm.train.environment import environment, git_state, peak_flops
from glalm.train.report import Meter


def test_speed_and_its_part_of_the_peak(run_config, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(report, "peak_flops", lambda device: 1e9)
    meter = Meter(run_config, torch.device("cpu"), world=2, step=10, tokens=100)

    def stream():
        for _ in range(4):
            now[0] += 0.25
            yield None

    for _ in meter.waiting(stream()):
        now[0] += 1.75
    row = meter.row(14)
    assert row["tokens"] == 100 + 4 * 4 * 16  # batch 4, length 16
    assert row["tokens_per_second"] == pytest.approx(4 * 4 * 16 / 8)
    assert row["tokens_per_second_per_gpu"] == pytest.approx(4 * 4 * 16 / 8 / 2)
    assert row["data_wait_seconds"] == pytest.approx(0.25)
    operations = 3 * forward_flops(CausalLM(run_config.model), 16)
    assert row["mfu"] == pytest.approx(4 * 4 * 16 / 8 / 2 * operations / 1e9)
    meter.restart(14)
    now[0] += 1
    assert meter.row(15)["tokens_per_second"] == pytest.approx(64) and meter.row(15)["data_wait_seconds"] == 0


@pytest.mark.parametrize(
    "name, tera",
    [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312)],
)
def test_peaks_by_name(name, tera):
    assert peak_flops(name) == tera * 1e12


def test_an_unknown_device_has_no_peak(run_config):
    assert peak_flops("NVIDIA L400") is None and peak_flops("x86_64") is None
    meter = Meter(run_config, torch.device("cpu"), world=1, step=0, tokens=0)
    assert meter.utilisation is None and meter.row(1)["mfu"] is None


def test_the_commit_and_whether_the_source_differs(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")

    def git(*args):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    assert git_state(package) is None  # inside a repository that does not hold it
    git("add", ".")
    git("commit", "-m", "one")
    assert git_state(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "elsewhere.txt").write_text("no part of the package")
    assert not git_state(package)["dirty"]
    (package / "__init__.py").write_text("1\n")
    assert git_state(package)["dirty"]


def test_versions():
    versions = environment()["versions"]
    assert versions["torch"] == torch.__version__ and {"glalm", "python", "transformers"} <= versions.keys()
