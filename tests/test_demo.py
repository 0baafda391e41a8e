"""The commands of `make demo` at their real size, but for half of its steps, in a folder of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_demo_learns_and_reads_beyond_its_training_length(tmp_path):
    data_path, run = tmp_path / "demo_data", tmp_path / "runs" / "demo"
    run_command("scripts/prepare_data.py", "--out", str(data_path), "stdlib")
    run_command("train.py", f"data.path={data_path}", f"runs_dir={tmp_path / 'runs'}", "train.steps=200")
    run_command("eval.py", f"runs_dir={tmp_path / 'runs'}")
    report = run_command("scripts/report.py", str(run))

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    perplexity = json.loads((run / "eval" / "perplexity.json").read_text())["results"]["perplexity"]
    assert losses[-1] < 0.6 * losses[0] and perplexity < 60  # an untrained model of this vocabulary is at 2,000
    assert "10x" in report and (run / "plots" / "extrapolation.png").is_file() and (run / "report.html").is_file()
