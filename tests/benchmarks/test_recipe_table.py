import dataclasses
import json
import math
from pathlib import Path

import pytest

from glalm.cli import compose_config
from glalm.config.run import run_identity
from glalm.evals.options import TrainingRun

STEPS = ["train.steps=3", "optim.warmup_steps=1"]


@pytest.fixture(scope="module")
def script(load_benchmark):
    return load_benchmark("recipe_table")


@pytest.fixture
def write_run(tmp_path):
    """Return a function that writes the folder of a run of three steps, with one evaluation, and returns it."""

    def write(name: str, bits: float, *overrides: str, speed: int = 1000, **evaluation) -> Path:
        config = compose_config(TrainingRun, "train", [f"name={name}", *STEPS, *overrides])
        folder = tmp_path / name
        (folder / "eval").mkdir(parents=True, exist_ok=True)
        record = {"config": dataclasses.asdict(config), "identity": run_identity(config)}
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "tokens_per_second": speed}) + "\n")
        settings = {
            "tokenizer": "a",
            "data_sha256": "x",
            "seq_len": 256,
            "weights": evaluation.get("weights", "current"),
        }
        settings |= {key: value for key, value in evaluation.items() if key in ("tokenizer", "data_sha256")}
        result = {
            "run": name,
            "evaluator": "perplexity",
            "checkpoint": evaluation.get("checkpoint", "step_3"),
            "checksum": "",
            "settings": settings,
            "results": {"bits_per_byte": bits, "bytes": evaluation.get("bytes", 10_000)},
        }
        text = evaluation.get("data_path", "")
        settings |= {"data_path": text}
        (folder / "eval" / f"perplexity-{text}-{settings['weights']}.json").write_text(json.dumps(result))
        return folder

    return write


def table(script, *runs: Path) -> list:
    return script.build_rows([score for run in runs for score in script.read_scores(run)])


def test_differences_are_to_the_mean_of_the_recipe_with_pooled_noise(script, write_run, monkeypatch, capsys):
    runs = [
        write_run("recipe-seed-1", 1.00),
        write_run("recipe-seed-2", 1.02, "seed=2", speed=3000),
        write_run("lower", 0.95, "optim.lr=2e-3"),
        write_run("lower-2", 0.99, "optim.lr=2e-3", "seed=2"),
        write_run("changed", 1.11, "model.mixer=retention", "optim.weight_decay=0.5"),
    ]
    (recipe, lower, changed), noise = table(script, *runs)
    assert noise == pytest.approx(math.sqrt((0.02**2 / 2 + 0.04**2 / 2) / 2))
    assert (recipe.bits_per_byte, recipe.seeds, recipe.difference, recipe.changes) == (pytest.approx(1.01), 2, 0.0, "")
    assert recipe.tokens_per_second == 2000
    assert recipe.minutes == pytest.approx(3 * 16 * 256 / 2000 / 60)
    assert (lower.seeds, lower.difference, lower.changes) == (2, pytest.approx(-0.04), "optim.lr=0.002")
    assert lower.error == pytest.approx(noise)  # of the means of two and two runs
    assert (changed.seeds, changed.difference) == (1, pytest.approx(0.10))
    assert changed.error == pytest.approx(noise * math.sqrt(1.5))
    assert changed.changes == "model.mixer=retention, optim.weight_decay=0.5"
    monkeypatch.setattr("sys.argv", ["recipe_table.py", *map(str, runs)])
    script.main()
    printed = capsys.readouterr().out
    assert "| recipe-seed-1 |  | 2 | 1.0100 |  | 2k | 0.1 |" in printed
    assert "| lower | optim.lr=0.002 | 2 | 0.9700 | -0.0400 ± 0.0224 (-4.0%) | 1k | 0.2 |" in printed
    assert "varies by 0.0224 with its seed" in printed


def test_average_of_the_weights_is_a_row(script, write_run):
    recipe = write_run("recipe", 1.0)
    run = write_run("ema", 1.0, "train.ema_decay=0.9")
    write_run("ema", 0.9, "train.ema_decay=0.9", weights="average")
    rows, noise = table(script, recipe, run)
    assert [(row.name, row.bits_per_byte) for row in rows[1:]] == [("ema", 1.0), ("ema, average", 0.9)]
    assert rows[2].changes == "train.ema_decay=0.9, weights=average"
    assert noise is None and rows[1].error is None


def test_many_changes_are_counted(script):
    assert script.describe_changes({"same": 0}, {"a": 1, "b": 2, "c": 3, "d": 4, "same": 0}) == "a=1, b=2, c=3, 1 more"
    data = {"data fingerprint": "f", "data tokens": 5}
    assert script.describe_changes({"data fingerprint": "e", "data tokens": 4}, {**data, "a": 1}) == "other data, a=1"
    # Text that was added to a set leaves its fingerprint as it is.
    assert script.describe_changes({**data, "data tokens": 4}, data) == "other data"


def test_scores_of_different_texts_are_refused(script, write_run):
    recipe = write_run("recipe", 1.0)
    other_text = write_run("other", 1.0, "optim.lr=1e-3", data_sha256="y")
    with pytest.raises(ValueError, match="recipe and other do not compare: data"):
        table(script, recipe, other_text)
    # Another tokenizer makes another set of the same text, and cuts its last window elsewhere.
    cut = write_run("cut", 1.1, "optim.lr=1e-3", tokenizer="b", data_sha256="y", bytes=9_950)
    assert len(table(script, recipe, cut)[0]) == 2
    short = write_run("short", 1.1, "optim.lr=1e-3", tokenizer="b", data_sha256="y", bytes=9_000)
    with pytest.raises(ValueError, match="recipe and short were evaluated on different texts, of 10,000 and 9,000"):
        table(script, recipe, short)


def test_one_of_several_texts_is_chosen(script, write_run):
    recipe = write_run("recipe", 1.0, data_path="heldout")
    write_run("recipe", 2.0, data_path="demo", data_sha256="y")
    with pytest.raises(
        ValueError, match=r"several perplexities: .*perplexity-demo-.*demo.*perplexity-heldout-.* --text"
    ):
        script.read_scores(recipe)
    assert [[s.bits_per_byte for s in script.read_scores(recipe, text)] for text in ("demo", "heldout")] == [
        [2.0],
        [1.0],
    ]
    with pytest.raises(ValueError, match="has no perplexity of its last step, 3 on other"):
        script.read_scores(recipe, "other")
    with pytest.raises(ValueError, match="no bits per byte, because the tokenizer"):
        script.read_scores(write_run("without", None))


def test_unfinished_or_equal_runs_are_refused(script, write_run, tmp_path):
    recipe = write_run("recipe", 1.0)
    with pytest.raises(ValueError, match="recipe and twin differ in nothing"):
        table(script, recipe, write_run("twin", 1.0))
    with pytest.raises(ValueError, match=r"has no perplexity of its last step, 3\. To train .* glalm train resume="):
        table(script, recipe, write_run("cut", 1.0, "seed=2", checkpoint="step_2"))
    with pytest.raises(ValueError, match="is not the folder of a run"):
        table(script, tmp_path)
