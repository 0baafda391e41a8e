import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from glalm.data.shards import split_sha256
from glalm.evals.report import print_report

METRICS = [
    {"step": 0, "val_loss": 7.0, "val_perplexity": 2000.0},
    {"step": 10, "loss": 6.0, "tokens": 40_960, "tokens_per_second": 1000.0},
    {"step": 20, "loss": 5.0, "tokens": 81_920, "tokens_per_second": 9000.0, "val_perplexity": 11.0},
    {"step": 30, "loss": 4.0, "tokens": 122_880, "tokens_per_second": 5000.0},
]
PERPLEXITY = {"parameters": 1_234_567, "checkpoint": "step_30", "results": {"perplexity": 10.0}}


def ratio(value: float | None, low: float | None = None, high: float | None = None, documents: int = 4) -> dict:
    return {"ratio": value, "low": low, "high": high, "documents": documents}


EXTRAPOLATION = {
    "parameters": 1_234_567,
    "checkpoint": "step_30",
    "results": {
        "train_length": 256,
        "contexts": {
            "stateful": {
                "ratios": {
                    "2": ratio(0.95, 0.94, 0.96),
                    "4": ratio(0.9, 0.8, 1),
                    "8": ratio(0.91, 0.8, 1),
                    "10": ratio(1.125, 1.1, 1.15),
                    "16": ratio(1.5, documents=1),
                    "20": ratio(None, documents=0),
                }
            }
        },
        "stateful_over_reset": {"10": ratio(0.99), "16": ratio(0.875), "20": ratio(None, documents=0)},
    },
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/demo")
    for name in ("eval", "plots", "checkpoints/step_9", "checkpoints/step_10"):
        (folder / name).mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    (folder / "eval" / "perplexity.json").write_text(json.dumps(PERPLEXITY))
    (folder / "eval" / "extrapolation.json").write_text(json.dumps(EXTRAPOLATION))
    (folder / "plots" / "extrapolation.png").touch()
    return folder


def printed(folder: Path, width: int = 160) -> list[list[str]]:
    """The cells of each printed line."""
    console = Console(file=io.StringIO(), width=width)
    print_report(folder, console)
    lines = console.file.getvalue().splitlines()
    return [[cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")] for line in lines]


def test_the_table(run):
    lines = printed(run)
    for row in (
        ["parameters", "1,234,567", "eval/*.json"],
        ["tokens trained on", "122,880", "metrics.jsonl"],
        ["training tokens/s (median)", "5,000", "metrics.jsonl"],
        ["validation perplexity before", "2,000.0", "metrics.jsonl"],
        ["after step 30", "10.000", "eval/perplexity.json"],
        ["after / before", "0.005", "both"],
        ["perplexity at 2x / 1x", "0.950 (0.940-0.960)", "eval/extrapolation.json"],
        ["perplexity at 10x / 1x", "1.125 (1.100-1.150)", "eval/extrapolation.json"],
        ["perplexity at 16x / 1x", "1.500", "eval/extrapolation.json"],
        ["stateful / reset at 16x", "0.875", "eval/extrapolation.json"],
    ):
        assert row in lines
    assert not any("8x" in line[0] for line in lines)


def test_paths_are_whole_on_a_narrow_terminal(run):
    lines = [line[0] for line in printed(run, width=40)]
    names = "run.json metrics.jsonl checkpoints/step_9 checkpoints/step_10 eval/extrapolation.json eval/perplexity.json"
    expected = [f"{run}/{name}" for name in [*names.split(), "plots/extrapolation.png"]]
    assert lines[lines.index("written:") + 1 :] == expected


def test_what_is_missing_is_said_with_the_command_that_makes_it(run):
    for file in ("eval/perplexity.json", "eval/extrapolation.json", "metrics.jsonl"):
        (run / file).unlink()
    lines = printed(run)
    evaluate = "glalm eval name=demo 'evals=[perplexity]'"
    for row in (
        ["parameters", "missing", evaluate],
        ["tokens trained on", "missing", "glalm train name=demo"],
        ["validation perplexity before", "missing", "glalm train name=demo"],
        ["after training", "missing", evaluate],
        ["after / before", "missing", evaluate],
        ["perplexity at 10x / 1x", "missing", "glalm eval name=demo 'evals=[extrapolation]'"],
    ):
        assert row in lines


def test_ten_training_lengths_that_were_not_read_are_asked_for(run):
    short = {"contexts": {"stateful": {"ratios": {"2": ratio(0.9), "3": ratio(0.9)}}}, "train_length": 256}
    (run / "eval" / "extrapolation.json").write_text(json.dumps(EXTRAPOLATION | {"results": short}))
    command = "glalm eval name=demo 'evals=[extrapolation]' extrapolation.max_length=2560"
    assert ["perplexity at 10x / 1x", "missing", command] in printed(run)


def test_a_damaged_file_is_named(run):
    (run / "eval" / "perplexity.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval/perplexity\.json is damaged"):
        printed(run)


def test_a_torn_row_of_metrics_is_skipped(run):
    lines = printed(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\0\0\0\n{"step":')
    lines.insert(lines.index(["written:"]), ["2 unreadable lines of metrics.jsonl were skipped"])
    assert printed(run) == lines


def test_checkpoints_that_were_set_aside_are_listed(run):
    for name in ("step_10.damaged", "step_4.superseded", "step_4.superseded2", "step_best"):
        (run / "checkpoints" / name).mkdir()
    found = [line[0].rpartition("/")[2] for line in printed(run) if "/checkpoints/" in line[0]]
    aside = ["step_4.superseded", "step_4.superseded2", "step_9", "step_10", "step_10.damaged", "step_best"]
    assert found == aside


def write_result(run: Path, evaluator: str, **changes) -> None:
    content = {"perplexity": PERPLEXITY, "extrapolation": EXTRAPOLATION}[evaluator] | changes
    (run / "eval" / f"{evaluator}.json").write_text(json.dumps(content))


def test_numbers_of_other_text_name_it_and_are_divided_by_none_of_the_runs(run):
    foreign = {"own_text": False, "settings": {"data_path": "data/foreign", "data_sha256": "f", "seq_len": 256}}
    write_result(run, "perplexity", **foreign)
    write_result(run, "extrapolation", **foreign)
    lines = printed(run)
    assert ["after step 30, on foreign", "10.000", "eval/perplexity.json"] in lines
    i = lines.index(["after step 20, as training validated", "11.000", "metrics.jsonl, step 20"])
    assert lines[i + 1] == ["after / before", f"{11 / 2000:.3g}", "metrics.jsonl, step 20"]
    assert ["perplexity at 2x / 1x, on foreign", "0.950 (0.940-0.960)", "eval/extrapolation.json"] in lines


def test_the_perplexity_of_a_held_out_file_has_a_row(run):
    settings = {"data_path": "heldout.jsonl", "data_sha256": "f", "seq_len": 256, "split": "file"}
    other = {"evaluator": "perplexity", "results": {"perplexity": 12.5}, "own_text": False, "settings": settings}
    file = "perplexity-heldout.jsonl-ab.json"
    (run / "eval" / file).write_text(json.dumps(PERPLEXITY | other))
    lines = printed(run)
    assert ["perplexity after step 30, on heldout.jsonl", "12.500", f"eval/{file}"] in lines
    assert ["after step 30", "10.000", "eval/perplexity.json"] in lines


def test_a_perplexity_of_the_average_says_so_and_has_bits_per_byte(run):
    results = {"perplexity": 10.0, "bits_per_byte": 1.25}
    write_result(run, "perplexity", settings={"weights": "average"}, results=results)
    lines = printed(run)
    assert ["after step 30, average of the weights", "10.000", "eval/perplexity.json"] in lines
    assert ["bits per byte", "1.2500", "eval/perplexity.json"] in lines


def test_a_perplexity_of_more_windows_than_training_validates_on_is_not_divided(run):
    (run / "run.json").write_text(
        json.dumps(
            {
                "config": {
                    "data": {"path": "d", "seq_len": 8, "document_boundaries": "ignore"},
                    "train": {"eval_sequences": 4},
                }
            }
        )
    )
    manifest = {"tokenizer": {"fingerprint": "t"}, "splits": {"validation": {"sources": {}}}}
    (run / "data.json").write_text(json.dumps(manifest))
    settings = {
        "data_path": "d",
        "data_sha256": split_sha256(manifest, "validation"),
        "seq_len": 8,
        "document_boundaries": "ignore",
    }
    for windows, ratio, source in ((4, 10 / 2000, "both"), (5, 11 / 2000, "metrics.jsonl, step 20")):
        write_result(run, "perplexity", settings=settings, results={"perplexity": 10.0, "windows": windows})
        assert ["after / before", f"{ratio:.3g}", source] in printed(run)


def test_a_ratio_names_its_context(run):
    contexts = EXTRAPOLATION["results"]["contexts"]["stateful"]
    write_result(run, "extrapolation", results={"train_length": 256, "contexts": {"reset": contexts}})
    assert any(line[0] == "perplexity at 2x / 1x, reset" for line in printed(run))
    both = {"train_length": 256, "contexts": {"reset": {"ratios": {"2": ratio(1.5)}}, "stateful": contexts}}
    write_result(run, "extrapolation", results=both)
    assert ["perplexity at 2x / 1x", "0.950 (0.940-0.960)", "eval/extrapolation.json"] in printed(run)
