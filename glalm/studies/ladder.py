"""Train and evaluate many models at one size and token budget, as jobs of one of Hydra's launchers."""

import argparse
import copy
import itertools
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

from omegaconf import DictConfig

from glalm.cli import CONFIGS, build_config, check_plugins, compose_config, launch_jobs
from glalm.config.strict import ConfigError, RunError, check_overrides, require
from glalm.data.shards import read_manifest, require_set
from glalm.evals.options import EvalConfig, TrainingRun
from glalm.evals.result_files import load_results, read_json, write_json
from glalm.launcher import register_launcher
from glalm.model.mixers import MIXERS
from glalm.studies.ladder_arguments import ABLATIONS, named_models
from glalm.studies.ladder_progress import RunStatus, clear_status, log_path, show_progress, summarize_end
from glalm.train.run_lock import lock_run_dir

# A forward pass costs a third of a training step.
EVALUATION_COST = 1 / 3


@dataclass(frozen=True)
class LadderRun:
    """One model of the comparison: `glalm train` and then `glalm eval`, with these arguments."""

    model: str  # a preset without its size, a key of ABLATIONS, or a mixer of the user's as package.module:Class
    lr: float | None  # one of --lrs, or None without that option
    config: TrainingRun
    train_arguments: list[str]
    eval_arguments: list[str]
    eval_config: EvalConfig

    @property
    def training_tokens(self) -> int:
        return self.config.tokens_at(self.config.steps)

    @cached_property
    def work(self) -> float:
        """The run's training and evaluation, as a number of trained tokens that take as many FLOPs.

        Only perplexity and extrapolation are counted, and only on prepared data that is on this machine. A sliding
        window reads its text twice.
        """
        config = self.eval_config
        try:
            splits = read_manifest(Path(config.data_path or self.config.data.path))["splits"]
        except (OSError, ValueError):
            return self.training_tokens
        read = 0
        if "perplexity" in config.evals:
            read += splits["validation"]["tokens"]
        if "extrapolation" in config.evals:
            options = config.extrapolation
            tokens = splits[options.split]["tokens"]
            if options.documents is not None:
                tokens = min(tokens, options.documents * options.max_length)
            read += tokens * (len(options.contexts) + options.contexts.count("sliding_window"))
        return self.training_tokens + EVALUATION_COST * read

    def results(self, evaluator: str) -> dict | None:
        """Return the result that the ladder itself evaluated for this run, not one of another evaluation.

        None: The run is not complete, or the result was removed since.
        """
        saved = read_json(self.config.folder / "ladder.json") or {}
        digest = saved.get("results", {}).get(evaluator)
        records = load_results(self.config.folder, skip_damaged=True).values()
        return next((record for record in records if digest and record.get("identity") == digest), None)

    def completion_record(self) -> dict:
        """Return what is written once both commands have succeeded: the resolved config, whatever set its values.

        The identities of the results are written with it, as "results".
        """
        return json.loads(json.dumps({"train": asdict(self.config), "evaluate": self.eval_arguments}))

    def is_complete(self) -> bool:
        saved = read_json(self.config.folder / "ladder.json") or {}
        evaluators = saved.pop("results", {})
        return saved == self.completion_record() and bool(evaluators) and all(map(self.results, evaluators))


def run_ladder(args: argparse.Namespace) -> int:
    """Run what is missing and write the table. Return the exit code.

    Raises:
        ConfigError: Something is wrong that would also stop a run, or its folder is in use. Nothing has been started.
    """
    runs = plan_runs(args)
    missing = [run for run in runs if not run.is_complete()]
    if args.dry_run:
        check_plan(runs, missing)
        return 0
    print(f"{len(runs)} runs, {len(missing)} to do", flush=True)
    args.folder.mkdir(parents=True, exist_ok=True)
    with lock_run_dir(args.folder, "--folder"):
        if missing:
            check_runs(runs)
        ends = run_all(missing, args) if missing else []
        complete = [run for run in runs if run.is_complete()]
        if complete:
            from glalm.studies.ladder_results import write_results  # It imports matplotlib, which takes seconds.

            write_results(complete, runs, args)
    print(*ends, sep="\n", end="\n" if ends else "", file=sys.stderr)
    return 1 if ends else 0


def check_plan(runs: list[LadderRun], missing: list[LadderRun]) -> None:
    """Check what is missing, and print what it would cost."""
    try:
        if missing:
            check_runs(runs)
    except ConfigError as error:
        if not runs[0].config.train.assumed_gpu:
            raise
        # The machine that is planned for may have the data.
        print(f"On this machine the runs would be refused: {error}", file=sys.stderr)
    print(f"{len(runs)} runs: measuring the speed of each model ...", file=sys.stderr, flush=True)
    from glalm.studies.ladder_results import print_cost

    print_cost(runs, missing)


def plan_runs(args: argparse.Namespace) -> list[LadderRun]:
    """Return all runs of the command line with their checked configs. Raises ConfigError."""
    overrides = [argument for argument in args.arguments if "=" in argument]
    models = named_models(args) or [*MIXERS, "hybrid"]
    set_by = {"model": "NAME", "model.mixer": "NAME", "model.layers": "NAME", "experiment": "--size", "seed": "--seeds"}
    set_by |= {"name": "NAME", "runs_dir": "--folder", "resume": "--folder", "train.dry_run": "--dry-run"}
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
    runs = [plan_run(model, lr, seed, args, overrides) for seed, lr, model in axes]
    check_evaluation(runs[0].eval_config)
    return runs


def check_evaluation(config: EvalConfig) -> None:
    """Raise ConfigError if --eval, which is the same for all runs, lacks what the table needs or names no data."""
    require(
        "perplexity" in config.evals,
        f"--eval evals=[{','.join(config.evals)}] lacks perplexity, by which the table is sorted. Add it",
    )
    if config.data_path is not None:
        require_set(f"--eval data_path={config.data_path}", Path(config.data_path))


def refuse_keys(overrides: list[str], set_by: dict[str, str]) -> None:
    """Raise ConfigError for a key that the ladder sets itself, because its table would describe other runs."""
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        require(key not in set_by, f"{key}=... is set for each run, by {set_by.get(key)}. Remove it")


def plan_run(model: str, lr: float | None, seed: int, args: argparse.Namespace, overrides: list[str]) -> LadderRun:
    """Return one run with its checked config. Raises ConfigError."""
    own_mixers = [model] if ":" in model else []
    # What is not a preset of its own changes GLA's.
    changes = ABLATIONS.get(model, [f"model.mixer={mixer}" for mixer in own_mixers])
    preset = f"model={'gla' if changes else model}_{args.size}"
    label = model.replace(":", ".")
    name = f"{label}-{seed}" if lr is None else f"{label}-lr-{lr:g}-{seed}"
    folder_arguments = [f'name="{name}"', f'runs_dir="{args.folder}"']
    overrides = [override for override in overrides if not override.startswith("hydra")]
    config = compose_model((f"experiment=ladder_{args.size}", preset, *overrides))
    train_arguments = [f"experiment=ladder_{args.size}", preset, *folder_arguments, f"seed={seed}", *overrides]
    if lr is not None:
        train_arguments += [f"optim.lr={lr:g}"]
        if not any(override.startswith("optim.min_lr=") for override in overrides):
            train_arguments += [f"optim.min_lr={lr * config.optim.min_lr / config.optim.lr:g}"]
    sizes = {"length": config.data.seq_len, "window": 12 * config.data.seq_len, "tokens": config.tokens_per_step}
    train_arguments += [override.format(**sizes) for override in changes]
    config = compose_config(TrainingRun, "train", train_arguments)
    eval_arguments = [*folder_arguments, *list_eval_arguments(config), *args.eval]
    # A run's files may not say what is imported.
    eval_arguments += [f"mixers=[{mixer}]" for mixer in own_mixers]
    # Jobs and the thread that watches them cannot compose it, because Hydra is in use while they run.
    eval_config = compose_config(EvalConfig, "eval", eval_arguments)
    return LadderRun(model, lr, config, train_arguments, eval_arguments, eval_config)


def list_eval_arguments(config: TrainingRun) -> list[str]:
    """Return how every run of the ladder is evaluated, unless --eval says otherwise."""
    # Models trained in segments are evaluated like the others, by the length of a segment.
    length = config.train.tbptt_length or config.data.seq_len
    return [
        "evals=[perplexity,extrapolation]",
        f"train_length={length}",
        f"extrapolation.max_length={10 * length}",
        "extrapolation.contexts=[stateful]",
    ]


@cache
def compose_model(arguments: tuple[str, ...]) -> TrainingRun:
    """Return the config that the runs of one model share, but for their names, seeds and rates."""
    return compose_config(TrainingRun, "train", [*arguments])


def check_runs(runs: list[LadderRun]) -> None:
    """Raise ConfigError where training would refuse a run for its data, or for another config in its folder.

    Complete runs are checked, too, because the table compares the others with them.
    """
    from glalm.train import run_dir  # It imports transformers, which takes seconds.

    checked = set()
    for run in runs:
        is_started = run_dir.has_started(run.config.folder)
        if run.model in checked and not is_started:
            continue  # Only rates and seeds differ, which the data does not depend on.
        checked.add(run.model)
        config = copy.deepcopy(run.config)  # `open_data` sets a vocabulary of null.
        training, _ = run_dir.open_data(config)
        saved = run_dir.read_saved_record(config.folder) if is_started else None
        if saved is None:
            continue
        changes = run_dir.find_changes(config, saved["identity"], run_dir.identify_run(config, training.tokens))
        differences = "\n  ".join(changes)
        require(
            not changes,
            f"{config.folder} holds a run with another config:\n  {differences}\nTo resume the runs of that folder, "
            "write the old values. To start new runs, choose another --folder.",
        )


# --------------------------------------------------------------------------------------------------------- running


def run_all(missing: list[LadderRun], args: argparse.Namespace) -> list[str]:
    """Run what is missing by a launcher of Hydra. Return lines that say what is not complete, and why."""
    launcher = [argument for argument in args.arguments if argument.startswith("hydra")]
    if not any(argument.startswith("hydra/launcher=") for argument in launcher):
        launcher += ["hydra/launcher=processes", f"hydra.launcher.at_once={args.at_once}"]
    launcher.append(f'hydra.sweep.dir="{args.folder}"')
    for run in missing:
        clear_status(run)
    reasons = None
    try:
        with show_progress(missing):
            jobs = [run.train_arguments for run in missing]
            task = TrainAndEvaluate({run.config.name: run for run in missing})
            reasons = launch_jobs(TrainingRun, "train", task, launcher, jobs)
    except KeyboardInterrupt:
        pass  # The runs' statuses say which of them were stopped.
    # submitit's jobs do not end with the process that submitted them.
    outlive = any(argument.startswith("hydra/launcher=submitit") for argument in launcher)
    return summarize_end(missing, reasons, "still running as jobs" if outlive else "stopped")


@dataclass(frozen=True)
class TrainAndEvaluate:
    """What a launcher calls for each of `runs`, by their names. What it prints is appended to FOLDER/NAME.log."""

    runs: dict[str, LadderRun]

    def __call__(self, tree: DictConfig) -> str | None:
        """Train and evaluate. Return the reason of a failure, or None."""
        run = self.runs[tree.name]
        with redirect_output(log_path(run)):
            try:
                from glalm.evals import runner  # It imports transformers, which takes seconds.

                RunStatus("training").write(run)
                signum = train_run(build_config(TrainingRun, tree))
                if signum:
                    RunStatus("stopped").write(run)
                    return f"stopped by signal {signum}"
                RunStatus("evaluating").write(run)
                results = runner.evaluate(run.eval_config)
                write_json(run.config.folder / "ladder.json", run.completion_record() | {"results": results})
                clear_status(run)
                return None
            except Exception as error:
                if isinstance(error, (ConfigError, RunError)):
                    print(error, file=sys.stderr)
                else:
                    traceback.print_exc()
                reason = f"{type(error).__name__}: {error}"
                RunStatus("failed", reason).write(run)
                return reason


def train_run(config: TrainingRun) -> int:
    """Train, and return 0 or the number of the signal that stopped the run."""
    from glalm.evals.in_training import make_evaluator
    from glalm.train.trainer import train

    return train(config, make_evaluator(config) if config.train_evals.evals else None)


@contextmanager
def redirect_output(log: Path) -> Iterator[None]:
    """Append all that this process writes to its standard output and error to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
        try:
            sys.stdout.flush()  # What was printed before is not of this run.
            sys.stderr.flush()
            for descriptor in saved:
                os.dup2(file.fileno(), descriptor)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in saved.items():
                os.dup2(original, descriptor)
                os.close(original)
