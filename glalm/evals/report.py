"""The table that sums up a run, from its JSON files alone."""

import math
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from glalm.data.files import printable
from glalm.evals.identity import is_of_average, text_name
from glalm.evals.result_files import (
    current_results,
    describe_validation,
    format_number,
    infer_tokens,
    is_own_text,
    main_context,
    median_training_speed,
    select_result,
    step_of,
)
from glalm.train.metrics import read_metrics

PLAIN = {"highlight": False, "markup": False, "soft_wrap": True}


class Row(NamedTuple):
    """A row of the table. value: None if it is missing. source: the file that it is from. command: what writes that."""

    quantity: str
    value: str | None
    source: str
    command: str


def print_report(folder: Path, console: Console) -> None:
    """Print what the run in `folder` reached, and the paths of everything it wrote.

    A missing value is shown as the command that computes it.

    Raises:
        ValueError: A file is damaged; the message names it.
    """
    where = f"name={folder.name}" + ("" if folder.parent == Path("runs") else f" runs_dir={folder.parent}")
    train_command = f"glalm train {where}"
    eval_command = f"glalm eval {where}"
    metrics, damaged = read_metrics(folder / "metrics.jsonl")
    results = current_results(folder)
    perplexity = select_result(results, "perplexity")
    extrapolation = select_result(results, "extrapolation")
    sections = [
        training_rows(metrics, perplexity or extrapolation, train_command, f"{eval_command} 'evals=[perplexity]'"),
        perplexity_rows(folder, metrics, perplexity, train_command, f"{eval_command} 'evals=[perplexity]'"),
        other_text_rows(results, perplexity),
        extrapolation_rows(extrapolation, f"{eval_command} 'evals=[extrapolation]'"),
    ]
    console.print(build_table(f"run {printable(folder.name)}", sections))
    console.print("10x: the bucket of positions ending at 10 training lengths, on long documents", style="dim", **PLAIN)
    if damaged:
        console.print(f"{len(damaged)} unreadable lines of metrics.jsonl were skipped", style="yellow", **PLAIN)
    console.print("written:", **PLAIN)
    outputs = [path for path in (folder / "run.json", folder / "metrics.jsonl") if path.is_file()]
    outputs += sorted(folder.glob("checkpoints/step_*"), key=lambda path: (len(path.name.split(".")[0]), path.name))
    for pattern in ("eval/[!.]*.json", "plots/**/[!.]*.png", "plots/**/[!.]*.svg"):
        outputs += sorted(folder.glob(pattern))
    for path in outputs:
        console.print(f"  {path}", **PLAIN)


def build_table(title: str, sections: list[list[Row]]) -> Table:
    """Return the table of the rows, with the command that computes it in place of a missing value's source."""
    table = Table(title=Text(title), title_justify="left")
    table.add_column("quantity", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("from", style="dim", overflow="fold")
    for section in sections:
        for row in section:
            cells = (row.quantity, row.value, row.source) if row.value else (row.quantity, "missing", row.command)
            # As Text, because the [...] of a command would be read as markup.
            table.add_row(*map(Text, cells), style=None if row.value else "yellow")
        table.add_section()
    return table


def training_rows(metrics: list[dict], record: dict | None, train_command: str, eval_command: str) -> list[Row]:
    speed = median_training_speed(metrics)
    tokens = max(infer_tokens(metrics), default=0)
    return [
        Row("parameters", record and f"{record['parameters']:,}", "eval/*.json", eval_command),
        Row("tokens trained on", tokens and f"{tokens:,}", "metrics.jsonl", train_command),
        Row("training tokens/s (median)", speed and f"{speed:,.0f}", "metrics.jsonl", train_command),
    ]


def perplexity_rows(
    folder: Path, metrics: list[dict], record: dict | None, train_command: str, eval_command: str
) -> list[Row]:
    """Return the validation perplexity before training, that of the evaluated checkpoint, and a ratio of equals.

    The ratio is of the evaluated perplexity if that is of the windows on which training validates. Otherwise it is of
    training's own validation at that step, or at its last one.
    """
    validations = {row["step"]: row["val_perplexity"] for row in metrics if "val_perplexity" in row}
    before = validations.get(0)
    file = record["file"] if record else "eval/perplexity.json"
    value = record and record["results"]["perplexity"]
    bits = record and record["results"].get("bits_per_byte")
    last, source = value, "both"
    own_rows = []
    if record and not is_of_validation(folder, record):
        step = step_of(record) if step_of(record) in validations else max(validations, default=0)
        last, source = validations.get(step), f"metrics.jsonl, step {step}"
        if last:
            own_rows = [
                Row(f"  after step {step}, as training validated", format_number(last, 3), source, train_command)
            ]
    ratio = f"{last / before:.3g}" if before and last else None
    return [
        Row("validation perplexity before", format_number(before, 1), "metrics.jsonl", train_command),
        Row(f"  after {describe_origin(record)}", format_number(value, 3), file, eval_command),
        *own_rows,
        Row("  after / before", ratio, source, eval_command),
        *([Row("  bits per byte", f"{bits:.4f}", file, eval_command)] if bits else []),
    ]


def other_text_rows(results: list[dict], main: dict | None) -> list[Row]:
    """Return the perplexities of text that the run was not trained on, such as text=FILE, but for the `main` result."""
    rows = []
    for record in results:
        if record["evaluator"] == "perplexity" and not is_own_text(record) and record is not main:
            value = format_number(record["results"]["perplexity"], 3)
            rows.append(Row(f"perplexity after {describe_origin(record)}", value, record["file"], ""))
    return rows


def is_of_validation(folder: Path, record: dict) -> bool:
    """Return whether an evaluated perplexity is of the same windows as the validations of the run in `folder`."""
    training = describe_validation(folder)["settings"]
    evaluated = record["settings"]
    names = ("data_sha256", "seq_len", "document_boundaries")
    has_all_windows = record["results"].get("windows", 0) <= training.get("eval_sequences", math.inf)
    return has_all_windows and all(training.get(name) == evaluated.get(name) for name in names)


def extrapolation_rows(record: dict | None, eval_command: str) -> list[Row]:
    """Return ratios of the perplexity at several training lengths to that at one, and the gain by keeping the state.

    The ratios are at 2, 4, 10 and the most training lengths that documents reach, with one standard error down and up.
    """
    if record is None:
        return [Row("perplexity at 10x / 1x", None, "eval/extrapolation.json", eval_command)]
    source = record["file"]
    results = record["results"]
    context = main_context(results)
    conditions = "" if context == "stateful" else f", {context}"
    if not is_own_text(record):
        conditions += f", on {text_name(record)}"
    ratios = format_ratios(results["contexts"][context]["ratios"])
    rows = []
    for n in sorted({2, 4, 10, *[*ratios][-1:]}):
        longer = f"{eval_command} extrapolation.max_length={n * results['train_length']}"
        rows.append(Row(f"perplexity at {n}x / 1x{conditions}", ratios.get(n), source, longer))
    for n, gain in [*format_ratios(results.get("stateful_over_reset", {})).items()][-1:]:
        rows.append(Row(f"stateful / reset at {n}x", gain.partition(" ")[0], source, eval_command))
    return rows


def describe_origin(record: dict | None) -> str:
    """Return the checkpoint of which a result is, and the text if it is not the run's own."""
    if record is None:
        return "training"
    checkpoint = (record["checkpoint"] or "training").replace("_", " ")
    if is_of_average(record):
        checkpoint += ", average of the weights"
    return checkpoint if is_own_text(record) else f"{checkpoint}, on {text_name(record)}"


def format_ratios(ratios: dict[str, dict]) -> dict[int, str]:
    """Return the ratios of at least one document, with one standard error down and up."""
    formatted = {}
    for n, ratio in ratios.items():
        if ratio["documents"]:
            band = f" ({ratio['low']:.3f}-{ratio['high']:.3f})" if ratio["low"] is not None else ""
            formatted[int(n)] = f"{ratio['ratio']:.3f}{band}"
    return formatted
