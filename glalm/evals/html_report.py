"""One self-contained HTML page that compares runs: what they are, how they were trained, what they reach.

It is made from the JSON files of their folders alone, by the template report.html.jinja. Figures are inside the page,
which loads nothing.
"""

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from glalm.config.strict import flatten_tree
from glalm.data.files import printable
from glalm.evals import plot
from glalm.evals.identity import (
    describe_conditions,
    describe_differences,
    differing_settings,
    format_setting,
    group_comparable,
    is_of_average,
    measurement,
    text_name,
)
from glalm.evals.published import RECALL, RECALL_ROWS, UNSURE, ZERO_SHOT, paper_table, select_columns
from glalm.evals.result_files import (
    current_results,
    describe_validation,
    format_number,
    infer_tokens,
    is_own_text,
    median_training_speed,
    read_json,
    select_result,
    select_scores,
    step_of,
)
from glalm.train.metrics import read_metrics

ZERO_SHOT_EVALUATORS = ("paper_zero_shot", "zero_shot")
HARNESS_OPTIONS = ("limit", "num_fewshot", "stateful", "max_length", "precision", "weights", "lm_eval")


@dataclass
class Run:
    """A folder that training, evaluation or `glalm mqar` wrote, and its name on the page.

    Attributes:
        run_record: run.json, or {}.
        metrics: The rows of metrics.jsonl.
        records: The current results, with the run's name for the model's, and the checkpoint's if it is not the last
            one.

    Raises:
        ValueError: The folder holds nothing to report, or a file in it is damaged.
    """

    folder: Path
    name: str

    def __post_init__(self):
        self.run_record = read_json(self.folder / "run.json") or {}
        self.metrics, _ = read_metrics(self.folder / "metrics.jsonl")
        self.records = []
        for record in current_results(self.folder):
            self.records.append(record | {"model": self.name + self.checkpoint_note(record)})
        if self.run_record or self.metrics or self.records:
            return
        # A folder of runs, such as a sweep's, is easily taken for one.
        if inside := sorted(self.folder.glob("*/run.json")):
            several = f"{len(inside)} runs inside of it" if len(inside) > 1 else "a run inside of it"
            raise ValueError(f"{self.folder} is no run, but has {several}: report on {inside[0].parent}")
        raise ValueError(
            f"{self.folder} holds no run and no results: train or evaluate one there first. If a job for it is "
            "queued, wait until it has started."
        )

    def checkpoint_note(self, record: dict) -> str:
        """Return " (step_N)" for a result of an earlier checkpoint than the run has by now, or else an empty text."""
        is_earlier = self.metrics and step_of(record) not in (-1, self.metrics[-1]["step"])
        return f" ({record['checkpoint']})" if is_earlier else ""


@dataclass
class EmbeddedFigure:
    """A figure as a data URI. width: CSS pixels at which its type can still be read."""

    source: str
    width: int


def render_report(folders: Sequence[Path]) -> str:
    """Return the page of one run or several.

    Raises:
        ValueError: As `Run`, for one of the folders.
    """
    runs = [Run(Path(folder), name) for folder, name in zip(folders, distinct_names(folders), strict=True)]

    def find_records(evaluator: str) -> list[dict]:
        records = []
        for run in runs:
            records += [record for record in run.records if record["evaluator"] == evaluator]
        return records

    zero_shot = score_rows(runs, ZERO_SHOT_EVALUATORS, paper_table)
    recall = score_rows(runs, ("recall",), lambda tasks: select_columns(tasks, RECALL))

    return load_template().render(
        title=", ".join(run.name for run in runs),
        records=find_records,
        figure_groups=lambda evaluator: figure_groups(find_records(evaluator)),
        embed=embed_figure,
        with_gains=lambda group: [record for record in group if plot.known_gains(record)],
        plot=plot,
        conditions=describe_conditions,
        select_scores=select_scores,
        paper_cells=format_paper_cells,
        overview=overview_rows(runs),
        overview_notes=compare_overview(runs),
        other_text=other_text_rows(runs),
        zero_shot={name: values for name, (values, _) in zero_shot.items()},
        published_zero_shot=ZERO_SHOT,
        unlike_paper={name: describe_unlike_paper(records) for name, (_, records) in zero_shot.items()},
        recall={name: values for name, (values, _) in recall.items()},
        unlike_recall={name: describe_unlike_paper(records) for name, (_, records) in recall.items()},
        published_recall=RECALL_ROWS,
        runs=runs,
        losses=loss_figures(runs),
        **compare_configs(runs),
    )


def load_template() -> Template:
    """Return the page's template, with the filters that format numbers in it."""
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
    return environment.get_template("report.html.jinja")


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
        perplexity = select_result(run.records, "perplexity")
        extrapolation = select_result(run.records, "extrapolation")
        record = perplexity or extrapolation or next(iter(run.records), {})
        speed = median_training_speed(run.metrics)
        model = run.run_record.get("config", {}).get("model", {})
        # For want of an evaluated perplexity, show the last one that training logged.
        logged = [row["val_perplexity"] for row in run.metrics if "val_perplexity" in row]
        perplexity_cell = format_number(logged[-1]) if logged else None
        if perplexity is not None:
            perplexity_cell = format_number(perplexity["results"]["perplexity"]) + origin_note(run, perplexity)
        contexts = extrapolation["results"]["contexts"] if extrapolation else {}
        ratios = contexts["stateful"]["ratios"] if "stateful" in contexts else {}
        reached = [f"{ratio['ratio']:.3f} at {n}×" for n, ratio in ratios.items() if ratio["documents"]]
        furthest_ratio_cell = reached[-1] + origin_note(run, extrapolation) if reached else None
        cells = [
            model.get("layers") or model.get("mixer") or record.get("model_config", {}).get("model_type"),
            plot.format_quantity(record["parameters"]) if "parameters" in record else None,
            plot.format_quantity(max(infer_tokens(run.metrics), default=0)) if run.metrics else None,
            f"{speed:,.0f}" if speed else None,
            perplexity_cell,
            furthest_ratio_cell,
        ]
        if any(cell is not None for cell in cells):
            rows[run.name] = cells
    return rows


def other_text_rows(runs: list[Run]) -> list[tuple[str, list]]:
    """Return the names and cells of the perplexities of text that the runs were not trained on, such as text=FILE."""
    rows = []
    for run in runs:
        for record in run.records:
            if record["evaluator"] == "perplexity" and not is_own_text(record):
                results = record["results"]
                cells = [describe_conditions(record), format_number(results["perplexity"]), results.get("tokens")]
                rows.append((record["model"], cells))
    return rows


def origin_note(run: Run, record: dict) -> str:
    """Return what a reader must know beside a number: the text if it is not the run's own, and an older checkpoint."""
    text = "" if is_own_text(record) else f" on {text_name(record)}"
    average = ", average of the weights" if is_of_average(record) else ""
    return text + average + run.checkpoint_note(record)


def compare_overview(runs: list[Run]) -> list[str]:
    """Return a sentence for each column of the overview whose numbers do not compare."""
    notes = []
    for column, evaluator in (("validation perplexities", "perplexity"), ("far / near", "extrapolation")):
        found = {run.name: select_result(run.records, evaluator) for run in runs}
        records = [record for record in found.values() if record]
        if evaluator == "perplexity" and records:
            # Where nothing was evaluated, the number is of training's own validation, which reads fewer windows.
            records += [describe_validation(run.folder) for run in runs if not found[run.name]]
        if differences := describe_differences(records):
            notes.append(f"The {column} do not compare: {'; '.join(differences)}.")
    return notes


def figure_groups(records: list[dict]) -> list[tuple[str, list[dict]]]:
    """Return records whose numbers compare, for one figure each, with what tells the figure from the others."""
    groups = group_comparable(records)
    firsts = [group[0] for group in groups]
    return [(describe_group(record, firsts), group) for record, group in zip(firsts, groups, strict=True)]


def describe_group(record: dict, firsts: list[dict]) -> str:
    """Return what was measured, in the settings in which one group's `record` differs from the others' first ones."""
    if len(firsts) == 1:
        return "" if is_own_text(record) else f" On {text_name(record)}."
    settings = measurement(record)
    keys = [key for key in differing_settings(firsts) if key != "data_sha256"]
    parts = [f"{key}={format_setting(settings.get(key))}" for key in keys]
    text = text_name(record)
    return f" {f'On {text}' if text else 'Measured'}{' with ' if parts else ''}{', '.join(parts)}."


def loss_figures(runs: list[Run]) -> list[tuple[EmbeddedFigure, str]]:
    """Return figures with captions: one run's losses, or the validation losses of those validated on the same text."""
    with_losses = [run for run in runs if any("val_loss" in row for row in run.metrics)]
    if len(with_losses) == 1:
        [run] = with_losses
        return [(embed_figure(plot.plot_training, run.folder / "metrics.jsonl"), f"Losses of {run.name}.")]
    validations = [describe_validation(run.folder) | {"run": run} for run in with_losses]
    figures = []
    for description, group in figure_groups(validations):
        files = {validation["run"].name: validation["run"].folder / "metrics.jsonl" for validation in group}
        figures.append((embed_figure(plot.plot_losses, files), f"Validation losses.{description}"))
    return figures


def score_rows(
    runs: list[Run], evaluators: Sequence[str], tabulate: Callable[[dict[str, dict]], dict]
) -> dict[str, tuple[dict, list[dict]]]:
    """Return {row's name: (its columns, the records it is from)} of the harness's scores, without empty rows.

    A row has the scores of one checkpoint with the same options. A run with several rows names each row's.
    """
    rows = {}
    for run in runs:
        records = [record for name in evaluators for record in run.records if record["evaluator"] == name]
        groups: dict[str, list[dict]] = {}
        for record in records:
            options = {name: record["settings"].get(name) for name in HARNESS_OPTIONS}
            key = [f"{name}={value}" for name, value in options.items() if value not in (None, False)]
            groups.setdefault(", ".join([record["checkpoint"] or "", *key]), []).append(record)
        for key, group in groups.items():
            tasks = {}
            for record in reversed(group):  # Where two evaluators ran a task, the first one counts.
                tasks |= record["results"]["tasks"]
            values = tabulate(tasks)
            if any(value is not None for value in values.values()):
                rows[run.name if len(groups) == 1 else f"{run.name} ({key.strip(', ')})"] = (values, group)
    return rows


def format_paper_cells(name: str, columns: Iterable[str], values: Iterable[float | None]) -> list[str | None]:
    """Return a row of the paper's table. A number that copies of the paper differ on is marked with "?"."""
    cells = []
    for column, value in zip(columns, values, strict=True):
        number = format_number(value, 2 if "ppl" in column else 1)
        cells.append(f"{number}?" if (name, column) in UNSURE else number)
    return cells


def describe_unlike_paper(records: list[dict]) -> str:
    """Return the settings by which a row of zero-shot scores measures something else than the paper's."""
    differences = {}
    for record in records:
        settings = record["settings"]
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


def embed_figure(draw: Callable[[Any, Path], list[Path]], records: Any) -> EmbeddedFigure:
    """Return what `draw(records, path)` writes as SVG."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "figure.svg"
        draw(records, path)
        svg = path.read_bytes()
    width = ElementTree.fromstring(svg).get("width").removesuffix("pt")
    return EmbeddedFigure(f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}", round(float(width)))
