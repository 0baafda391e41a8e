"""`glalm ladder` on a made-up language."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glalm.cli import compose_config
from glalm.evals.options import TrainingRun
from glalm.evals.plot import plot_extrapolation
from glalm.evals.result_files import read_json, write_json
from glalm.studies import ladder, ladder_results

SCRIPT = Path(__file__).parents[2] / "scripts" / "ladder.py"


@pytest.fixture
def run_ladder(monkeypatch):
    """run_ladder(*arguments) runs the command and returns its exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["ladder.py", *arguments])
        return ladder.main("help")

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def tiny(token_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = ["model.vocab_size=320", "model.hidden_size=32", "model.num_hidden_layers=1", f"data.path={token_folder}"]
    return ["--folder", str(tmp_path / "out"), *model, "data.seq_len=8", "train.batch_size=12"]


@pytest.mark.slow
def test_what_is_missing_is_run_and_all_is_in_the_table(run_ladder, tiny, tmp_path, capfd):
    budget = ["train.steps=4", "train.eval_every=2", "optim.warmup_steps=1", "--eval", "extrapolation.documents=4"]
    assert run_ladder("gla", "gla_12_segments", "--at-once", "2", *tiny, *budget) == 0
    assert "2 runs, 2 to do" in capfd.readouterr().out
    assert run_ladder("gla", *tiny, *budget, "model.num_heads=2") == 1  # another model than the run's
    assert "gla-1: ConfigError: " in capfd.readouterr().err
    assert run_ladder("gla", "gla_12_segments", *tiny, *budget) == 0
    assert "gla_12_segments" in capfd.readouterr().out

    table = json.loads((tmp_path / "out" / "ladder.json").read_text())
    gla, segments = table["rows"]
    assert [row["model"] for row in table["rows"]] == ["gla", "gla_12_segments"]
    assert all(1 < row["perplexity"] < 400 and 0 < row["10x / 1x"] < 100 for row in table["rows"])
    assert gla["parameters"] == segments["parameters"]
    assert gla["tokens"] == segments["tokens"] == 4 * 12 * 8
    assert gla["seeds"]["1"] == pytest.approx(gla["perplexity"])
    for name in ("loss.png", "positions.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")

    run = json.loads((tmp_path / "out" / "gla_12_segments-1" / "run.json").read_text())["config"]
    assert (run["train"]["tbptt_length"], run["data"]["seq_len"]) == (8, 96)
    read = json.loads((tmp_path / "out" / "gla_12_segments-1" / "eval" / "extrapolation.json").read_text())
    assert read["results"]["train_length"] == 8  # the segments', so that all are read alike


@pytest.mark.slow
def test_rates_and_seeds_by_another_launcher(run_ladder, tiny, tmp_path, capfd):
    budget = ["train.steps=4", "train.eval_every=2", "optim.warmup_steps=1", "--eval", "extrapolation.documents=4"]
    sweep = ["--seeds", "2", "--lrs", "1e-3,1e-2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert run_ladder("gla", *tiny, *budget, *sweep) == 0
    assert "4 runs, 4 to do" in capfd.readouterr().out
    slow, fast = json.loads((tmp_path / "out" / "ladder.json").read_text())["rows"]
    assert (slow["lr"], fast["lr"]) == (1e-3, 1e-2)
    assert fast["best"] and not slow["best"] and fast["perplexity"] < slow["perplexity"]
    lines = [line.split(",") for line in (tmp_path / "out" / "ladder.csv").read_text().splitlines()]
    perplexities = {line[0]: float(line[lines[0].index("perplexity")]) for line in lines[1:]}
    assert perplexities["gla-lr-0.01-1"] == fast["seeds"]["1"] and len(perplexities) == 4
    for rate in (1e-3, 1e-2):
        config = json.loads((tmp_path / "out" / f"gla-lr-{rate:g}-1" / "run.json").read_text())["config"]["optim"]
        assert config["lr"] == rate and config["min_lr"] < rate


@pytest.mark.slow
def test_the_cost_of_all_runs_is_known_before(run_ladder, tmp_path, capsys):
    arguments = [
        "gla",
        "attention",
        "--seeds",
        "3",
        "--lrs",
        "1e-3,3e-3",
        "--dry-run",
        "--folder",
        str(tmp_path / "out"),
    ]
    assert run_ladder(*arguments, "train.assumed_gpu=H200") == 0
    out = capsys.readouterr().out
    tokens = 240 * 8 * 128
    assert f"12 runs, 12 to do with {12 * tokens:,} tokens" in out
    assert re.search(rf"\| gla +\| +6 \| +[\d,]+ \| +{tokens:,} \|", out)
    assert not (tmp_path / "out").exists()


def test_bands_are_of_seeds():
    def record(perplexity: float) -> dict:
        buckets = [
            {"end": 8, "documents": 3, "perplexity": perplexity},
            {"end": 16, "documents": 0, "perplexity": None},
        ]
        return {"results": {"contexts": {"stateful": {"buckets": buckets, "ratios": {}}}}}

    found = ladder_results.combine_seeds([record(math.exp(n)) for n in (2.0, 3.0, 4.0)], "gla")
    bucket, empty = found["results"]["contexts"]["stateful"]["buckets"]
    assert found["model"] == "gla" and empty["perplexity"] is None
    logs = [math.log(bucket[name]) for name in ("perplexity_low", "perplexity", "perplexity_high")]
    assert logs == pytest.approx([2.0, 3.0, 4.0])


@pytest.mark.slow
def test_stopped_runs_are_saved(tiny, tmp_path):
    command = [sys.executable, str(SCRIPT), "gla", *tiny, "train.steps=100000", "train.eval_every=100000"]
    log = tmp_path / "out" / "gla-1.log"
    process = subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out" / "gla-1" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        time.sleep(0.1)
    for _ in range(2):  # as GNU timeout does
        process.terminate()
        time.sleep(0.2)
    assert "gla-1: stopped" in process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "run the same command again" in log.read_text()
    assert list((tmp_path / "out" / "gla-1" / "checkpoints").glob("step_*"))


def test_what_is_done_is_done_by_its_config(tmp_path):
    where = ["experiment=ladder_tiny", "name=gla-1", f"runs_dir={tmp_path}"]
    run = ladder.LadderRun("gla", None, compose_config(TrainingRun, "train", where), where, [])
    assert not run.is_complete()
    run.config.folder.mkdir()
    write_json(run.config.folder / "ladder.json", run.completion_record())
    assert run.is_complete()
    # As by a change of configs/experiment/ladder_tiny.yaml.
    edited = compose_config(TrainingRun, "train", [*where, "train.steps=300"])
    assert not ladder.LadderRun("gla", None, edited, where, []).is_complete()


def test_means_over_seeds_are_of_nats(tmp_path):
    runs = []
    for seed, nats in ((1, 3.0), (2, 4.0)):
        where = ["experiment=ladder_tiny", f"name=gla-{seed}", f"runs_dir={tmp_path}", f"seed={seed}"]
        runs.append(run := ladder.LadderRun("gla", None, compose_config(TrainingRun, "train", where), where, []))
        found = {"nats_per_token": nats, "perplexity": math.exp(nats)}
        write_json(run.config.folder / "eval" / "perplexity.json", {"parameters": 5, "results": found})
        context = {"ratios": {"2": {"ratio": math.exp(nats), "documents": 1}, "4": {"ratio": None, "documents": 0}}}
        found = {"contexts": {"stateful": context}}
        write_json(run.config.folder / "eval" / "extrapolation.json", {"results": found})
        rows = [{"step": i, "loss": 1.0, "tokens_per_second": 10.0 * seed + i} for i in (1, 2, 3)]
        (run.config.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = ladder_results.build_row(runs)
    assert row["perplexity"] == row["2x / 1x"] == pytest.approx(math.exp(3.5))
    assert (row["tokens/s"], row["tokens"]) == (17.0, 240 * 8 * 128)
    assert row["seeds"] == {"1": math.exp(3.0), "2": math.exp(4.0)}
    assert row["sd"] == pytest.approx((math.exp(4.0) - math.exp(3.0)) / math.sqrt(2))
    assert "4x / 1x" not in row


def test_the_table_is_of_what_the_ladder_evaluated(tmp_path, capsys):
    """Other evaluations of a run are not taken for the ladder's, and unlike numbers are not compared in silence."""
    arguments = ["name=gla-1", f"runs_dir={tmp_path}", "extrapolation.contexts=[stateful]"]
    run = ladder.LadderRun("gla", None, compose_config(TrainingRun, "train", arguments[:2]), [], arguments)
    for name, own, contexts in (
        ("asked", True, ["stateful"]),
        ("other", False, ["stateful"]),
        ("more", True, ["reset"]),
    ):
        settings = {"contexts": contexts, "data_path": name, "data_sha256": name}
        record = {"evaluator": "extrapolation", "own_text": own, "settings": settings, "results": name}
        write_json(run.config.folder / "eval" / f"{name}.json", record)
    assert run.results("extrapolation")["results"] == "asked"
    foreign = ladder.LadderRun("gla", None, run.config, [], [*arguments, "data_path=other"])
    assert foreign.results("extrapolation")["results"] == "other"
    unlike = [read_json(run.config.folder / "eval" / f"{name}.json") for name in ("asked", "more")]
    ladder_results.draw_figure(plot_extrapolation, unlike, tmp_path / "positions.png")
    assert "positions.png was not drawn: these results do not compare: contexts" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["glaa"], "glaa is none of the presets: attention, deltanet"),
        (["train.stpes=3"], "did you mean train.steps?"),
        (["--eval", "extrapolation.buckets=3"], "did you mean extrapolation.bucket?"),
        (["seed=3"], "seed=... is set for each run, by --seeds"),
        (["runs_dir=x"], "runs_dir=... is set for each run, by --folder"),
        (["--eval", "out=x"], "out=... is set for each run"),
        (["--lrs", "1e-3,3e-3", "optim.lr=1e-3"], "optim.lr=... is set for each run, by --lrs"),
        (["train.dry_run=true"], "train.dry_run=... is set for each run, by --dry-run"),
        (["hydra/launcher=proceses"], "did you mean processes?"),
        (
            ["hydra/launcher=processes", "--at-once", "2"],
            "--at-once is for runs on this machine",
        ),
        (["gla_12_segments"], "is not a multiple of data.seq_len=1536"),
    ],
)
def test_what_is_wrong_is_named(run_ladder, arguments, message, capsys):
    assert run_ladder(*arguments) == 2
    assert message in capsys.readouterr().err
