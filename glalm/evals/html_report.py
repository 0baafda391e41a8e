"""One self-contained HTML page that compares runs: what they are, how they were trained, what they reach.

It is made from the JSON files of their folders alone. Figures are inside the page, which loads nothing.
"""

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined

from glalm.config.strict import flatten_tree
from glalm.evals import plot
from glalm.evals.published import RECALL, RECALL_ROWS, UNSURE, ZERO_SHOT, paper_table, select_columns
from glalm.evals.result_files import infer_tokens, median_training_speed, read_json, select_scores
from glalm.train.metrics import read_metrics

DASH = "–"
ZERO_SHOT_EVALUATORS = ("paper_zero_shot", "zero_shot")


@dataclass
class Run:
    """A folder that train.py, eval.py or scripts/mqar.py wrote, and its name on the page."""

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
        """What evaluators wrote. Hidden files are of unfinished ones."""
        return [read_json(path) for path in sorted(self.folder.glob("eval/[!.]*.json"))]

    def find_record(self, evaluator: str) -> dict | None:
        """Return an evaluator's record, with the run's name for the model's."""
        record = next((record for record in self.records if record.get("evaluator") == evaluator), None)
        return record and record | {"model": self.name}


@dataclass
class Table:
    """A table of the page. A cell of None is shown as a dash.

    Attributes:
        kind: The CSS class, "numbers" or "text".
        row_classes: {a row's first cell: its CSS class}
    """

    header: list[str]
    rows: list[list]
    kind: str = "numbers"
    row_classes: dict[str, str] = field(default_factory=dict)


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
    environment = Environment(
        loader=PackageLoader("glalm.evals", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        title=", ".join(run.name for run in runs),
        dash=DASH,
        overview=overview_table(runs),
        **training_figure(runs),
        **zero_shot_tables(runs),
        **extrapolation_figures(runs),
        **recall_figures(runs),
        **decoding_figures(runs),
        samples=find_records("generate", runs),
        recipe=recipe_table(runs),
        provenance=provenance_table(runs),
    )


def find_records(evaluator: str, runs: list[Run]) -> list[dict]:
    """Return an evaluator's records of the runs that have one."""
    return [record for run in runs if (record := run.find_record(evaluator))]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, with as many of their parents as tell them apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    depth = 1
    while len({names[-depth:] for names in parts}) < len({*parts}):
        depth += 1
    return ["/".join(names[-depth:]) for names in parts]


# ----------------------------------------------------------------------------------------------------- the overview


def overview_table(runs: list[Run]) -> Table | None:
    rows = []
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
            rows.append([run.name, *cells])
    header = ["run", "mixer", "parameters", "tokens", "tokens/s", "validation perplexity", "perplexity far / near"]
    return Table(header, rows) if rows else None


def describe_perplexity(run: Run, record: dict | None) -> str | None:
    """Return the perplexity of the validation split, or else the last one of training.

    The checkpoint is named where training has gone on from it.
    """
    if record is None:
        return format_number(
            next((row["val_perplexity"] for row in reversed(run.metrics) if "val_perplexity" in row), None)
        )
    is_older = run.metrics and record["checkpoint"] != f"step_{run.metrics[-1]['step']}"
    checkpoint = f" ({record['checkpoint']})" if is_older else ""
    return f"{format_number(record['results']['perplexity'])}{checkpoint}"


def describe_furthest_ratio(extrapolation: dict | None) -> str | None:
    context = extrapolation["results"]["contexts"].get("stateful") if extrapolation else None
    ratios = context["ratios"] if context else {}
    reached = [f"{ratio['ratio']:.3f} at {n}×" for n, ratio in ratios.items() if ratio["documents"]]
    return reached[-1] if reached else None


# ----------------------------------------------------------------------------------------------------- the sections


def training_figure(runs: list[Run]) -> dict[str, Any]:
    files = {run.name: run.folder / "metrics.jsonl" for run in runs if any("val_loss" in row for row in run.metrics)}
    if not files:
        return {"training": None}
    if len(files) > 1:
        return {"training": embed_figure(plot.plot_losses, files), "training_caption": "Validation losses."}
    [(name, file)] = files.items()
    return {"training": embed_figure(plot.plot_training, file), "training_caption": f"Losses of {name}."}


def zero_shot_tables(runs: list[Run]) -> dict[str, Any]:
    rows = {run.name: paper_table(collect_tasks(run, *ZERO_SHOT_EVALUATORS)) for run in runs}
    records = []
    for evaluator in ZERO_SHOT_EVALUATORS:
        records += find_records(evaluator, runs)
    differences = {run.name: describe_unlike_paper(run) for run in runs}
    return {
        "zero_shot": compare_with_published(rows, ZERO_SHOT),
        "unlike_paper": {name: difference for name, difference in differences.items() if difference},
        "task_tables": [(record["model"], task_table(record["results"])) for record in records],
    }


def collect_tasks(run: Run, *evaluators: str) -> dict[str, dict]:
    """Return the metrics of each task, of the first evaluator where several ran it."""
    tasks = {}
    for evaluator in reversed(evaluators):
        for record in find_records(evaluator, [run]):
            tasks |= record["results"]["tasks"]
    return tasks


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


def task_table(results: dict) -> Table:
    """Return every score of every task."""
    rows = []
    for task, metrics in results["tasks"].items():
        for name, value in select_scores(metrics).items():
            error = format_number(metrics.get(f"{name}_stderr"), 4)
            rows.append([task, name, format_number(value, 4), error, metrics.get("samples", DASH)])
    rows += [[task, reason, None, None, None] for task, reason in results.get("missing", {}).items()]
    return Table(["task", "metric", "value", "standard error", "questions"], rows)


def compare_with_published(ours: dict[str, dict], published: dict[str, tuple]) -> Table | None:
    """Return a table of our rows, {run: {column: value}}, above the paper's. None: all our values are missing."""
    ours = {name: row for name, row in ours.items() if any(value is not None for value in row.values())}
    if not ours:
        return None
    columns = [*next(iter(ours.values()))]
    rows = []
    for name, values in [*((name, row.values()) for name, row in ours.items()), *published.items()]:
        cells = []
        for column, value in zip(columns, values, strict=True):
            number = format_number(value, 2 if "ppl" in column else 1)
            cells.append(f"{number}?" if (name, column) in UNSURE else number)
        rows.append([name, *cells])
    return Table(["", *columns], rows, row_classes=dict.fromkeys(ours, "ours"))


def extrapolation_figures(runs: list[Run]) -> dict[str, Any]:
    records = find_records("extrapolation", runs)
    if not records:
        return {"extrapolation": None}
    header = ["positions", "perplexity", "± one standard error", "documents", "tokens"]
    tables = {}
    for record in records:
        for context, results in record["results"]["contexts"].items():
            rows = []
            for bucket in results["buckets"]:
                low = bucket["perplexity_low"]
                band = f"{low:,.3f} to {bucket['perplexity_high']:,.3f}" if low is not None else None
                positions = f"{bucket['start']:,}-{bucket['end']:,}"
                perplexity = format_number(bucket["perplexity"], 3)
                rows.append([positions, perplexity, band, bucket["documents"], f"{bucket['tokens']:,}"])
            tables[f"{record['model']}, context {context}: every bucket"] = Table(header, rows)
    return {
        "extrapolation": embed_figure(plot.plot_extrapolation, records),
        "ratios": embed_figure(plot.plot_ratios, records),
        "bucket_tables": tables,
    }


def recall_figures(runs: list[Run]) -> dict[str, Any]:
    rows = {run.name: select_columns(collect_tasks(run, "recall"), RECALL) for run in runs}
    header = ["length", "depth", "tokens right", "answers right", "ranked first", "mean rank"]
    needles = []
    for record in find_records("needle", runs):
        cells = []
        for cell in record["results"]["cells"]:
            shares = [f"{cell[key]:.0%}" for key in ("depth", "token_accuracy", "exact_match", "ranked_first")]
            cells.append([f"{cell['length']:,}", *shares, format_number(cell["mean_rank"])])
        needles.append(
            {
                "model": record["model"],
                "figure": embed_figure(plot.plot_needle, record),
                "chance": f"{record['results']['chance']:.0%}",
                "cells": Table(header, cells),
            }
        )
    mqar_records = []
    for run in runs:
        mqar_records += [record for record in run.records if record.get("evaluator") == "mqar"]
    return {
        "recall": compare_with_published(rows, RECALL_ROWS),
        "needles": needles,
        "mqar": embed_figure(plot.plot_mqar, mqar_records) if mqar_records else None,
    }


def decoding_figures(runs: list[Run]) -> dict[str, Any]:
    records = find_records("decode_speed", runs)
    if not records:
        return {"decoding": None}
    rows = []
    for record in records:
        for row in record["results"]["lengths"]:
            speed = f"{row['tokens_per_second']:,.0f}"
            state = plot.format_bytes(row["state_bytes"] / row["batch_size"])
            rows.append([record["model"], f"{row['length']:,}", row["batch_size"], speed, state])
    header = ["model", "tokens already read", "sequences", "tokens/s", "state of each"]
    return {"decoding": embed_figure(plot.plot_decoding, records), "decoding_table": Table(header, rows)}


def recipe_table(runs: list[Run]) -> Table | None:
    """Return the configs of training, the keys that differ first."""
    configs = {run.name: flatten_tree(run.run_record["config"]) for run in runs if "config" in run.run_record}
    if not configs:
        return None
    keys = {}
    for config in configs.values():
        keys |= dict.fromkeys(config)
    keys = [key for key in keys if key not in ("name", "runs_dir") and not key.startswith("train_evals.")]
    different = {key for key in keys if len({repr(config.get(key)) for config in configs.values()}) > 1}
    rows = []
    for key in sorted(keys, key=lambda key: key not in different):
        rows.append([key, *(str(config.get(key, DASH)) for config in configs.values())])
    return Table(["key", *configs], rows, kind="text", row_classes=dict.fromkeys(different, "differs"))


def provenance_table(runs: list[Run]) -> Table | None:
    """Return on what device and by which versions each run was trained and evaluated."""
    rows = []
    for run in runs:
        if record := run.run_record:
            git = record.get("git") or {}
            commit = f"{git.get('commit', '')[:12]}{' (changed)' if git.get('dirty') else ''}"
            rows.append([f"{run.name}: training", record.get("device"), list_versions(record), commit or None, None])
        for record in run.records:
            if record.get("evaluator") != "mqar":
                checkpoint = f"{record.get('checkpoint', '')} {record.get('checksum', '')[:12]}"
                seconds = f"{record['seconds']:,.0f} s" if "seconds" in record else None
                name = f"{run.name}: {record['evaluator']}"
                rows.append([name, record.get("device"), list_versions(record), checkpoint, seconds])
    header = ["what", "device", "versions", "commit or checkpoint", "time"]
    return Table(header, rows, kind="text") if rows else None


# --------------------------------------------------------------------------------------------------------- elements


def list_versions(record: dict) -> str:
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
