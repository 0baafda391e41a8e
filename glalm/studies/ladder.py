"""Train and evaluate many models at one size and token budget, and compare them in one table and two figures."""

import argparse
import json
import math
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from glalm.cli import CONFIGS, compose_config
from glalm.config.strict import ConfigError, check_overrides, require
from glalm.evals.identity import describe_differences
from glalm.evals.options import EvalConfig, TrainingRun
from glalm.evals.plot import plot_extrapolation, plot_losses
from glalm.evals.result_files import (
    current_results,
    is_own_text,
    median_training_speed,
    read_json,
    select_result,
    write_json,
)
from glalm.model.flops import model_cost
from glalm.model.mixers import MIXERS
from glalm.train.metrics import read_metrics

# Overrides of the GLA preset. {length}, {window} and {tokens} are the run's training length, twelve times it, and its
# tokens a step.
ABLATIONS = {
    "gla_scalar_gate": ["model.gla.gate=scalar"],
    "gla_fixed_gate": ["model.gla.gate=fixed"],  # RetNet's decay
    "gla_no_gate": ["model.gla.gate=none"],
    "gla_1_head": ["model.num_heads=1"],  # the paper's model has 4
    "gla_8_heads": ["model.num_heads=8"],
    "gla_12_segments": [
        "train.tbptt_length={length}",
        "data.seq_len={window}",
        "train.batch_size=null",
        "train.batch_tokens={tokens}",
    ],
}


@dataclass(frozen=True)
class LadderRun:
    """One model of the comparison: `glalm train` and then `glalm eval`, with these arguments."""

    model: str  # a preset without its size, or a key of ABLATIONS
    config: TrainingRun
    train_arguments: list[str]
    eval_arguments: list[str]

    @cached_property
    def eval_config(self) -> EvalConfig:
        return compose_config(EvalConfig, "eval", self.eval_arguments)

    def results(self, evaluator: str) -> dict | None:
        """Return the result of an evaluator with this ladder's settings, whatever else was evaluated in the run."""
        config = self.eval_config
        asked = {"data_path": config.data_path} if config.data_path else {}
        if evaluator == "extrapolation":
            asked |= asdict(config.extrapolation)
        found = []
        for record in current_results(self.config.folder):
            settings = record["settings"]
            is_own = config.data_path is not None or is_own_text(record)
            if is_own and all(settings.get(key, value) == value for key, value in asked.items()):
                found.append(record)
        return select_result(found, evaluator)

    def completion_record(self) -> dict:
        """Return what is written once both commands have succeeded: the resolved config, whatever set its values."""
        return json.loads(json.dumps({"train": asdict(self.config), "evaluate": self.eval_arguments}))

    def is_complete(self) -> bool:
        return read_json(self.config.folder / "ladder.json") == self.completion_record()


def main(description: str) -> int:
    """Parse the command line, run what is missing and write the table. Return the exit code.

    `description` is the help text of the command.
    """
    args = parse_arguments(description)
    overrides = [a for a in args.arguments if "=" in a]
    models = [a for a in args.arguments if "=" not in a] or [*MIXERS, "hybrid"]
    try:
        refuse_keys(overrides, {"name": "NAME", "runs_dir": "--folder", "seed": "--seeds"})
        refuse_keys(args.eval, dict.fromkeys(("name", "runs_dir", "out", "checkpoint"), "the run that is evaluated"))
        groups = [p.name for p in CONFIGS.iterdir() if p.is_dir()]
        check_overrides(args.eval, EvalConfig, groups)
        check_overrides(overrides, TrainingRun, groups)
        runs = []
        for seed in range(1, args.seeds + 1):
            runs += [plan_run(model, seed, args, overrides) for model in models]
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 2
    args.folder.mkdir(parents=True, exist_ok=True)
    failures = run_all(runs, args.at_once)
    complete = [run for run in runs if run.is_complete()]
    if complete:
        write_results(complete, args)
    for name, reason in failures.items():
        print(f"{name}: {reason}, see {args.folder / name}.log", file=sys.stderr)
    return 1 if failures else 0


def parse_arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = sorted(p.stem.removeprefix("ladder_") for p in (CONFIGS / "experiment").glob("ladder_*.yaml"))
    parser.add_argument("--size", choices=sizes, default="tiny", help="of the presets and the budget (%(default)s)")
    parser.add_argument("--seeds", type=parse_positive, default=1, metavar="N", help="use the seeds 1 to N (1)")
    parser.add_argument(
        "--at-once", type=parse_positive, default=1, metavar="N", help="runs on each visible GPU, or on the CPU (1)"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/ladder"), help="where the runs go (%(default)s)")
    parser.add_argument("--eval", action="append", default=[], metavar="KEY=VALUE", help="for glalm eval; repeatable")
    parser.add_argument("arguments", nargs="*", metavar="NAME | KEY=VALUE")
    return parser.parse_intermixed_args()


def parse_positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def refuse_keys(overrides: list[str], set_by: dict[str, str]) -> None:
    """Raise ConfigError for a key that the ladder sets itself, because its table would describe other runs."""
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        require(key not in set_by, f"{key}=... is set for each run, by {set_by.get(key)}")


def plan_run(model: str, seed: int, args: argparse.Namespace, overrides: list[str]) -> LadderRun:
    """Return one run with its checked config. Raises ConfigError."""
    presets = sorted(p.stem.removesuffix(f"_{args.size}") for p in (CONFIGS / "model").glob(f"*_{args.size}.yaml"))
    require(
        model in presets or model in ABLATIONS,
        f"{model} is none of the presets: {', '.join(presets)}; nor of the ablations: {', '.join(ABLATIONS)}",
    )
    preset = f"model={'gla' if model in ABLATIONS else model}_{args.size}"
    place = [f'name="{model}-{seed}"', f'runs_dir="{args.folder}"']
    train_arguments = [f"experiment=ladder_{args.size}", preset, *place, f"seed={seed}", *overrides]
    config = compose_config(TrainingRun, "train", train_arguments)
    sizes = {"length": config.data.seq_len, "window": 12 * config.data.seq_len, "tokens": config.tokens_per_step}
    train_arguments += [override.format(**sizes) for override in ABLATIONS.get(model, [])]
    config = compose_config(TrainingRun, "train", train_arguments)
    # Models trained in segments are evaluated like the others, by the length of a segment.
    length = config.train.tbptt_length or config.data.seq_len
    eval_arguments = [
        *place,
        "evals=[perplexity,extrapolation]",
        f"train_length={length}",
        f"extrapolation.max_length={10 * length}",
        "extrapolation.contexts=[stateful]",
        *args.eval,
    ]
    return LadderRun(model, config, train_arguments, eval_arguments)


# --------------------------------------------------------------------------------------------------------- running


@dataclass
class ProcessGroup:
    """The processes that run now, so that all of them can be stopped."""

    running: set[subprocess.Popen] = field(default_factory=set)
    stopping: bool = False

    def run(self, command: list[str], log: Path, environment: dict[str, str]) -> int:
        """Run a command to its end, append its output to `log`, and return its exit code."""
        with log.open("a") as file:
            # In a session of its own, a process does not get this script's Ctrl-C, but is stopped by `stop`, once.
            process = subprocess.Popen(
                command, env=environment, start_new_session=True, stdout=file, stderr=subprocess.STDOUT
            )
            self.running.add(process)
            if self.stopping:
                process.terminate()
            code = process.wait()
            self.running.discard(process)
        return code

    def stop(self) -> None:
        self.stopping = True
        for process in list(self.running):
            process.terminate()


def run_all(runs: list[LadderRun], at_once: int) -> dict[str, str]:
    """Run what is not complete, `at_once` runs on each GPU. Return the reasons of failures by the run's name."""
    missing = [run for run in runs if not run.is_complete()]
    slots = [gpu for _ in range(at_once) for gpu in visible_gpus() or [None]]
    free_slots: queue.SimpleQueue = queue.SimpleQueue()
    for slot in slots:
        free_slots.put(slot)
    processes = ProcessGroup()
    failures = {}
    print(f"{len(runs)} runs, {len(missing)} to do, {len(slots)} at once", flush=True)
    signal.signal(signal.SIGTERM, raise_keyboard_interrupt)
    with ThreadPoolExecutor(len(slots)) as pool:
        futures = {pool.submit(run_one, run, free_slots, len(slots), processes): run for run in missing}
        try:
            for n, future in enumerate(as_completed(futures), 1):
                run = futures[future]
                reason = future.result()
                if reason:
                    failures[run.config.name] = reason
                print(f"{n}/{len(missing)} {run.config.name}: {reason or describe_score(run)}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()  # Training saves a checkpoint before it ends.
            failures = {run.config.name: "stopped" for run in missing if not run.is_complete()}
    return failures


def raise_keyboard_interrupt(*_) -> None:
    """Treat SIGTERM as Ctrl-C, once, because GNU timeout sends it twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def run_one(run: LadderRun, free_slots: queue.SimpleQueue, slots: int, processes: ProcessGroup) -> str | None:
    """Train and evaluate on the first free GPU. Return the reason of a failure, or None."""
    gpu = free_slots.get()
    threads = str(max(1, (os.cpu_count() or 1) // slots))
    environment = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads, **os.environ}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    log = run.config.folder.with_name(f"{run.config.name}.log")
    try:
        for name, arguments in (("train", run.train_arguments), ("eval", run.eval_arguments)):
            command = [sys.executable, "-m", "glalm", name, *arguments]
            code = processes.run(command, log, environment)
            if code:
                return f"glalm {name} ended with exit code {code}"
        write_json(run.config.folder / "ladder.json", run.completion_record())
        return None
    finally:
        free_slots.put(gpu)


def visible_gpus() -> list[str]:
    """Return the GPUs as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def describe_score(run: LadderRun) -> str:
    return f"perplexity {run.results('perplexity')['results']['perplexity']:.2f}"


# --------------------------------------------------------------------------------------------------------- results


def write_results(runs: list[LadderRun], args: argparse.Namespace) -> None:
    """Write ladder.json and the two figures of all complete runs, and print the table."""
    by_model: dict[str, list[LadderRun]] = {}
    for run in runs:
        by_model.setdefault(run.model, []).append(run)
    rows = [build_row(model, seeds) for model, seeds in by_model.items()]
    first_seeds = [seeds[0] for seeds in by_model.values()]
    evaluated = first_seeds[0].results("perplexity")
    record = {
        "size": args.size,
        "arguments": args.arguments,
        "eval": args.eval,
        "at_once": args.at_once,
        "device": evaluated["device"],
        "gpus": len(visible_gpus()),
        "versions": evaluated["versions"],
        "rows": rows,
    }
    differences = describe_differences([run.results("perplexity") for run in runs])
    write_json(args.folder / "ladder.json", record | {"differences": differences})
    print_table(rows)
    if differences:
        print(f"These perplexities do not compare: {'; '.join(differences)}.")
    # Runs with longer windows are left out of the figure, because their validation losses do not compare.
    shortest = min(run.config.data.seq_len for run in first_seeds)
    losses = {r.model: r.config.folder / "metrics.jsonl" for r in first_seeds if r.config.data.seq_len == shortest}
    positions = [run.results("extrapolation") | {"model": run.model} for run in first_seeds]
    draw_figure(plot_losses, losses, args.folder / "loss.png")
    draw_figure(plot_extrapolation, positions, args.folder / "positions.png")


def draw_figure(draw: Callable[[Any, Path], list[Path]], content: Any, path: Path) -> None:
    """Draw one figure, or print why its curves do not compare."""
    try:
        for figure in draw(content, path):
            print(f"wrote {figure}")
    except ValueError as error:
        print(f"{path} was not drawn: {error}")


def build_row(model: str, runs: list[LadderRun]) -> dict:
    """Return a model's row: means over its seeds, of perplexities and ratios by their logarithms.

    tokens/s is the speed of a run while others share its GPU.
    """
    config = runs[0].config
    found = [run.results("perplexity") for run in runs]
    metrics = [read_metrics(run.config.folder / "metrics.jsonl")[0] for run in runs]
    ratios = []
    for run in runs:
        [context] = run.results("extrapolation")["results"]["contexts"].values()
        ratios.append(context["ratios"])
    reached = [n for n in ratios[0] if n in ("2", "4", "10") and ratios[0][n]["documents"]]
    return {
        "model": model,
        "parameters": found[0]["parameters"],
        "MFLOP/token": model_cost(config.model, config.data.seq_len).forward / 1e6,
        "tokens": config.steps * config.tokens_per_step,
        "tokens/s": median_training_speed(chain.from_iterable(metrics)),
        "perplexity": math.exp(fmean(f["results"]["nats_per_token"] for f in found)),
        "seeds": {str(run.config.seed): f["results"]["perplexity"] for run, f in zip(runs, found, strict=True)},
        **{f"{n}x / 1x": math.exp(fmean(math.log(r[n]["ratio"]) for r in ratios)) for n in reached},
    }


def print_table(rows: list[dict]) -> None:
    table = Table(title="one size, one token budget", box=box.MARKDOWN)
    columns = list(dict.fromkeys(chain.from_iterable(rows)))
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in sorted(rows, key=lambda r: r["perplexity"]):
        table.add_row(*(format_cell(column, row.get(column)) for column in columns))
    Console(width=130, markup=False).print(table)


def format_cell(column: str, value) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, dict):
        return ", ".join(f"{v:.2f}" for v in value.values())
    return f"{value:,.0f}" if column in ("parameters", "tokens", "tokens/s") else f"{value:.2f}"
