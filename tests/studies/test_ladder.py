"""`glalm ladder` on a made-up language."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from glalm.cli import compose_config
from glalm.commands import create_parser
from glalm.commands.studies import compare_models
from glalm.evals.options import EvalConfig, TrainingRun
from glalm.evals.plot import plot_extrapolation
from glalm.evals.result_files import read_json, write_json
from glalm.progress import ProgressBar
from glalm.studies import ladder, ladder_progress, ladder_results
from glalm.studies.ladder_arguments import parse_arguments
from glalm.studies.ladder_progress import RunStatus
from glalm.train.run_dir import identify_run, open_data
from glalm.train.run_lock import lock_run_dir

SCRIPT = Path(__file__).parents[2] / "scripts" / "ladder.py"
AVERAGE = """
import torch
from torch import nn

from glalm.model.mixers.base import Mixer


class CumulativeMean(Mixer):
    def __init__(self, config):
        super().__init__()
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, *, state=None, return_state=False, cu_seqlens=None, padding=None):
        counts = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.o_proj((x.float().cumsum(1) / counts).to(x.dtype)), None

    def flops(self, T):
        return 0
"""


@pytest.fixture
def run_ladder(monkeypatch):
    """run_ladder(*arguments) runs the command and returns its exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["ladder.py", *arguments])
        try:
            return compare_models()
        except SystemExit as end:
            return end.code

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


def parse_arguments_of(*arguments: str):
    parser = create_parser(compare_models)
    with patch("sys.argv", ["glalm ladder", *arguments]):
        return parse_arguments(parser)


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
    assert run_ladder("gla", *tiny, *budget, "model.num_heads=2") == 2  # another model than the run's
    assert "ConfigError: " in capfd.readouterr().err
    assert run_ladder("gla", "gla_12_segments", *tiny, *budget) == 0
    out = capfd.readouterr().out
    assert "2 runs, 0 to do" in out and "gla_12_segments" in out
    assert not [*(tmp_path / "out").glob("*.status.json")]

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
def test_a_mixer_of_the_users_code_takes_the_place_of_glas(run_ladder, tiny, tmp_path, monkeypatch):
    (tmp_path / "average.py").write_text(AVERAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    budget = ["train.steps=4", "train.eval_every=2", "optim.warmup_steps=1", "--eval", "evals=[perplexity]"]
    assert run_ladder("gla", "average:CumulativeMean", *tiny, *budget) == 0
    rows = {row["model"]: row for row in json.loads((tmp_path / "out" / "ladder.json").read_text())["rows"]}
    assert 1 < rows["average:CumulativeMean"]["perplexity"] < 400 and rows.keys() == {"gla", "average:CumulativeMean"}
    run = json.loads((tmp_path / "out" / "average.CumulativeMean-1" / "run.json").read_text())["config"]["model"]
    gla = json.loads((tmp_path / "out" / "gla-1" / "run.json").read_text())["config"]["model"]
    assert run == gla | {"mixer": "average:CumulativeMean"}


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


@pytest.mark.parametrize(
    "present, assumed, expected",
    [
        (0, {"assumed_gpu": "H200", "assumed_gpus": 8}, r"30\.0 h.* on 8 x H200;"),
        (4, {"assumed_gpu": "H200"}, r"240\.0 h.* on 1 x H200;"),
        (4, {"assumed_gpus": 8}, r"30\.0 h.* on 8 x NVIDIA L4;"),
        (4, {}, r"60\.0 h.* on 4 x NVIDIA L4;"),
        (0, {}, r"240\.0 h.* on this machine's CPU,"),
    ],
)
def test_the_time_is_that_of_the_assumed_gpus(monkeypatch, capsys, present, assumed, expected):
    """Ten runs of 24 hours are planned on a machine with `present` GPUs."""
    monkeypatch.setattr(ladder_results, "estimate_hours_and_memory", lambda config: (24.0, 0))
    monkeypatch.setattr("torch.cuda.device_count", lambda: present)
    monkeypatch.setattr("torch.cuda.is_available", lambda: present > 0)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA L4")
    arguments = [f"train.{name}={value}" for name, value in assumed.items()]
    config = compose_config(TrainingRun, "train", ["experiment=ladder_tiny", *arguments])
    runs = [planned_run("gla", None, config, [], [])] * 10
    ladder_results.print_cost(runs, runs)
    assert re.match(f"about {expected}", capsys.readouterr().out.splitlines()[-1])


def test_a_runs_log_has_what_the_run_prints(tmp_path, monkeypatch, capfd):
    with open(1, "w", closefd=False) as buffered:
        monkeypatch.setattr(sys, "stdout", buffered)
        print("before")
        with ladder.redirect_output(tmp_path / "gla-1.log"):
            print("during")
        print("after")
    assert (tmp_path / "gla-1.log").read_text() == "during\n"
    assert capfd.readouterr().out == "before\nafter\n"


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
    err = process.communicate(timeout=60)[1]
    assert "Stopping. Jobs that are saving: 1." in err
    assert err.endswith("Runs: 1 stopped. The same command resumes.\n")
    assert process.returncode == 1
    assert "run the same command again" in log.read_text()
    assert list((tmp_path / "out" / "gla-1" / "checkpoints").glob("step_*"))


def planned_run(model, lr, config, train_arguments, eval_arguments):
    eval_config = compose_config(EvalConfig, "eval", eval_arguments)
    return ladder.LadderRun(model, lr, config, train_arguments, eval_arguments, eval_config)


def complete_run(run, **records):
    """Write what a run has when it is complete: a result of each evaluator, and ladder.json with their identities."""
    for name, record in records.items():
        defaults = {"evaluator": name, "identity": name, "parameters": 5, "device": "cpu", "versions": {}}
        write_json(run.config.folder / "eval" / f"{name}.json", defaults | record)
    results = {name: record.get("identity", name) for name, record in records.items()}
    write_json(run.config.folder / "ladder.json", run.completion_record() | {"results": results})


def test_what_is_done_is_done_by_its_config(tmp_path):
    where = ["experiment=ladder_tiny", "name=gla-1", f"runs_dir={tmp_path}"]
    run = planned_run("gla", None, compose_config(TrainingRun, "train", where), where, [])
    assert not run.is_complete()
    complete_run(run, perplexity={"results": {"perplexity": 2.0}})
    assert run.is_complete()
    # Its result was removed, so that only evaluating again can tell it.
    (run.config.folder / "eval" / "perplexity.json").rename(tmp_path / "removed.json")
    assert not run.is_complete()
    (tmp_path / "removed.json").rename(run.config.folder / "eval" / "perplexity-beside.json")
    assert run.is_complete()
    # As by a change of configs/experiment/ladder_tiny.yaml.
    edited = compose_config(TrainingRun, "train", [*where, "train.steps=300"])
    assert not planned_run("gla", None, edited, where, []).is_complete()


def test_a_sliding_window_is_read_twice(tmp_path, monkeypatch):
    splits = {"validation": {"tokens": 300}, "test": {"tokens": 600}}
    monkeypatch.setattr(ladder, "read_manifest", lambda folder: {"splits": splits})
    config = compose_config(TrainingRun, "train", ["experiment=ladder_tiny"])
    for contexts, passes in (("stateful", 1), ("reset,stateful", 2), ("stateful,sliding_window", 3)):
        run = planned_run("gla", None, config, [], ["evals=[extrapolation]", f"extrapolation.contexts=[{contexts}]"])
        assert run.work == run.training_tokens + passes * 600 / 3


def test_means_over_seeds_are_of_nats(tmp_path):
    runs = []
    for seed, nats in ((1, 3.0), (2, 4.0)):
        where = ["experiment=ladder_tiny", f"name=gla-{seed}", f"runs_dir={tmp_path}", f"seed={seed}"]
        runs.append(run := planned_run("gla", None, compose_config(TrainingRun, "train", where), where, []))
        found = {"nats_per_token": nats, "perplexity": math.exp(nats)}
        context = {"ratios": {"2": {"ratio": math.exp(nats), "documents": 1}, "4": {"ratio": None, "documents": 0}}}
        contexts = {"contexts": {"stateful": context}}
        complete_run(run, perplexity={"results": found}, extrapolation={"results": contexts})
        steps = [*range(1, 2 * seed + 1), 240]
        rows = [{"step": i, "loss": 1.0, "tokens_per_second": 10.0 * seed + min(i, 3)} for i in steps]
        rows[-1]["tokens"] = 240 * 8 * 64  # The run had smaller batches than by its config, before it was resumed.
        (run.config.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = ladder_results.build_row(runs)
    assert row["perplexity"] == row["2x / 1x"] == pytest.approx(math.exp(3.5))
    # The speeds are 12 and 23, whichever run has more rows.
    assert (row["tokens/s"], row["tokens"]) == (17.5, 240 * 8 * 64)
    assert row["seeds"] == {"1": math.exp(3.0), "2": math.exp(4.0)}
    assert row["sd"] == pytest.approx((math.exp(4.0) - math.exp(3.0)) / math.sqrt(2))
    assert "4x / 1x" not in row


@pytest.mark.parametrize("contexts", [None, ["stateful"], ["reset", "stateful"]])
def test_runs_are_described_by_what_was_evaluated(contexts, tmp_path):
    place = ["name=gla-1", f"runs_dir={tmp_path}", "evals=[perplexity,extrapolation]"]
    run = planned_run("gla", None, compose_config(TrainingRun, "train", place[:2]), [], place)
    records = {"perplexity": {"results": {"nats_per_token": 3.0, "perplexity": math.exp(3)}}}
    if contexts is not None:
        by_context = {name: {"ratios": {"2": {"ratio": len(name), "documents": 1}}} for name in contexts}
        records["extrapolation"] = {"results": {"contexts": by_context}}
    complete_run(run, **records)
    line = ladder_results.describe_run(run)
    assert (line["perplexity"], line["tokens"]) == (math.exp(3), run.training_tokens)
    assert line.get("2x / 1x") == (None if contexts is None else len("stateful"))


@pytest.mark.parametrize("trained", [(1e-3,), (1e-3, 3e-3)])
def test_a_rate_is_the_best_once_all_of_its_model_are_complete(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ladder_results, "draw_figure", lambda draw, content, path: None)
    config = compose_config(TrainingRun, "train", ["experiment=ladder_tiny", f"runs_dir={tmp_path}"])
    planned = []
    for model, rate in (("gla", 1e-3), ("gla", 3e-3), ("attention", 1e-3)):
        name = f"{model}-{rate}"
        place = [f"name={name}", f"runs_dir={tmp_path}"]
        planned.append(run := planned_run(model, rate, replace(config, name=name), [], place))
        found = {"nats_per_token": 1.0, "perplexity": 1 / rate}
        contexts = {"contexts": {"stateful": {"ratios": {}}}}
        complete_run(run, perplexity={"results": found}, extrapolation={"results": contexts})
        write_json(
            run.config.folder / "run.json",
            {"identity": {"data fingerprint": "a", "data tokens": 10**12 + round(1 / rate)}},
        )
    args = SimpleNamespace(lrs=[1e-3, 3e-3], size="tiny", arguments=[], eval=[], at_once=1, folder=tmp_path)
    ladder_results.write_results(planned[: len(trained)], planned, args)
    table = json.loads((tmp_path / "ladder.json").read_text())
    assert [row["best"] for row in table["rows"]] == [False, True][: len(trained)]
    assert (table["runs"], table["complete"]) == (3, len(trained))
    printed = capsys.readouterr().out
    assert f"{len(trained)} of 3 runs are complete; none of attention." in printed
    # The set grew between the runs.
    differences = ["data tokens of training: 1000000001000 / 1000000000333"] if len(trained) > 1 else []
    assert table["differences"] == differences and all(difference in printed for difference in differences)
    assert "±" not in printed and re.search(r"\| seeds \|.*\n.*\n.*\| +1 \|", printed)


def test_the_table_is_of_what_the_ladder_evaluated(tmp_path, capsys):
    """Other evaluations of a run are not taken for the ladder's, and unlike numbers are not compared in silence."""
    arguments = ["name=gla-1", f"runs_dir={tmp_path}"]
    run = planned_run("gla", None, compose_config(TrainingRun, "train", arguments), [], arguments)
    settings = {"contexts": ["stateful"], "data_path": "demo", "data_sha256": "demo"}
    for name, own, changed in (
        ("extrapolation", True, {}),
        ("extrapolation-demo-average", True, {"weights": "average"}),
        ("extrapolation-demo-more", True, {"contexts": ["reset"]}),
        ("extrapolation-text", False, {"data_path": "held.txt", "split": "file"}),
    ):
        record = {"evaluator": "extrapolation", "checkpoint": "step_9", "own_text": own, "results": name}
        record |= {"settings": settings | changed, "identity": name}
        write_json(run.config.folder / "eval" / f"{name}.json", record)
        write_json(run.config.folder / "ladder.json", run.completion_record() | {"results": {"extrapolation": name}})
        assert run.results("extrapolation")["results"] == name and run.is_complete()
    assert run.results("perplexity") is None
    unlike = [
        read_json(run.config.folder / "eval" / f"{name}.json") for name in ("extrapolation", "extrapolation-demo-more")
    ]
    ladder_results.draw_figure(plot_extrapolation, unlike, tmp_path / "positions.png")
    assert "positions.png was not drawn: these results do not compare: contexts" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["glaa"], "glaa is no model of --size tiny; did you mean gla? presets: attention, deltanet"),
        (["nowhere:Mixer"], "model.mixer=nowhere:Mixer cannot be imported (No module named 'nowhere')"),
        (["--lrs", "1e-3,", "3e-3"], "write positive numbers, each once, with commas and without spaces"),
        (["--lrs", "1e-3,0.001"], "is no list of learning rates"),
        (["--at-once", "0"], "'0' is not a whole number of at least 1"),
        (["gla", "data.path=nowhere"], "data.path=nowhere: nowhere/manifest.json is missing"),
        (["gla", "data.path=nowhere", "--dry-run"], "data.path=nowhere: nowhere/manifest.json is missing"),
        (["gla", "--eval", "data_path=nowhere"], "--eval data_path=nowhere: nowhere/manifest.json is missing"),
        (["gla", "--eval", "evals=[extrapolation]"], "--eval evals=[extrapolation] lacks perplexity"),
        (["train.stpes=3"], "did you mean train.steps?"),
        (["--eval", "extrapolation.buckets=3"], "did you mean extrapolation.bucket?"),
        (["seed=3"], "seed=... is set for each run, by --seeds"),
        (["runs_dir=x"], "runs_dir=... is set for each run, by --folder"),
        (["--eval", "out=x"], "out=... is set for each run"),
        (["--lrs", "1e-3,3e-3", "optim.lr=1e-3"], "optim.lr=... is set for each run, by --lrs"),
        (["train.dry_run=true"], "train.dry_run=... is set for each run, by --dry-run"),
        (["gla", "attention", "gla"], "gla is named twice, but is one run of each seed and learning rate"),
        (["gla", "model=attention_tiny"], "model=... is set for each run, by NAME"),
        (["gla", "++model.mixer=attention"], "model.mixer=... is set for each run, by NAME"),
        (["experiment=ladder_small"], "experiment=... is set for each run, by --size"),
        (["resume=runs/other"], "resume=... is set for each run, by --folder"),
        (["hydra/launcher=proceses"], "did you mean processes?"),
        (
            ["hydra/launcher=processes", "--at-once", "2"],
            "--at-once is for runs on this machine",
        ),
        (["gla_12_segments"], "is not a multiple of data.seq_len=1536"),
    ],
)
def test_what_is_wrong_is_named(run_ladder, arguments, message, tmp_path, capsys):
    assert run_ladder(*arguments, "--folder", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert not [*tmp_path.glob("out/[!.]*")]  # There is the lock at most.


def test_the_vocabulary_is_checked_before_the_first_run(run_ladder, tiny, capsys):
    assert run_ladder("gla", *tiny, "model.vocab_size=100") == 2
    assert "more than model.vocab_size=100" in capsys.readouterr().err


def test_a_folder_of_other_runs_or_in_use_is_refused(run_ladder, tiny, tmp_path, capsys):
    budget = ["train.steps=4", "train.eval_every=2", "optim.warmup_steps=1"]
    where = ["experiment=ladder_tiny", "model=gla_tiny", "name=gla-1", f"runs_dir={tmp_path / 'out'}"]
    config = compose_config(TrainingRun, "train", [*where, *tiny[2:], *budget])
    training, _ = open_data(config)
    write_json(config.folder / "run.json", {"id": "0", "identity": identify_run(config, training.tokens)})
    (config.folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    (config.folder / "checkpoints" / "step_1").mkdir(parents=True)
    assert run_ladder("gla", *tiny, *budget, "train.steps=3", "--dry-run") == 2
    err = capsys.readouterr().err
    assert "gla-1 holds a run with another config:\n  train.steps: 4 -> 3\n" in err and "choose another --folder" in err
    # A complete run is compared with the others, so its data must be theirs.
    [run] = ladder.plan_runs(parse_arguments_of("gla", *tiny, *budget))
    complete_run(run, perplexity={"results": {"perplexity": 2.0}})
    (config.folder / "data.json").unlink(missing_ok=True)
    changed = identify_run(config, training.tokens) | {"data fingerprint": "0"}
    write_json(config.folder / "run.json", {"id": "0", "identity": changed})
    assert run_ladder("gla", *tiny, *budget, "--seeds", "2") == 2
    assert "gla-1 holds a run with another config:\n  data fingerprint: '0' -> " in capsys.readouterr().err
    with lock_run_dir(tmp_path / "out"):
        assert run_ladder("gla", *tiny, *budget) == 2
    assert re.search(r"out is in use by another run: .* choose another --folder", capsys.readouterr().err)


@pytest.fixture
def plan(tmp_path):
    """plan(name=state) returns runs of a plan in these states."""

    def make(**states: str | None) -> list[ladder.LadderRun]:
        config = compose_config(TrainingRun, "train", ["experiment=ladder_tiny", f"runs_dir={tmp_path}"])
        runs = []
        for name, state in states.items():
            run = planned_run("gla", None, replace(config, name=name), [], [f"name={name}", f"runs_dir={tmp_path}"])
            runs.append(run)
            if state == "complete":
                complete_run(run, perplexity={"results": {"perplexity": 3.0}})
            elif state is not None:
                RunStatus(state, "ConfigError: no data\nat all" if state == "failed" else "").write(run)
        return runs

    return make


def test_failures_are_shown_while_others_run(plan, capsys):
    runs = plan(a="complete", b="failed", c="training", d="evaluating")
    ended = threading.Event()
    ended.set()
    with ProgressBar() as bar:
        ladder_progress.watch_runs(runs, bar, ended)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:4] == [
        "1/4 a: perplexity 3.00",
        f"2/4 b: failed, see {runs[1].config.folder}.log",
        "  ConfigError: no data",
        "at all",
    ]
    assert lines[4].startswith("33% of the work; 1 training, 1 evaluating; about ")


def test_what_did_not_complete_is_counted_by_its_end(plan):
    runs = plan(a="complete", b="failed", c="training", d="stopped", e=None)
    failed = "b: ConfigError: no data"
    assert ladder_progress.summarize_end(runs, None) == [
        failed,
        "Runs: 2 stopped, 1 not started, 1 failed (b). The same command resumes.",
    ]
    [_, counts] = ladder_progress.summarize_end(runs, None, "still running as jobs")
    assert counts.startswith("Runs: 1 still running as jobs, 1 stopped, 1 not started, 1 failed (b).")
    # Without a stop, one that ended while it trained was killed.
    assert ladder_progress.summarize_end(runs, [None, "ConfigError: no data", "killed", "stopped", "no process"]) == [
        failed,
        "c: killed",
        "e: no process",
        "Runs: 1 stopped, 3 failed (b, c, e). The same command resumes.",
    ]
    assert ladder_progress.summarize_end(runs[:1], [None]) == []
