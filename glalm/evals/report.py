"""The table that sums up a run, from its JSON files alone."""

from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from glalm.data.files import printable
from glalm.evals.result_files import infer_tokens, median_training_speed, read_json
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
    eval_command = f"glalm eval {where} evals="
    metrics, skipped = read_metrics(folder / "metrics.jsonl")
    perplexity = read_json(folder / "eval" / "perplexity.json")
    extrapolation = read_json(folder / "eval" / "extrapolation.json")
    table = Table(title=Text(f"run {printable(folder.name)}"), title_justify="left")
    table.add_column("quantity", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("from", style="dim", overflow="fold")
    for section in (
        training_rows(metrics, perplexity or extrapolation, train_command, f"{eval_command}[perplexity]"),
        perplexity_rows(metrics, perplexity, train_command, f"{eval_command}[perplexity]"),
        extrapolation_rows(extrapolation, f"{eval_command}[extrapolation]"),
    ):
        for row in section:
            cells = (row.quantity, row.value, row.source) if row.value else (row.quantity, "missing", row.command)
            # As Text, because the [...] of a command would be read as markup.
            table.add_row(*map(Text, cells), style=None if row.value else "yellow")
        table.add_section()
    console.print(table)
    console.print("10x: the bucket of positions ending at 10 training lengths, on long documents", style="dim", **PLAIN)
    if skipped:
        console.print(f"{skipped} unreadable lines of metrics.jsonl were skipped", style="yellow", **PLAIN)
    console.print("written:", **PLAIN)
    for path in list_outputs(folder):
        console.print(f"  {path}", **PLAIN)


def training_rows(metrics: list[dict], record: dict | None, train_command: str, eval_command: str) -> list[Row]:
    speed = median_training_speed(metrics)
    tokens = max(infer_tokens(metrics), default=0)
    return [
        Row("parameters", record and f"{record['parameters']:,}", "eval/*.json", eval_command),
        Row("tokens trained on", tokens and f"{tokens:,}", "metrics.jsonl", train_command),
        Row("training tokens/s (median)", speed and f"{speed:,.0f}", "metrics.jsonl", train_command),
    ]


def perplexity_rows(metrics: list[dict], record: dict | None, train_command: str, eval_command: str) -> list[Row]:
    """Return the validation perplexity before training, of the run's first validation, and after it, of the split."""
    before = next((row["val_perplexity"] for row in metrics if row["step"] == 0 and "val_perplexity" in row), None)
    after = record and record["results"]["perplexity"]
    checkpoint = record["checkpoint"].replace("_", " ") if record else "training"
    ratio = f"{after / before:.3g}" if before and after else None
    return [
        Row("validation perplexity before", before and f"{before:,.1f}", "metrics.jsonl", train_command),
        Row(f"  after {checkpoint}", after and f"{after:,.3f}", "eval/perplexity.json", eval_command),
        Row("  after / before", ratio, "both", eval_command),
    ]


def extrapolation_rows(record: dict | None, eval_command: str) -> list[Row]:
    """Return ratios of the perplexity at several training lengths to that at one, and the gain by keeping the state.

    The ratios are at 2, 4, 10 and the most training lengths that documents reach, with one standard error down and up.
    """
    source = "eval/extrapolation.json"
    if record is None:
        return [Row("perplexity at 10x / 1x", None, source, eval_command)]
    results = record["results"]
    ratios = format_ratios(next(iter(results["contexts"].values()))["ratios"])
    rows = []
    for n in sorted({2, 4, 10, *[*ratios][-1:]}):
        longer = f"{eval_command} extrapolation.max_length={n * results['train_length']}"
        rows.append(Row(f"perplexity at {n}x / 1x", ratios.get(n), source, longer))
    for n, gain in [*format_ratios(results.get("stateful_over_reset", {})).items()][-1:]:
        rows.append(Row(f"stateful / reset at {n}x", gain.partition(" ")[0], source, eval_command))
    return rows


def format_ratios(ratios: dict[str, dict]) -> dict[int, str]:
    """Return the ratios of at least one document, with one standard error down and up."""
    formatted = {}
    for n, ratio in ratios.items():
        if ratio["documents"]:
            band = f" ({ratio['low']:.3f}-{ratio['high']:.3f})" if ratio["low"] is not None else ""
            formatted[int(n)] = f"{ratio['ratio']:.3f}{band}"
    return formatted


def list_outputs(folder: Path) -> list[Path]:
    """Return the files of a run, and the folders of its checkpoints, in the order in which they are written."""
    paths = [path for path in (folder / "run.json", folder / "metrics.jsonl") if path.is_file()]
    paths += sorted(folder.glob("checkpoints/step_*"), key=lambda path: (len(path.name.split(".")[0]), path.name))
    for pattern in ("eval/[!.]*.json", "plots/[!.]*.png", "plots/[!.]*.svg"):
        paths += sorted(folder.glob(pattern))
    return paths
