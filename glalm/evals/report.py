"""The closing table of a run, from its JSON files alone."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from glalm.evals.result_files import read_json, read_metrics, tokens_of, training_speed

Row = tuple[str, str | None, str, str]  # what, its value or None when it is missing, its file, the command to make it


def report(folder: Path, console: Console) -> None:
    """Prints what the run in `folder` reached and the paths of everything it wrote.

    What is missing is said, with the command that makes it. Raises ValueError naming a file that is damaged.
    """
    where = f"name={folder.name}" + ("" if folder.parent == Path("runs") else f" runs_dir={folder.parent}")
    train, evaluate = f"python train.py {where}", f"python eval.py {where} evals="
    metrics = read_metrics(folder / "metrics.jsonl")
    perplexity = read_json(folder / "eval" / "perplexity.json")
    extrapolation = read_json(folder / "eval" / "extrapolation.json")
    table = Table(title=Text(f"run {folder.name}"), title_justify="left")
    table.add_column("quantity", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("from", style="dim", overflow="fold")
    for section in (
        training_rows(metrics, perplexity or extrapolation, train, f"{evaluate}[perplexity]"),
        perplexity_rows(metrics, perplexity, train, f"{evaluate}[perplexity]"),
        extrapolation_rows(extrapolation, f"{evaluate}[extrapolation]"),
    ):
        for quantity, value, source, command in section:
            cells = (quantity, value, source) if value else (quantity, "missing", command)
            table.add_row(*map(Text, cells), style=None if value else "yellow")  # Text: a command's [...] is no markup
        table.add_section()
    console.print(table)
    console.print("10x: the bucket of positions ending at 10 training lengths, on long documents", style="dim", **PLAIN)
    console.print("written:", **PLAIN)
    for path in written(folder):
        console.print(f"  {path}", **PLAIN)


PLAIN = {"highlight": False, "markup": False, "soft_wrap": True}


def training_rows(metrics: list[dict], result: dict | None, train: str, evaluate: str) -> list[Row]:
    speed = training_speed(metrics)
    tokens = max(tokens_of(metrics), default=0)
    return [
        ("parameters", result and f"{result['parameters']:,}", "eval/*.json", evaluate),
        ("tokens trained on", tokens and f"{tokens:,}", "metrics.jsonl", train),
        ("training tokens/s (median)", speed and f"{speed:,.0f}", "metrics.jsonl", train),
    ]


def perplexity_rows(metrics: list[dict], result: dict | None, train: str, evaluate: str) -> list[Row]:
    """Before training from the run's own first validation, of its first windows; after it of the whole split."""
    before = next((r["val_perplexity"] for r in metrics if r["step"] == 0 and "val_perplexity" in r), None)
    after = result and result["results"]["perplexity"]
    step = result["checkpoint"].replace("_", " ") if result else "training"
    return [
        ("validation perplexity before", before and f"{before:,.1f}", "metrics.jsonl", train),
        (f"  after {step}", after and f"{after:,.3f}", "eval/perplexity.json", evaluate),
        ("  after / before", before and after and f"{after / before:.3g}", "both", evaluate),
    ]


def extrapolation_rows(result: dict | None, evaluate: str) -> list[Row]:
    """Perplexity at 2, 4, 10 and the most training lengths that documents reach over that at one, with one standard
    error down and up; and what carrying the state gains at the most, against resetting it every training length.
    """
    source = "eval/extrapolation.json"
    if result is None:
        return [("perplexity at 10x / 1x", None, source, evaluate)]
    results, train_length = result["results"], result["results"]["train_length"]
    ratios = reached(next(iter(results["contexts"].values()))["ratios"])
    rows = []
    for n in sorted({2, 4, 10, *map(int, [*ratios][-1:])}):
        value = _with_band(**ratios[str(n)]) if str(n) in ratios else None
        longer = f"{evaluate} extrapolation.max_length={n * train_length}"
        rows.append((f"perplexity at {n}x / 1x", value, source, longer))
    for n, gained in [*reached(results.get("stateful_over_reset", {})).items()][-1:]:
        rows.append((f"state carried / reset at {n}x", f"{gained['ratio']:.3f}", source, evaluate))
    return rows


def reached(ratios: dict[str, dict]) -> dict[str, dict]:
    """Those of at least one document."""
    return {n: r for n, r in ratios.items() if r["documents"]}


def written(folder: Path) -> list[Path]:
    """The files of a run and the folders of its checkpoints, in the order in which they are made."""
    steps = sorted(folder.glob("checkpoints/step_*"), key=lambda p: int(p.name.removeprefix("step_")))
    fixed = [p for p in (folder / "run.json", folder / "metrics.jsonl") if p.is_file()]
    kinds = ("eval/[!.]*.json", "plots/[!.]*.png", "plots/[!.]*.svg")
    return [*fixed, *steps, *(p for kind in kinds for p in sorted(folder.glob(kind)))]


def _with_band(ratio: float, low: float | None, high: float | None, documents: int) -> str:
    return f"{ratio:.3f}" + (f" ({low:.3f}-{high:.3f})" if low is not None else "")
