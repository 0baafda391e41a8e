"""Run evaluators on a model and write the results of each to a JSON file."""

import dataclasses
import importlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from rich.text import Text

from glalm.config.strict import ConfigError, RunError, require
from glalm.data.files import printable
from glalm.data.shards import split_sha256
from glalm.evals.eval_model import EvalModel
from glalm.evals.evaluator import EvalContext, Evaluator, missing_tasks
from glalm.evals.identity import ResultIdentity
from glalm.evals.inputs import check_data_path, open_eval_model, open_split, open_text
from glalm.evals.options import EVALUATORS, EvalConfig
from glalm.evals.plot import plot_training
from glalm.evals.result_files import find_result, require_writable, save_result
from glalm.kernels.context_parallel import ContextShard
from glalm.progress import LINE_SECONDS, ProgressBar
from glalm.train.collectives import rank_and_world_size
from glalm.train.environment import describe_environment
from glalm.train.parallel import find_context_shard, join_process_group
from glalm.train.run_lock import lock_run_dir
from glalm.train.trackers import RunTracker


def evaluate(config: EvalConfig) -> dict[str, str]:
    """Run `config.evals` on the model that `config.checkpoint` names.

    Each evaluator writes FOLDER/eval/NAME.json and its figures in FOLDER/plots/, where FOLDER is the run's, and prints
    a summary; see `save_result` for results of several identities. A result of equal identity is not computed again,
    unless `config.force`. An evaluator that fails does not stop the others. Processes of torchrun or accelerate launch
    share each evaluator's work.

    Returns:
        The identity of each evaluator's result, {evaluator: ResultIdentity.digest}, by which its file is found.

    Raises:
        ConfigError: The model cannot be opened, or it cannot read `config.text` or `config.data_path`.
        RunError: After the last evaluator, where one failed.
    """
    # What is wrong with the text is said once, and not by each evaluator.
    require(
        config.text is None or Path(config.text).expanduser().is_file(), f"text={config.text}: there is no such file"
    )
    if config.data_path is not None:
        check_data_path(config.data_path)
    processes = config.parallel.context
    device = start_processes(processes)
    shard = find_context_shard(processes, device)
    rank, world_size = rank_and_world_size()
    transformers.utils.logging.disable_progress_bar()
    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=rank != 0)
    model = open_eval_model(config, device)
    model.require_context_support(processes)
    devices = f"{world_size} x {device.type}" if world_size > 1 else str(device)
    sharing = f", {processes} to a text" if shard is not None else ""
    average = ", moving average of the weights" if model.weights == "average" else ""
    console.print(
        f"{model.name}: {model.parameters / 1e6:.1f}M parameters{average}, {devices}{sharing}, {model.precision}"
    )
    if config.text is not None:
        open_text(config, model)
    elif config.data_path is not None:
        open_split(config, model, "validation")
    identities, failures = run_evaluators(model, config, console, shard)
    if rank == 0 and (model.output_folder / "metrics.jsonl").exists():
        draw_training(model.output_folder, console)
    if failures:
        raise RunError(f"{len(failures)} of {len(config.evals)} evaluators failed (see above): {', '.join(failures)}")
    return identities


def run_evaluators(
    model: EvalModel, config: EvalConfig, console: Console, shard: ContextShard | None
) -> tuple[dict[str, str], list[str]]:
    """Run all evaluators and print the errors of those that fail.

    Returns the identities of the others' results, {evaluator: digest}, and the names of those that failed.
    """
    identities = {}
    failures = []  # Only names: an error would keep the memory alive that was in use where it was raised.
    with open_tracker(model, console) as tracker:
        for name in dict.fromkeys(config.evals):
            context = EvalContext(shard)
            try:
                with context.raise_on_all_ranks():
                    identities[name] = run_evaluator(name, model, config, console, context, tracker)
            except Exception as error:
                failures.append(name)
                console.print(Text(f"{name} failed: {type(error).__name__}: {error}", style="red"))
                is_for_users = isinstance(error, (ConfigError, RunError))
                if not is_for_users and not console.quiet:
                    # sys.excepthook may be a tracker's, which would keep the error, and with it the evaluator's memory.
                    traceback.print_exception(error)
    return identities, failures


@contextmanager
def open_tracker(model: EvalModel, console: Console) -> Iterator[RunTracker]:
    """Open the tracker of the model's run, to add texts and figures to it.

    It logs nothing where there is no such tracker, on other ranks than the first, for results outside of the run's
    folder, and while the run trains.
    """
    run = model.run_config
    folder = model.output_folder
    is_tracked = run is not None and run.track.tracker != "none" and (folder / "run.json").is_file()
    with ExitStack() as stack:
        if is_tracked and not console.quiet:
            PartialState(cpu=True)  # Accelerate's trackers ask it whether they are on the main process.
            try:
                stack.enter_context(lock_run_dir(folder))
            except ConfigError:
                console.print(f"{run.track.tracker} does not receive these results, because the run is training now.")
                is_tracked = False
        enabled = is_tracked and not console.quiet
        tracker = RunTracker(folder, run, model.model_id, None, console.print, enabled)
        yield tracker
        tracker.finish()


def draw_training(folder: Path, console: Console) -> None:
    """Draw the losses of the run in `folder`. Its metrics may be damaged, which concerns no evaluator."""
    try:
        for path in plot_training(folder / "metrics.jsonl", folder / "plots" / "training.png"):
            console.print(f"wrote {path}")
    except Exception as error:
        console.print(f"{folder / 'plots' / 'training.png'} was not drawn: {error}")


def start_processes(context: int = 1) -> torch.device:
    """Join the processes that the launcher started, and return this one's device.

    Only results are exchanged, and those are on the host, unless `context` processes share each text.
    """
    join_process_group(use_cpu=context == 1 or not torch.cuda.is_available())
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    torch.cuda.set_device(device)
    return device


def run_evaluator(
    name: str, model: EvalModel, config: EvalConfig, console: Console, context: EvalContext, tracker: RunTracker
) -> str:
    """Run one evaluator, or reuse its finished results; print its summary, draw its figures, and log both.

    Returns the digest of the result's identity.

    Raises:
        RunError: Some of its tasks are missing.
    """
    folder = model.output_folder
    evaluator = build_evaluator(name, model, config)
    if context.shard is not None and not evaluator.shares_texts:
        console.print(f"{name} ignores parallel.context: each process reads texts of its own")
        context.shard = None
    identity = identify_result(name, evaluator, model)
    partial_path = folder / "eval" / f".{name}-{identity.digest[:12]}.parts.json"
    record = context.run_on_rank_0(lambda: None if config.force else find_result(folder, identity))
    is_finished = record is not None and not missing_tasks(record["results"])
    if not is_finished:
        context.run_on_rank_0(lambda: require_writable(partial_path.parent))
        if config.force and context.rank == 0:
            partial_path.unlink(missing_ok=True)
        context.use_partial_results(partial_path, identity.to_record())
        record = compute_record(evaluator, identity, model, config, context)
    path = context.run_on_rank_0(lambda: save_result(folder, record, name))
    console.print(f"{path} is up to date; to evaluate again, add force=true" if is_finished else f"wrote {path}")
    lines = evaluator.summarize(record["results"])
    for line in lines:
        console.print(Text(line))
    tracker.log_text(path.stem, "\n".join(lines), model.step)
    if context.rank == 0:
        is_main = path.stem == name
        for figure_path in evaluator.plot_results(record, folder / "plots" / ("" if is_main else path.stem)):
            console.print(f"wrote {figure_path}")
            if figure_path.suffix == ".png":
                tracker.log_figure(figure_path.stem, figure_path, model.step)
    if missing := missing_tasks(record["results"]):
        raise RunError(f"these tasks were not evaluated: {', '.join(missing)}")
    if context.rank == 0:
        partial_path.unlink(missing_ok=True)
    return identity.digest


def build_evaluator(name: str, model: EvalModel, config: EvalConfig) -> Evaluator:
    """Return the evaluator called `name`. Its module is only imported here."""
    module, _, class_name = EVALUATORS[name].partition(":")
    try:
        return getattr(importlib.import_module(module), class_name)(model, config)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "lm_eval":
            raise ConfigError(f"evals=[{name}] needs lm-eval: pip install -c constraints.txt -e '.[eval]'") from error
        raise


def compute_record(
    evaluator: Evaluator, identity: ResultIdentity, model: EvalModel, config: EvalConfig, context: EvalContext
) -> dict:
    """Run an evaluator, and return the content of its eval/NAME.json."""
    start_time = time.perf_counter()
    with show_progress(identity.evaluator, evaluator, context), model.autocast():
        results = evaluator.run(context)
    return {
        **describe_model(model, config, context),
        **identity.to_record(),
        "own_text": is_own_text(identity, model, config),
        "results": results,
        "metrics": evaluator.metrics(results),
        "seconds": time.perf_counter() - start_time,
    }


@contextmanager
def show_progress(name: str, evaluator: Evaluator, context: EvalContext) -> Iterator[None]:
    """Show a progress bar that `context.advance` moves, or a line now and then where no bar can be drawn."""
    with ProgressBar(quiet=context.rank != 0, line_seconds=LINE_SECONDS) as bar:
        bar.start_task(name, evaluator.total_units)

        def advance(units: float) -> None:
            done = bar.completed + units * context.groups  # The other groups are about as far.
            bar.update(done, status=f"{done:,.0f} {evaluator.unit}  {bar.speed:,.0f} {evaluator.unit}/s")

        context.advance = advance
        yield


# ------------------------------------------------------------------------------------------------------ the record


def identify_result(name: str, evaluator: Evaluator, model: EvalModel) -> ResultIdentity:
    """Return what the results depend on. A result of equal identity is not computed again."""
    settings = {
        **evaluator.settings,
        "precision": model.precision,
        "tokenizer": model.tokenizer and model.tokenizer.fingerprint,
        "document_prefix": model.document_prefix,
        **({"weights": model.weights} if model.weights != "current" else {}),
    }
    checkpoint = model.name.partition("/")[2] if model.run_config else None
    return ResultIdentity(name, checkpoint, model.checksum, json.loads(json.dumps(settings)))


def is_own_text(identity: ResultIdentity, model: EvalModel, config: EvalConfig) -> bool | None:
    """Return whether the text read is of the set that the run was trained on. None: there is no run, or no text."""
    settings = identity.settings
    if model.run_config is None or "data_sha256" not in settings:
        return None
    manifest = model.data_manifest
    if not manifest:
        return config.data_path is None and config.text is None
    split = settings.get("split")
    return split in manifest["splits"] and settings["data_sha256"] == split_sha256(manifest, split)


def describe_model(model: EvalModel, config: EvalConfig, context: EvalContext) -> dict:
    """Return the part of an evaluator's record that says what was evaluated, and by what."""
    run_config = model.run_config
    made_by = describe_environment(model.device)
    with suppress(metadata.PackageNotFoundError):
        made_by["versions"]["lm-eval"] = metadata.version("lm-eval")
    other_config = {"model_type": model.causal_lm.config.model_type}
    return {
        "model": printable(model.name),
        "model_id": model.model_id,
        "run": run_config.name if run_config else None,
        "checkpoint": model.name.partition("/")[2] if run_config else config.checkpoint,
        "parameters": model.parameters,
        "train_length": model.train_length,
        "model_config": dataclasses.asdict(run_config.model) if run_config else other_config,
        "processes": context.world_size,
        "batch_size": config.batch_size,
        **made_by,
    }
