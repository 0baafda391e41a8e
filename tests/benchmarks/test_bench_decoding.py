import argparse
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from glalm.model import loss
from glalm.model.config import ModelConfig

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_decoding.py"


@pytest.mark.slow
def test_every_model_gets_its_rows(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--device", "cpu", "--models", "glalm", "llama"]
    command += ["--presets", "gla", "attention", "--batches", "1", "2", "--prompts", "20", "--new", "4"]
    command += ["--read", "30", "--out", str(tmp_path)]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "decoding.json").read_text())
    rows = {(r["model"], r["batch"]): r for r in found["rows"]}
    assert set(rows) == {(model, B) for model in ("glalm", "glalm attention", "llama") for B in (1, 2)}
    assert all(r["ms"] > 0 for r in rows.values())
    assert ("prefill_tokens_per_second" in rows["glalm", 1]) and ("prefill_tokens_per_second" not in rows["glalm", 2])
    # 4 layers of width 128. GLA: 4 heads of 16 x 32 float32; Llama: keys and values of 24 tokens in bf16; our attention
    # has the int64 positions of these tokens and the next one as well.
    assert rows["glalm", 1]["state_mib"] * 2**20 == 4 * 4 * 16 * 32 * 4
    assert rows["llama", 1]["state_mib"] * 2**20 == 4 * 2 * 128 * 2 * 24
    assert rows["glalm attention", 2]["state_mib"] * 2**20 == 4 * (2 * 128 * 2 * 24 + 25 * 8)
    assert (tmp_path / "decoding.png").stat().st_size > 1000


def test_training_forward_computes_no_logits(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    bench = runpy.run_path(str(SCRIPT))
    runner = bench["glalm"](ModelConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2), "cpu")
    # A hook on the head would make the loss call it.
    monkeypatch.setattr(loss, "at_least_float32", lambda *_: pytest.fail("logits were computed"))
    assert bench["training_forward"](runner, argparse.Namespace(size="tiny", device="cpu")) > 0
