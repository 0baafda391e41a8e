"""scripts/ladder.py on a made-up language."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "ladder.py"


@pytest.fixture
def ladder(monkeypatch):
    """ladder(*arguments): its exit code."""
    spec = importlib.util.spec_from_file_location("ladder", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["ladder.py", *arguments])
        return module.main()

    return run


def test_two_mixers_make_a_table_and_two_plots(ladder, token_folder, tmp_path, capsys):
    tiny = ["model.vocab_size=320", "model.hidden_size=32", "model.num_hidden_layers=2", f"data.path={token_folder}"]
    tiny += ["data.seq_len=8", "train.steps=4", "train.eval_every=2", "optim.warmup_steps=1"]
    assert ladder("--folder", str(tmp_path / "out"), "gla", "mamba", *tiny) == 0
    table = json.loads((tmp_path / "out" / "ladder.json").read_text())["rows"]
    assert [row["mixer"] for row in table] == ["gla", "mamba"]
    assert all(1 < row["perplexity"] < 400 and 0 < row["10x / 1x"] < 100 for row in table)
    assert table[0]["parameters"] != table[1]["parameters"]
    for name in ("loss.png", "positions.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "one size, one token budget" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argument, message",
    [("glaa", "glaa is none of the presets: attention, deltanet"), ("train.stpes=3", "did you mean train.steps?")],
)
def test_what_is_wrong_is_named(ladder, argument, message, capsys):
    assert ladder(argument) == 2
    assert message in capsys.readouterr().err
