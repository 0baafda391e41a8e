"""The ladder's table, its CSV file and its figures, and what its runs would cost."""

import argparse
import copy
import csv
import io
import math
from collections.abc import Callable, Collection
from itertools import chain
from pathlib import Path
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from glalm.data.files import atomic_write
from glalm.evals.identity import describe_differences
from glalm.evals.plot import plot_extrapolation, plot_losses
from glalm.evals.result_files import infer_tokens, main_context, median_training_speed, read_json, write_json
from glalm.launcher import visible_gpus
from glalm.model.decoder import model_cost
from glalm.progress import format_seconds
from glalm.train.estimate import estimate_hours_and_memory
from glalm.train.memory import GIB, count_parameters
from glalm.train.metrics import read_metrics

if TYPE_CHECKING:
    from glalm.studies.ladder import LadderRun

RATIOS = ("2", "4", "10")  # training lengths at which the table shows the perplexity


def write_results(runs: "list[LadderRun]", planned: "list[LadderRun]", args: argparse.Namespace) -> None:
    """Write ladder.json, ladder.csv and the figures of all complete runs, and print the table.

    The figures show each model at its best learning rate: means over seeds, with bands of one standard deviation.

    Args:
        runs: Those that are complete.
        planned: All runs of the command line.
    """
    groups: dict[tuple, list[LadderRun]] = {}
    for run in runs:
        groups.setdefault((run.model, run.lr), []).append(run)
    rows = {key: build_row(seeds) for key, seeds in groups.items()}
    # The key (model, learning rate) with the lowest perplexity of each model.
    best: dict[str, tuple] = {}
    for key in sorted(rows, key=lambda key: rows[key]["perplexity"]):
        best.setdefault(key[0], key)
    unfinished = {run.model for run in planned if run not in runs}
    for key, row in rows.items():
        if args.lrs != [None]:
            row["best"] = key == best[key[0]] and key[0] not in unfinished
    record = describe_ladder(rows.values(), runs, planned, args)
    write_json(args.folder / "ladder.json", record)
    write_csv(runs, args.folder / "ladder.csv")
    print_table(rows.values())
    if unfinished:
        absent = sorted(unfinished - {run.model for run in runs})
        none_of = f"; none of {', '.join(absent)}" if absent else ""
        print(f"{len(runs)} of {len(planned)} runs are complete{none_of}.")
    if record["differences"]:
        print(f"These perplexities do not compare: {'; '.join(record['differences'])}.")
    draw_figures({model: groups[best[model]] for model in dict.fromkeys(run.model for run in runs)}, args.folder)


def describe_ladder(
    rows: Collection[dict], runs: "list[LadderRun]", planned: "list[LadderRun]", args: argparse.Namespace
) -> dict:
    """Return the content of ladder.json: what was asked for, where it ran, the table, and what does not compare."""
    results = [run.results("perplexity") for run in runs]
    differences = describe_differences(results)
    # A run reads the text that the set had when it began, so text that is added later is only in later runs.
    training = [(read_json(run.config.folder / "run.json") or {}).get("identity", {}) for run in runs]
    for key, characters in (("data fingerprint", 12), ("data tokens", None)):
        values = dict.fromkeys(str(identity.get(key))[:characters] for identity in training)
        if len(values) > 1:
            differences.append(f"{key} of training: {' / '.join(values)}")
    return {
        "size": args.size,
        "arguments": args.arguments,
        "eval": args.eval,
        "at_once": args.at_once,
        "device": results[0]["device"],
        "gpus": len(visible_gpus()),
        "versions": results[0]["versions"],
        "runs": len(planned),
        "complete": len(runs),
        "rows": [*rows],
        "differences": differences,
    }


def draw_figures(runs: "dict[str, list[LadderRun]]", folder: Path) -> None:
    """Draw loss.png and positions.png of {model: its runs at the best rate, one for each seed}."""
    # Runs with longer windows are left out of the figure, because their validation losses do not compare.
    shortest = min(run.config.data.seq_len for run in chain.from_iterable(runs.values()))
    losses = {
        model: [run.config.folder / "metrics.jsonl" for run in seeds]
        for model, seeds in runs.items()
        if seeds[0].config.data.seq_len == shortest
    }
    draw_figure(plot_losses, losses, folder / "loss.png")
    first_run = next(chain.from_iterable(runs.values()))
    if first_run.results("extrapolation") is not None:
        positions = [combine_seeds([run.results("extrapolation") for run in seeds], m) for m, seeds in runs.items()]
        draw_figure(plot_extrapolation, positions, folder / "positions.png")


def draw_figure(draw: Callable[[Any, Path], list[Path]], content: Any, path: Path) -> None:
    """Draw one figure, or print why its curves do not compare."""
    try:
        for figure in draw(content, path):
            print(f"wrote {figure}")
    except ValueError as error:
        print(f"{path} was not drawn: {error}")


def combine_seeds(records: list[dict], model: str) -> dict:
    """Return one record of extrapolation for several seeds of a model.

    A bucket's perplexity is the mean over seeds, by logarithms, and its bounds are one standard deviation away. With
    one seed the bounds are those of the record, one standard error over documents.
    """
    record = records[0] | {"model": model}
    if len(records) == 1:
        return record
    contexts = {}
    for name, context in record["results"]["contexts"].items():
        buckets = []
        for i, bucket in enumerate(context["buckets"]):
            of_seeds = [other["results"]["contexts"][name]["buckets"][i]["perplexity"] for other in records]
            buckets.append(bucket | summarize_perplexities(of_seeds) if bucket["documents"] else bucket)
        contexts[name] = context | {"buckets": buckets}
    return record | {"results": record["results"] | {"contexts": contexts}}


def summarize_perplexities(perplexities: list[float]) -> dict[str, float]:
    """Return their geometric mean, and one standard deviation of the logarithms below and above it."""
    logs = [math.log(perplexity) for perplexity in perplexities]
    mean = fmean(logs)
    spread = stdev(logs)
    return {
        "perplexity": math.exp(mean),
        "perplexity_low": math.exp(mean - spread),
        "perplexity_high": math.exp(mean + spread),
    }


def build_row(runs: "list[LadderRun]") -> dict:
    """Return the row of a model at one learning rate.

    Perplexities and ratios are means over its seeds, by their logarithms; "sd" is the standard deviation of the seeds'
    perplexities. tokens/s is the median of its runs' speeds, each while others share its GPU.
    """
    config = runs[0].config
    by_run = [describe_run(run) for run in runs]
    perplexities = [row["perplexity"] for row in by_run]
    shared = [name for name in (f"{n}x / 1x" for n in RATIOS) if all(name in row for row in by_run)]
    speeds = [row["tokens/s"] for row in by_run if row["tokens/s"] is not None]
    row = {
        "model": runs[0].model,
        "lr": runs[0].lr,
        "parameters": by_run[0]["parameters"],
        "MFLOP/token": model_cost(config.model, config.data.seq_len).forward / 1e6,
        "tokens": by_run[0]["tokens"],
        "tokens/s": median(speeds) if speeds else None,
        "perplexity": math.exp(fmean(math.log(perplexity) for perplexity in perplexities)),
        "sd": stdev(perplexities) if len(perplexities) > 1 else None,
        "seeds": {str(row["seed"]): row["perplexity"] for row in by_run},
        **{name: math.exp(fmean(math.log(row[name]) for row in by_run)) for name in shared},
    }
    return {name: value for name, value in row.items() if value is not None}


def describe_run(run: "LadderRun") -> dict:
    """Return a run's line of ladder.csv. It has ratios if the ladder evaluates extrapolation."""
    found = run.results("perplexity")
    metrics = read_metrics(run.config.folder / "metrics.jsonl")[0]
    ratios = {}
    if extrapolation := run.results("extrapolation"):
        results = extrapolation["results"]
        by_length = results["contexts"][main_context(results)]["ratios"]
        ratios = {n: by_length[n] for n in RATIOS if n in by_length}
    return {
        "name": run.config.name,
        "model": run.model,
        "lr": run.config.optim.lr,
        "seed": run.config.seed,
        "parameters": found["parameters"],
        # Its batches may have been others before it was resumed. Without its metrics, its config has to do.
        "tokens": max(infer_tokens(metrics), default=0) or run.training_tokens,
        "tokens/s": median_training_speed(metrics),
        "nats per token": found["results"]["nats_per_token"],
        "perplexity": found["results"]["perplexity"],
        **{f"{n}x / 1x": ratio["ratio"] for n, ratio in ratios.items() if ratio["documents"]},
    }


def write_csv(runs: "list[LadderRun]", path: Path) -> None:
    """Write a line for each run, with all digits."""
    lines = [describe_run(run) for run in runs]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*dict.fromkeys(chain.from_iterable(lines))], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
    print(f"wrote {path}")


def print_table(rows: Collection[dict]) -> None:
    """Print the rows by their perplexity, with one standard deviation over seeds in place of each seed's."""
    shown = []
    for row in sorted(rows, key=lambda row: row["perplexity"]):
        shown.append({name: value for name, value in row.items() if name != "sd"} | {"seeds": len(row["seeds"])})
        if "sd" in row:
            shown[-1]["perplexity"] = f"{row['perplexity']:.2f} ± {row['sd']:.2f}"
    title = "one size, one token budget"
    if any("sd" in row for row in rows):
        title += "; means over seeds ± one standard deviation"
    print_rows(title, shown)


def print_rows(title: str, rows: list[dict]) -> None:
    table = Table(title=title, box=box.MARKDOWN)
    columns = list(dict.fromkeys(chain.from_iterable(rows)))
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(*(format_cell(column, row.get(column)) for column in columns))
    Console(width=140, markup=False).print(table)


def format_cell(column: str, value) -> str:
    if isinstance(value, bool):
        return "best" if value else ""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, dict):
        return ", ".join(f"{v:.2f}" for v in value.values())
    if column == "lr":
        return f"{value:g}"
    return f"{value:,.0f}" if column in ("parameters", "tokens", "tokens/s", "runs", "seeds") else f"{value:.2f}"


def print_cost(runs: "list[LadderRun]", missing: "list[LadderRun]") -> None:
    """Print what the training of each model costs, by the dry run's estimates, and of all that are missing."""
    by_model: dict[str, list[LadderRun]] = {}
    for run in runs:
        by_model.setdefault(run.model, []).append(run)
    hours: dict[str, float | None] = {}
    rows = []
    for model, same in by_model.items():
        config = copy.deepcopy(same[0].config)  # The estimate sets a vocabulary of null.
        hours[model], memory = estimate_hours_and_memory(config)
        row = {"model": model, "runs": len(same), "parameters": count_parameters(config).total}
        row |= {"tokens": same[0].training_tokens, "GiB": memory / GIB}
        rows.append(row if hours[model] is None else row | {"minutes": 60 * hours[model]})
    print_rows("tokens, GiB of memory and minutes of training are of one run", rows)
    tokens = sum(run.training_tokens for run in missing)
    print(f"{len(runs)} runs, {len(missing)} to do with {tokens:,} tokens")
    if None in hours.values():
        print("The time of some is not known. To plan for a GPU, add train.assumed_gpu=H200.")
        return
    train = runs[0].config.train
    devices = 1
    where = "this machine's CPU, which runs at once share"
    if train.assumed_gpu or torch.cuda.is_available():
        devices = train.assumed_gpus or (1 if train.assumed_gpu else torch.cuda.device_count())
        where = f"{devices} x {train.assumed_gpu or torch.cuda.get_device_name()}"
    training = sum(hours[run.model] for run in missing) / devices
    evaluation = sum(hours[run.model] * (run.work / run.training_tokens - 1) for run in missing) / devices
    print(
        f"about {format_seconds(3600 * training)} of training and {format_seconds(3600 * evaluation)} of evaluation on "
        f"{where}; besides, each run takes 10 seconds or more to start"
    )
