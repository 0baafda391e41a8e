"""The wheel has everything that the commands need: the package, configs and templates."""

import json
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIZES = ["model.hidden_size=32", "model.num_hidden_layers=2", "model.num_heads=2", "data.seq_len=64"]
STEPS = ["train.steps=4", "train.batch_size=2", "optim.warmup_steps=1"]


def test_every_folder_of_the_package_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "glalm").rglob("*.py")}
    expected = {folder.as_posix().replace("/", ".") for folder in folders} | {"glalm.configs"}
    assert set(settings["packages"]) == expected


@pytest.mark.slow
def test_the_installed_commands_train_from_an_empty_folder(installed, tmp_path):
    """Prepare, train with a config of the user's own, evaluate, report and export, all from the wheel."""
    assert "site-packages/glalm" in installed(tmp_path, "python", "-c", "import glalm; print(glalm.__file__)")
    assert "report" in installed(tmp_path, "glalm", "--help")
    documents = [{"text": f"Document {n} is about the number {n * n}. " * 9} for n in range(300)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "mine.yaml").write_text("vocab_size: 300\nmixer: retention\n")
    installed(tmp_path, "glalm", "prepare", "--out", "data/mine", "--vocab-size", "300", "corpus.jsonl")
    own = ["--config-dir", "mine", "model=mine", "data=local", "data.path=data/mine"]
    installed(tmp_path, "glalm", "train", "name=first", *own, *SIZES, *STEPS)
    assert (tmp_path / "runs" / "first" / "checkpoints" / "step_4").is_dir()
    installed(tmp_path, "glalm", "eval", "name=first", "evals=[perplexity]")
    assert "retention" in (tmp_path / "runs" / "first" / "run.json").read_text()
    installed(tmp_path, "glalm", "report", "runs/first")
    installed(tmp_path, "glalm", "export", "runs/first", "--out", "exported")
    assert (tmp_path / "exported" / "model.safetensors").is_file()
