"""Run the comparison of training speeds at sizes for a CPU, and check its tables."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_lengths.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("bench_lengths")


def make_row(model: str, T: int, **measured) -> dict:
    row = {"model": model, "size": "340m", "batch": 65536 // T, "T": T}
    return row | (measured or {"step_ms": 327.68, "tokens_per_second": 200_000.0, "peak_memory_gib": 46.6})


def test_table_has_a_line_for_each_model(script, capsys):
    rows = [make_row("gla", 2048), make_row("fla:gla", 2048, tokens_per_second=147_100.0, peak_memory_gib=75.6)]
    script.print_table([*rows, make_row("gla", 8192, error="out of memory")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["| GLA | 200.0k (46.6) | failed |", "| GLA, fla | 147.1k (75.6) |  |"]


@pytest.mark.slow
def test_estimates_of_the_dry_run_are_beside_the_measurements(script, capsys):
    script.print_costs(
        [make_row("gla", 2048), make_row("fla:gla", 2048), make_row("gla", 8192, error="failed")], "H200"
    )
    [line] = capsys.readouterr().out.splitlines()[3:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["340m, 32 x 2,048", "GLA", "46.6"]
    assert abs(float(cells[3]) - 46.6) < 0.05 * 46.6  # as measured on an H200
    assert float(cells[6]) == pytest.approx(320.6, rel=0.01)  # likewise (docs/performance.md)
    assert cells[7] == f"{float(cells[6]) / 327.68 - 1:+.1%}"


def test_measurements_are_printed_as_the_dry_run_reads_them(script, capsys):
    rows = [make_row("gla", 8192, mfu=0.4412), make_row("gla", 2048, mfu=0.4444), make_row("fla:gla", 2048, mfu=0.3)]
    script.print_measurements([*rows, make_row("kda", 2048, error="failed")])
    line = '    "gla": [Measurement(374, 2048, 0.444), Measurement(374, 8192, 0.441)],'
    assert capsys.readouterr().out == f"\n{line}\n"


@pytest.mark.slow
def test_rows_are_measured_once(tmp_path):
    path = tmp_path / "rows.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--json",
        str(path),
        "--sizes",
        "tiny",
        "--models",
        "gla",
        "llama:attention",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*arguments: str) -> list[dict]:
        done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=540)
        assert done.returncode == 0, done.stderr
        return json.loads(path.read_text())["rows"]

    first = run("--lengths", "64", "--steps", "1", "--warmup", "1")
    assert [(row["model"], row["batch"], row["T"]) for row in first] == [("gla", 2, 64), ("llama:attention", 2, 64)]
    assert all(row["tokens_per_second"] == pytest.approx(128e3 / row["step_ms"]) for row in first)
    assert run("--lengths", "64", "--figure", str(tmp_path / "figure.png")) == first
    assert run("--lengths", "64") == first
    assert (tmp_path / "figure.png").exists()
