import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from glalm.commands.results import report_runs
from glalm.evals.html_report import distinct_names, render_report
from glalm.evals.plot import plot_losses
from glalm.evals.published import PAPER, RECALL, RECALL_ROWS, ZERO_SHOT

ROOT = Path(__file__).parents[2]
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Its tables as lists of rows, its images, and whether every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.images, self.links, self.marked, self._open = [], [], [], [], []
        self.text = ""
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [v for k, v in attrs.items() if k in ("src", "href") and not v.startswith("data:")]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "img":
            self.images.append(attrs)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
            self.marked += [attrs.get("class")]
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(row for table in self.tables for row in table if row[0] == first)


def bucket(end: int, perplexity: float | None) -> dict:
    low, high = (None, None) if perplexity is None else (perplexity - 1, perplexity + 1)
    filled = {"documents": 3, "tokens": 384} if perplexity else {"documents": 0, "tokens": 0}
    return {
        "start": end - 128,
        "end": end,
        "perplexity": perplexity,
        "perplexity_low": low,
        "perplexity_high": high,
        **filled,
    }


def ratio(value: float | None) -> dict:
    return {"ratio": value, "low": value, "high": value, "documents": 3 if value else 0}


EXTRAPOLATION = {
    "train_length": 128,
    "contexts": {
        "stateful": {
            "buckets": [bucket(128, 20.0), bucket(256, 18.0), bucket(384, None)],
            "ratios": {"2": ratio(0.9), "3": ratio(None)},
        }
    },
}
METRICS = [
    {"step": 0, "val_loss": 7.0, "val_perplexity": 1096.0},
    {"step": 10, "loss": 6.0, "tokens": 40_960, "tokens_per_second": 1000.0},
    {"step": 20, "loss": 5.0, "tokens": 81_920, "tokens_per_second": 3000.0, "val_loss": 3.0, "val_perplexity": 20.1},
]


def write(folder: Path, evaluator: str, results, file: str | None = None, **more) -> None:
    path = folder / "eval" / f"{file or evaluator}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {
        "checkpoint": "step_20",
        "parameters": 1_234_567,
        "versions": {"torch": "2.13"},
        "checksum": "c0ffee" * 10,
        "device": "a GPU",
    }
    path.write_text(json.dumps({"evaluator": evaluator, "results": results, "seconds": 12.3, **known, **more}))


def make_run(folder: Path, lr: float = 1e-3) -> Path:
    folder.mkdir(parents=True)
    model = {"mixer": "gla", "layers": None}
    config = {"name": folder.name, "model": model, "optim": {"lr": lr, "name": "<adamw>"}}
    (folder / "run.json").write_text(json.dumps({"config": config, "versions": {"torch": "2.11"}, "git": None}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    write(folder, "perplexity", {"perplexity": 19.5})
    write(folder, "extrapolation", EXTRAPOLATION)
    (folder / "eval" / ".needle.parts.json").write_text("{}")  # of one that was interrupted
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "runs" / "demo")


def test_perplexities_of_other_text_have_a_table(tmp_path):
    run = make_run(tmp_path / "mine")
    settings = {"data_path": "heldout.jsonl", "data_sha256": "f", "seq_len": 128, "split": "file"}
    results = {"perplexity": 24.5, "tokens": 1234}
    write(run, "perplexity", results, "perplexity-heldout.jsonl-ab", own_text=False, settings=settings)
    tables = Page(render_report([run])).tables
    assert tables[1] == [
        ["run", "text", "perplexity", "tokens"], ["mine", "heldout.jsonl, windows of 128 tokens", "24.50", "1234"]
    ]  # fmt: skip


def test_one_run(run):
    found = Page(render_report([run]))
    assert found.row("demo")[1:] == ["gla", "1.23M", "81.9K", "2,000", "19.50", "0.900 at 2×"]
    assert found.row("0-128") == ["0-128", "20.000", "19.000 to 21.000", "3", "384"]
    assert found.row("256-384") == ["256-384", "–", "–", "0", "0"]  # reported, though empty
    assert found.row("optim.lr") == ["optim.lr", "0.001"]
    assert found.row("optim.name")[1] == "<adamw>"  # escaped
    assert found.row("demo: extrapolation")[1:] == ["a GPU", "torch 2.13", "step_20 c0ffeec0ffee", "12 s"]
    assert len(found.images) == 3


def test_what_an_older_checkpoint_reached_is_said_to_be_its(run):
    write(run, "perplexity", {"perplexity": 19.5}, checkpoint="step_10")
    assert Page(render_report([run])).row("demo")[5] == "19.50 (step_10)"
    (run / "eval" / "perplexity.json").unlink()
    assert Page(render_report([run])).row("demo")[5] == "20.10"  # training's own


def test_far_over_near_is_of_the_carried_state(run):
    reset = EXTRAPOLATION | {"contexts": {"reset": EXTRAPOLATION["contexts"]["stateful"]}}
    write(run, "extrapolation", reset)
    assert Page(render_report([run])).row("demo")[6] == "–"


def test_gains_of_the_carried_state_are_drawn_of_models_that_have_them(run):
    other = make_run(run.parent / "other")
    caption = "Loss with the state reset every training length"
    assert not any(image["alt"].startswith(caption) for image in Page(render_report([run, other])).images)
    gain = {"start": 128, "end": 256, "nats_per_token": 0.5, "standard_error": 0.1, "documents": 3}
    write(run, "extrapolation", EXTRAPOLATION | {"reset_minus_stateful": [gain]})
    assert sum(image["alt"].startswith(caption) for image in Page(render_report([run, other])).images) == 1


def test_type_in_wide_figures_can_be_read_on_a_phone(run):
    runs = [run, *(make_run(run.parent / f"run-{i}") for i in range(6))]
    narrow, wide = (
        [int(re.search(r"min-width: (\d+)px", image["style"])[1]) for image in Page(render_report(some)).images]
        for some in ([run], runs)
    )
    assert narrow == [324] * 3  # all of it on a screen of 360
    assert min(wide) > 360  # beside them the legend


def test_nothing_is_fetched(run):
    text = render_report([run])
    found = Page(text)
    assert found.links == []
    assert not re.search(r"https?://", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    for image in found.images:
        svg = base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,"))
        assert ElementTree.fromstring(svg).tag.endswith("svg") and image["alt"]


def test_runs_are_compared(run):
    other = make_run(run.parent / "other", lr=2e-3)
    found = Page(render_report([run, other]))
    assert found.row("optim.lr") == ["optim.lr", "0.001", "0.002"]
    assert found.marked.count("differs") == 1
    assert found.row("other")[1] == "gla"
    assert "demo, other" in found.text


def test_zero_shot_stands_beside_the_published_rows(run):
    values = dict(zip(PAPER, (30.5, 40.25, 0.31, 0.65, 0.345, 0.5, 0.45, 0.235), strict=True))
    tasks = {}
    for label, (task, metric) in PAPER.items():
        tasks.setdefault(task, {"samples": 100})[metric] = values[label]
    tasks["piqa"]["acc_stderr"] = 0.011
    write(run, "paper_zero_shot", {"tasks": tasks | {"copa": {"acc": 0.7}}, "missing": {"sciq": "no data"}})
    found = Page(render_report([run]))
    [table] = [t for t in found.tables if "Wiki ppl" in t[0]]
    mean = (31 + 65 + 34.5 + 50 + 45 + 23.5) / 6
    assert table[1] == ["demo", "30.50", "40.25", "31.0", "65.0", "34.5", "50.0", "45.0", "23.5", f"{mean:.1f}"]
    assert ["GLA 340M", "28.65", "43.35", "30.3", "64.8", "34.5", "51.4", "45.1", "22.7", "41.5"] in table
    assert next(row for row in table if row[0] == "Mamba 1.3B")[5] == "40.1?"
    assert found.row("copa") == ["copa", "acc", "0.7000", "–", "–"]
    assert found.row("piqa") == ["piqa", "acc", "0.6500", "0.0110", "100"]
    assert found.row("sciq")[1] == "no data"


def test_scores_of_other_settings_than_the_papers_say_so(run):
    tasks = {"wikitext": {"word_perplexity": 9.0}}
    plain = {"limit": None, "num_fewshot": None, "stateful": False, "data": {"wikitext": "hub"}}
    write(run, "paper_zero_shot", {"tasks": tasks, "missing": {}}, settings=plain)
    assert "unlike the paper" not in Page(render_report([run])).text
    other = {
        "limit": 100,
        "num_fewshot": None,
        "stateful": True,
        "data": {"wikitext": {"wikitext2/test.txt": "c0ffee"}},
    }
    write(run, "paper_zero_shot", {"tasks": tasks, "missing": {}}, settings=other)
    said = "demo, unlike the paper: harness.limit=100, harness.stateful=True, Wiki ppl of the tokenized text"
    assert said in Page(render_report([run])).text


def test_scores_of_two_checkpoints_or_of_other_options_are_no_row_together(run):
    settings = {"limit": None, "num_fewshot": None, "stateful": False}
    write(run, "paper_zero_shot", {"tasks": {"piqa": {"acc": 0.6}}}, checkpoint="step_10", settings=settings)
    write(run, "zero_shot", {"tasks": {"winogrande": {"acc": 0.5}}}, settings=settings | {"limit": 100})
    found = Page(render_report([run]))
    [table] = [t for t in found.tables if "Wiki ppl" in t[0]]
    assert table[1] == ["demo (step_10)", "–", "–", "–", "60.0", "–", "–", "–", "–", "–"]
    assert table[2] == ["demo (step_20, limit=100)", "–", "–", "–", "–", "–", "50.0", "–", "–", "–"]
    assert "demo (step_20, limit=100), unlike the paper: harness.limit=100" in found.text
    write(run, "paper_zero_shot", {"tasks": {"piqa": {"acc": 0.6}}}, settings=settings)
    write(run, "zero_shot", {"tasks": {"winogrande": {"acc": 0.5}}}, settings=settings)
    [table] = [t for t in Page(render_report([run])).tables if "Wiki ppl" in t[0]]
    assert table[1] == ["demo", "–", "–", "–", "60.0", "–", "50.0", "–", "–", "–"]


def test_numbers_that_do_not_compare_are_in_figures_of_their_own_that_say_why(run):
    other = make_run(run.parent / "other")
    mine = {"data_path": "data/mine", "data_sha256": "aa", "split": "test", "text": "documents"}
    for folder, settings in ((run, mine), (other, mine | {"data_path": "data/foreign", "data_sha256": "bb"})):
        write(folder, "extrapolation", EXTRAPOLATION, settings=settings)
        write(folder, "perplexity", {"perplexity": 19.5}, settings=settings, own_text=folder == run)
    found = Page(render_report([run, other]))
    captions = [image["alt"] for image in found.images]
    assert len(captions) == 5
    for text in ("On mine.", "On foreign."):
        assert sum(text in caption for caption in captions) == 2
    assert found.row("other")[5] == "19.50 on foreign"
    assert "The validation perplexities do not compare: data: mine / foreign." in found.text
    assert "The far / near do not compare: data: mine / foreign." in found.text
    write(other, "extrapolation", EXTRAPOLATION, settings=mine)
    assert len(Page(render_report([run, other])).images) == 3


def test_losses_on_other_validation_text_are_in_figures_of_their_own(run):
    other = make_run(run.parent / "other")
    for folder in (run, other):
        record = json.loads((folder / "run.json").read_text())
        data = {"path": f"data/{folder.name}", "seq_len": 8, "document_boundaries": "ignore"}
        record["config"] |= {"data": data, "train": {"eval_sequences": 4}}
        (folder / "run.json").write_text(json.dumps(record))
        manifest = {"tokenizer": {"fingerprint": folder.name}, "splits": {"validation": {"sources": {}}}}
        (folder / "data.json").write_text(json.dumps(manifest))
    captions = [image["alt"] for image in Page(render_report([run, other])).images]
    assert captions[:2] == ["Validation losses. On demo.", "Validation losses. On other."]
    with pytest.raises(ValueError, match="these results do not compare: data: demo / other"):
        plot_losses({folder.name: folder / "metrics.jsonl" for folder in (run, other)}, run / "loss.png")


def test_a_part_of_the_tasks_leaves_the_rest_empty(run):
    write(run, "zero_shot", {"tasks": {"piqa": {"acc": 0.6}}, "missing": {}})
    [table] = [t for t in Page(render_report([run])).tables if "Wiki ppl" in t[0]]
    assert table[1] == ["demo", "–", "–", "–", "60.0", "–", "–", "–", "–", "–"]


def test_recall_decoding_and_samples(run):
    write(run, "recall", {"tasks": {task: {metric: 0.25} for task, metric in RECALL.values()}, "missing": {}})
    cells = [
        {"length": n, "depth": d, "token_accuracy": d, "exact_match": 0.0, "ranked_first": 0.5, "mean_rank": 2.5}
        for n in (512, 1024)
        for d in (0.0, 1.0)
    ]
    write(run, "needle", {"cells": cells, "chance": 0.1})
    rows = [{"length": n, "batch_size": 4, "tokens_per_second": 1e4 / n, "state_bytes": 4096 * n} for n in (16, 64)]
    write(run, "decode_speed", {"lengths": rows})
    write(run, "generate", [{"prompt": "def ", "continuation": "f(x): <b>"}])
    point = {"mixer": "gla", "length": 64, "pairs": 4, "width": 64, "accuracy": 0.75}
    write(run, "mqar", point, file="gla_64x4_d64_lr0.01")
    found = Page(render_report([run]))
    assert found.row("demo")[1:]
    [recall] = [t for t in found.tables if "SWDE" in t[0]]
    assert recall[1] == ["demo", "25.0", "25.0", "25.0"]
    assert len(recall) == 2 + len(RECALL_ROWS)
    assert found.row("512") == ["512", "0%", "0%", "0%", "50%", "2.50"]
    assert ["demo", "64", "4", "156", "64 KiB"] in [row for table in found.tables for row in table]
    assert "f(x): <b>" in found.text
    assert "accuracy by width" in found.text and len(found.images) == 6


def test_a_sweep_alone_is_a_page(tmp_path):
    point = {"mixer": "gla", "length": 64, "pairs": 4, "width": 64, "accuracy": 0.75}
    write(tmp_path / "mqar", "mqar", point, file="gla_64x4_d64_lr0.01")
    assert len(Page(render_report([tmp_path / "mqar"])).images) == 1


def test_folders_of_one_name_are_told_apart(tmp_path):
    assert distinct_names([tmp_path / "a" / "demo", tmp_path / "b" / "demo"]) == ["a/demo", "b/demo"]
    assert distinct_names([tmp_path / "a" / "demo"]) == ["demo"]


def test_the_folder_of_the_sweep_itself_is_left_out(tmp_path, monkeypatch, capsys):
    runs = [make_run(tmp_path / f"mine-lr-{lr}", lr) for lr in (0.001, 0.003)]
    sweep = tmp_path / "mine-sweep"
    sweep.mkdir()
    (sweep / "multirun.yaml").touch()
    monkeypatch.setattr(sys, "argv", ["report", *map(str, [*runs, sweep])])
    assert report_runs() == 0 and (tmp_path / "report.html").is_file()
    monkeypatch.setattr(sys, "argv", ["report", str(sweep)])
    assert report_runs() == 1 and f"{sweep} holds no run and no results" in capsys.readouterr().err


def test_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match="holds no run and no results"):
        render_report([tmp_path])
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=f"is no run, but has 2 runs inside of it: report on {tmp_path / 'a'}"):
        render_report([tmp_path])


def test_the_published_rows_add_up():
    for name, row in ZERO_SHOT.items():
        if name != "Mamba 1.3B":  # which copies differ on
            assert sum(row[2:8]) / 6 == pytest.approx(row[8], abs=0.06), name
    assert {*RECALL_ROWS} == {*ZERO_SHOT}


def test_the_command_writes_the_page(run):
    def report(*args: object) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "scripts/report.py"), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True)

    done = report(run)
    assert done.returncode == 0, done.stderr
    assert f"wrote {run / 'report.html'}" in done.stdout and "validation perplexity" in done.stdout
    Page((run / "report.html").read_text())
    bad = report(run.parent / "none")
    assert bad.returncode == 1 and "holds no run" in bad.stderr + bad.stdout and "Traceback" not in bad.stderr
