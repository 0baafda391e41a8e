"""Train and evaluate many models at one size and token budget, as jobs of one of Hydra's launchers."""

import argparse
import itertools
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from omegaconf import DictConfig

from glalm.cli import CONFIGS, build_config, check_plugins, compose_config, launch_jobs
from glalm.config.strict import ConfigError, RunError, check_overrides, require
from glalm.evals.options import EvalConfig, TrainingRun
from glalm.evals.result_files import current_results, is_own_text, read_json, select_result, write_json
from glalm.launcher import register_launcher
from glalm.model.mixers import MIXERS
from glalm.progress import ProgressBar
from glalm.studies.ladder_results import print_cost, write_results
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
    lr: float | None  # one of --lrs, or None without that option
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
    try:
        runs = plan_runs(args)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 2
    missing = [run for run in runs if not run.is_complete()]
    if args.dry_run:
        print_cost(runs, missing)
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    failures = run_all(runs, missing, args) if missing else {}
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
    parser.add_argument("--lrs", type=parse_rates, default=[None], metavar="LR,LR", help="train at each learning rate")
    parser.add_argument(
        "--at-once", type=parse_positive, default=1, metavar="N", help="runs on each visible GPU, or on the CPU (1)"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/ladder"), help="where the runs go (%(default)s)")
    parser.add_argument("--eval", action="append", default=[], metavar="KEY=VALUE", help="for glalm eval; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="print what all runs would cost, and exit")
    parser.add_argument("arguments", nargs="*", metavar="NAME | KEY=VALUE")
    return parser.parse_intermixed_args()


def parse_positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse_rates(text: str) -> list[float]:
    rates = [float(rate) for rate in text.split(",")]
    if not all(0 < rate < math.inf for rate in rates) or len({f"{rate:g}" for rate in rates}) < len(rates):
        raise ValueError
    return rates


def plan_runs(args: argparse.Namespace) -> list[LadderRun]:
    """Return all runs of the command line with their checked configs. Raises ConfigError."""
    overrides = [argument for argument in args.arguments if "=" in argument]
    models = [argument for argument in args.arguments if "=" not in argument] or [*MIXERS, "hybrid"]
    set_by = {"name": "NAME", "runs_dir": "--folder", "seed": "--seeds", "train.dry_run": "--dry-run"}
    if args.lrs != [None]:
        set_by["optim.lr"] = "--lrs"
    refuse_keys(overrides, set_by)
    refuse_keys(args.eval, dict.fromkeys(("name", "runs_dir", "out", "checkpoint"), "the run that is evaluated"))
    groups = [path.name for path in CONFIGS.iterdir() if path.is_dir()]
    check_overrides(args.eval, EvalConfig, groups)
    check_overrides(overrides, TrainingRun, groups)
    register_launcher()
    check_plugins(overrides)
    require(
        args.at_once == 1 or not any(override.startswith("hydra/launcher=") for override in overrides),
        "--at-once is for runs on this machine without hydra/launcher=...; that launcher has options of its own, such "
        "as hydra.launcher.n_jobs=N of joblib",
    )
    axes = itertools.product(range(1, args.seeds + 1), args.lrs, models)
    return [plan_run(model, lr, seed, args, overrides) for seed, lr, model in axes]


def refuse_keys(overrides: list[str], set_by: dict[str, str]) -> None:
    """Raise ConfigError for a key that the ladder sets itself, because its table would describe other runs."""
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        require(key not in set_by, f"{key}=... is set for each run, by {set_by.get(key)}")


def plan_run(model: str, lr: float | None, seed: int, args: argparse.Namespace, overrides: list[str]) -> LadderRun:
    """Return one run with its checked config. Raises ConfigError."""
    presets = sorted(p.stem.removesuffix(f"_{args.size}") for p in (CONFIGS / "model").glob(f"*_{args.size}.yaml"))
    require(
        model in presets or model in ABLATIONS,
        f"{model} is none of the presets: {', '.join(presets)}; nor of the ablations: {', '.join(ABLATIONS)}",
    )
    preset = f"model={'gla' if model in ABLATIONS else model}_{args.size}"
    name = f"{model}-{seed}" if lr is None else f"{model}-lr-{lr:g}-{seed}"
    place = [f'name="{name}"', f'runs_dir="{args.folder}"']
    overrides = [override for override in overrides if not override.startswith("hydra")]
    train_arguments = [f"experiment=ladder_{args.size}", preset, *place, f"seed={seed}", *overrides]
    config = compose_config(TrainingRun, "train", train_arguments)
    if lr is not None:
        train_arguments += [f"optim.lr={lr:g}"]
        if not any(override.startswith("optim.min_lr=") for override in overrides):
            train_arguments += [f"optim.min_lr={lr * config.optim.min_lr / config.optim.lr:g}"]
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
    return LadderRun(model, lr, config, train_arguments, eval_arguments)


# --------------------------------------------------------------------------------------------------------- running


def run_all(runs: list[LadderRun], missing: list[LadderRun], args: argparse.Namespace) -> dict[str, str]:
    """Run what is missing by a launcher of Hydra. Return the reasons of failures by the run's name."""
    launcher = [argument for argument in args.arguments if argument.startswith("hydra")]
    if not any(argument.startswith("hydra/launcher=") for argument in launcher):
        launcher += ["hydra/launcher=processes", f"hydra.launcher.at_once={args.at_once}"]
    launcher.append(f'hydra.sweep.dir="{args.folder}"')
    print(f"{len(runs)} runs, {len(missing)} to do", flush=True)
    try:
        with show_progress(missing):
            jobs = [run.train_arguments for run in missing]
            # Jobs cannot compose the configs of evaluations, because Hydra is in use where they run.
            task = TrainAndEvaluate({run.config.name: (run, run.eval_config) for run in missing})
            reasons = launch_jobs(TrainingRun, "train", task, launcher, jobs)
    except KeyboardInterrupt:
        reasons = ["stopped"] * len(missing)
    return {
        run.config.name: reason
        for run, reason in zip(missing, reasons, strict=True)
        if reason is not None and not run.is_complete()
    }


@dataclass(frozen=True)
class TrainAndEvaluate:
    """What a launcher calls for each of `runs`, by their names. What it prints is appended to FOLDER/NAME.log."""

    runs: dict[str, tuple[LadderRun, EvalConfig]]

    def __call__(self, tree: DictConfig) -> str | None:
        """Train and evaluate. Return the reason of a failure, or None."""
        run, eval_config = self.runs[tree.name]
        with redirect_output(run.config.folder.with_name(f"{tree.name}.log")):
            try:
                train_run(build_config(TrainingRun, tree))
                evaluate_run(eval_config)
                write_json(run.config.folder / "ladder.json", run.completion_record())
            except (ConfigError, RunError) as error:
                print(error, file=sys.stderr)
                return f"{type(error).__name__}: {error}"
            except Exception as error:
                traceback.print_exc()
                return f"{type(error).__name__}: {error}"
        return None


def train_run(config: TrainingRun) -> None:
    from glalm.evals.in_training import make_evaluator
    from glalm.train.trainer import train

    signum = train(config, make_evaluator(config) if config.train_evals.evals else None)
    if signum:
        raise RunError(f"stopped by signal {signum}")


def evaluate_run(config: EvalConfig) -> None:
    from glalm.evals.runner import evaluate

    evaluate(config)


@contextmanager
def redirect_output(log: Path) -> Iterator[None]:
    """Append all that this process writes to its standard output and error to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
        try:
            for descriptor in saved:
                os.dup2(file.fileno(), descriptor)
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for descriptor, copy in saved.items():
                os.dup2(copy, descriptor)
                os.close(copy)


@contextmanager
def show_progress(runs: list[LadderRun]) -> Iterator[None]:
    """Show how much of the runs' training is done and how long the rest will take, from their metrics.jsonl.

    On a terminal this is a bar, elsewhere a line whenever PROGRESS_PERCENT more is done.
    """
    ended = threading.Event()
    with ProgressBar() as bar:
        watcher = threading.Thread(target=watch_runs, args=(runs, bar, ended), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


PROGRESS_SECONDS = 2.0
PROGRESS_PERCENT = 5


def watch_runs(runs: list[LadderRun], bar: ProgressBar, ended: threading.Event) -> None:
    total = sum(run.config.tokens_at(run.config.steps) for run in runs)
    first = sum(trained_tokens(run) for run in runs)
    start = time.monotonic()
    shown = first
    complete: list[LadderRun] = []
    bar.start_task(f"{len(runs)} runs", total=total, completed=first)
    is_last = False
    while not is_last:
        is_last = ended.wait(PROGRESS_SECONDS)
        for run in runs:
            if run not in complete and run.is_complete():
                complete.append(run)
                bar.log(f"{len(complete)}/{len(runs)} {run.config.name}: {describe_score(run)}")
        done = sum(trained_tokens(run) for run in runs)
        bar.update(completed=done, status=f"{done / total:.0%} of the tokens")
        if not bar.is_drawn and done - shown >= total * PROGRESS_PERCENT / 100:
            shown = done
            left = (time.monotonic() - start) * (total - done) / (done - first)
            bar.log(f"{done / total:.0%} of the tokens, about {format_seconds(left)} of training left")


def describe_score(run: LadderRun) -> str:
    return f"perplexity {run.results('perplexity')['results']['perplexity']:.2f}"


def trained_tokens(run: LadderRun) -> int:
    """Return the tokens that a run has been trained on, by its metrics.jsonl."""
    rows, _ = read_metrics(run.config.folder / "metrics.jsonl")
    return run.config.tokens_at(rows[-1]["step"]) if rows else 0


def format_seconds(seconds: float) -> str:
    """Return a duration as 40 s, 12 min or 5.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
