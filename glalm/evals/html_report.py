"""One self-contained HTML page that compares runs: what they are, how they were trained, what they reach.

It is made from the JSON files of their folders alone, by the template report.html.jinja. Figures are inside the page,
which loads nothing.
"""

import base64
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined

from glalm.config.strict import flatten_tree
from glalm.data.files import printable
from glalm.evals import plot
from glalm.evals.published import RECALL, RECALL_ROWS, UNSURE, ZERO_SHOT, paper_table, select_columns
from glalm.evals.result_files import infer_tokens, median_training_speed, read_json, select_scores
from glalm.train.metrics import read_metrics

ZERO_SHOT_EVALUATORS = ("paper_zero_shot", "zero_shot")


@dataclass
class Run:
    """A folder that training, evaluation or `glalm mqar` wrote, and its name on the page."""

    folder: Path
    name: str

    @cached_property
    def run_record(self) -> dict:
        return read_json(self.folder / "run.json") or {}

    @cached_property
    def metrics(self) -> list[dict]:
        return read_metrics(self.folder / "metrics.jsonl")[0]

    @cached_property
    def records(self) -> list[dict]:
        """What evaluators wrote, with the run's name for the model's. Hidden files are of unfinished evaluators."""
        paths = sorted(self.folder.glob("eval/[!.]*.json"))
        return [read_json(path) | {"model": self.name} for path in paths]

    def find_record(self, evaluator: str) -> dict | None:
        return next((record for record in self.records if record.get("evaluator") == evaluator), None)


@dataclass
class EmbeddedFigure:
    """A figure as a data URI. width: CSS pixels at which its type can still be read."""

    source: str
    width: int


def render_report(folders: Sequence[Path]) -> str:
    """Return the page of one run or several.

    Raises:
        ValueError: A folder holds nothing to report, or a file in it is damaged.
    """
    runs = [Run(Path(folder), name) for folder, name in zip(folders, distinct_names(folders), strict=True)]
    for run in runs:
        if not (run.run_record or run.metrics or run.records):
            raise ValueError(f"{run.folder} holds no run and no results: train or evaluate one there first")

    def find_records(evaluator: str) -> list[dict]:
        records = []
        for run in runs:
            records += [record for record in run.records if record.get("evaluator") == evaluator]
        return records

    environment = Environment(
        loader=PackageLoader("glalm.evals", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": format_number,
        "integer": "{:,}".format,
        "percent": "{:.0%}".format,
        "bytes": plot.format_bytes,
        "versions": format_versions,
    }
    return environment.get_template("report.html.jinja").render(
        title=", ".join(run.name for run in runs),
        records=find_records,
        embed=embed_figure,
        plot=plot,
        select_scores=select_scores,
        paper_cells=format_paper_cells,
        overview=overview_rows(runs),
        zero_shot=known_rows({run.name: paper_table(collect_tasks(run, *ZERO_SHOT_EVALUATORS)) for run in runs}),
        published_zero_shot=ZERO_SHOT,
        unlike_paper={run.name: describe_unlike_paper(run) for run in runs},
        recall=known_rows({run.name: select_columns(collect_tasks(run, "recall"), RECALL) for run in runs}),
        published_recall=RECALL_ROWS,
        runs=runs,
        **loss_figure(runs),
        **compare_configs(runs),
    )


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names as printable text, with as many of their parents as tell them apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    depth = 1
    while len({names[-depth:] for names in parts}) < len({*parts}):
        depth += 1
    return [printable("/".join(names[-depth:])) for names in parts]


# ----------------------------------------------------------------------------------------------------- the sections


def overview_rows(runs: list[Run]) -> dict[str, list]:
    """Return the cells of each run about which anything is known."""
    rows = {}
    for run in runs:
        perplexity = run.find_record("perplexity")
        extrapolation = run.find_record("extrapolation")
        record = perplexity or extrapolation or next(iter(run.records), {})
        speed = median_training_speed(run.metrics)
        model = run.run_record.get("config", {}).get("model", {})
        cells = [
            model.get("layers") or model.get("mixer") or record.get("model_config", {}).get("model_type"),
            plot.format_quantity(record["parameters"]) if "parameters" in record else None,
            plot.format_quantity(max(infer_tokens(run.metrics), default=0)) if run.metrics else None,
            f"{speed:,.0f}" if speed else None,
            describe_perplexity(run, perplexity),
            describe_furthest_ratio(extrapolation),
        ]
        if any(cell is not None for cell in cells):
            rows[run.name] = cells
    return rows


def describe_perplexity(run: Run, record: dict | None) -> str | None:
    """Return the evaluated perplexity, or else the last validation perplexity that training logged.

    The checkpoint's name is added if training has continued after it.
    """
    if record is None:
        values = [row["val_perplexity"] for row in run.metrics if "val_perplexity" in row]
        return format_number(values[-1]) if values else None
    is_older = run.metrics and record["checkpoint"] != f"step_{run.metrics[-1]['step']}"
    return format_number(record["results"]["perplexity"]) + (f" ({record['checkpoint']})" if is_older else "")


def describe_furthest_ratio(extrapolation: dict | None) -> str | None:
    context = extrapolation["results"]["contexts"].get("stateful") if extrapolation else None
    ratios = context["ratios"] if context else {}
    reached = [f"{ratio['ratio']:.3f} at {n}×" for n, ratio in ratios.items() if ratio["documents"]]
    return reached[-1] if reached else None


def loss_figure(runs: list[Run]) -> dict[str, Any]:
    """Return the figure of one run's losses, or of the validation losses of several."""
    files = {run.name: run.folder / "metrics.jsonl" for run in runs if any("val_loss" in row for row in run.metrics)}
    if len(files) == 1:
        [(name, file)] = files.items()
        return {"losses": embed_figure(plot.plot_training, file), "losses_caption": f"Losses of {name}."}
    figure = embed_figure(plot.plot_losses, files) if files else None
    return {"losses": figure, "losses_caption": "Validation losses."}


def collect_tasks(run: Run, *evaluators: str) -> dict[str, dict]:
    """Return the metrics of each task, of the first evaluator where several ran it."""
    tasks = {}
    for evaluator in reversed(evaluators):
        if record := run.find_record(evaluator):
            tasks |= record["results"]["tasks"]
    return tasks


def known_rows(rows: dict[str, dict]) -> dict[str, dict]:
    """Return the rows with at least one value."""
    return {name: row for name, row in rows.items() if any(value is not None for value in row.values())}


def format_paper_cells(name: str, columns: Iterable[str], values: Iterable[float | None]) -> list[str | None]:
    """Return a row of the paper's table. A number that copies of the paper differ on is marked with "?"."""
    cells = []
    for column, value in zip(columns, values, strict=True):
        number = format_number(value, 2 if "ppl" in column else 1)
        cells.append(f"{number}?" if (name, column) in UNSURE else number)
    return cells


def describe_unlike_paper(run: Run) -> str:
    """Return the settings by which a run's zero-shot scores measure something else than the paper's."""
    differences = {}
    for evaluator in ZERO_SHOT_EVALUATORS:
        settings = (run.find_record(evaluator) or {}).get("settings", {})
        for name in ("limit", "num_fewshot", "stateful"):
            if settings.get(name):
                differences[name] = f"harness.{name}={settings[name]}"
        if any(path.startswith("wikitext2/") for path in settings.get("data", {}).get("wikitext", ())):
            differences["data"] = "Wiki ppl of the tokenized text, whose rare words are <unk>"
    return ", ".join(differences.values())


def compare_configs(runs: list[Run]) -> dict[str, Any]:
    """Return the settings of training, {key: each run's value}, those that differ first, and their keys."""
    configs = {run.name: flatten_tree(run.run_record["config"]) for run in runs if "config" in run.run_record}
    keys = {}
    for config in configs.values():
        keys |= dict.fromkeys(config)
    keys = [key for key in keys if key not in ("name", "runs_dir") and not key.startswith("train_evals.")]
    different = {key for key in keys if len({repr(config.get(key)) for config in configs.values()}) > 1}
    settings = {}
    for key in sorted(keys, key=lambda key: key not in different):
        settings[key] = [str(config.get(key, "–")) for config in configs.values()]
    return {"settings": settings, "different": different, "trained_runs": [*configs]}


def format_versions(record: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items() if version)


def format_number(x: float | None, digits: int = 2) -> str | None:
    return None if x is None or not math.isfinite(x) else f"{x:,.{digits}f}"


def embed_figure(draw: Callable[[Any, Path], list[Path]], records: Any) -> EmbeddedFigure:
    """Return what `draw(records, path)` writes as SVG."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "figure.svg"
        draw(records, path)
        svg = path.read_bytes()
    width = ElementTree.fromstring(svg).get("width").removesuffix("pt")
    return EmbeddedFigure(f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}", round(float(width)))
