"""Runs evaluators on a model and writes what each finds into a JSON file of its own."""

import atexit
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from glalm.config.strict import ConfigError, RunError
from glalm.evals.eval_model import Subject, open_subject
from glalm.evals.evaluator import Job, Work, lacking
from glalm.evals.options import EVALUATORS, EvalConfig
from glalm.evals.plot import plot_training
from glalm.evals.result_files import read_json, write_json


def evaluate(config: EvalConfig) -> int:
    """Runs config.evals on what config.checkpoint names: writes FOLDER/eval/NAME.json of each and FOLDER/plots/, where
    FOLDER is the run's, and prints what they say in short and the paths. Returns 0.

    An evaluator that is finished already, with the same settings and weights, is not run again (but with
    config.force). One that fails does not keep the others from running. Started by torchrun or accelerate launch, the
    processes share each evaluator's work.

    Raises ConfigError when the model cannot be opened, and RunError, after the last evaluator, when one failed.
    """
    rank, world, device = processes()
    transformers.utils.logging.disable_progress_bar()
    console = Console(highlight=False, soft_wrap=True, quiet=rank != 0)
    subject = open_subject(config, device)
    where = f"{world} x {device.type}" if world > 1 else str(device)
    console.print(f"{subject.name}: {subject.parameters / 1e6:.1f}M parameters, {where}, {subject.precision}")
    failures = []  # their names alone: an error holds on to what was in memory where it was raised
    for name in dict.fromkeys(config.evals):
        work = Work(rank, world)
        try:
            run_one(name, subject, config, console, work)
            work.agree()
        except Exception as error:  # whatever it is, the other evaluators have nothing to do with it
            work.fail(error)
            failures.append(name)
            explain(name, error, console)
    metrics = subject.folder / "metrics.jsonl"
    if rank == 0 and metrics.is_file():
        for plot in plot_training(metrics, subject.folder / "plots" / "training.png"):
            console.print(f"wrote {plot}")
    if failures:
        raise RunError(f"of {len(config.evals)} evaluators, these failed, as said above: {', '.join(failures)}")
    return 0


def run_one(name: str, subject: Subject, config: EvalConfig, console: Console, work: Work) -> None:
    """One evaluator, from its inputs to its file. Raises RunError if the results say that something was `missing`."""
    path, parts = subject.folder / "eval" / f"{name}.json", subject.folder / "eval" / f".{name}.parts.json"
    job = make_job(name, subject, config)
    wanted = json.loads(json.dumps({"checksum": subject.checksum, "settings": settings(job, subject)}))
    result = work.first(lambda: None if config.force else finished(path, wanted))
    if result is not None:
        console.print(f"{path} is there already; force=true makes it again")
    else:
        if config.force and work.rank == 0:
            parts.unlink(missing_ok=True)
        work.keep_parts(parts, wanted)
        begun = time.perf_counter()
        with progress(name, job, work), subject.autocast():
            results = job.run(work)
        seconds = time.perf_counter() - begun
        found = {"results": results, "metrics": job.metrics(results), "seconds": seconds}
        result = record(name, subject, config, work) | wanted | found
        if work.rank == 0:
            write_json(path, result)
            console.print(f"wrote {path}")
    for line in job.summary(result["results"]):
        console.print(Text(line))
    for plot in job.plots(result, subject.folder / "plots") if work.rank == 0 else ():
        console.print(f"wrote {plot}")
    if missing := lacking(result["results"]):
        raise RunError(f"done but for {', '.join(missing)}")
    if work.rank == 0:
        parts.unlink(missing_ok=True)


def explain(name: str, error: Exception, console: Console) -> None:
    console.print(Text(f"{name} failed: {type(error).__name__}: {error}", style="red"))
    if not isinstance(error, (ConfigError, RunError)) and not console.quiet:
        sys.excepthook(type(error), error, error.__traceback__)


def make_job(name: str, subject: Subject, config: EvalConfig) -> Job:
    module, _, function = EVALUATORS[name].partition(":")
    try:
        return getattr(importlib.import_module(module), function)(subject, config)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "lm_eval":
            raise ConfigError(f"evals=[{name}] needs lm-eval: pip install -c constraints.txt -e '.[eval]'") from error
        raise


def finished(path: Path, wanted: dict) -> dict | None:
    """The evaluator's record, if it is of the same weights and settings and lacks nothing."""
    result = read_json(path)
    if result is None or any(result.get(key) != value for key, value in wanted.items()):
        return None
    return None if lacking(result["results"]) else result


# ------------------------------------------------------------------------------------------------------ the record


def settings(job: Job, subject: Subject) -> dict:
    tokenizer = subject.tokenizer and subject.tokenizer.fingerprint
    return job.settings | {"precision": subject.precision, "tokenizer": tokenizer, "start": list(subject.start)}


def record(name: str, subject: Subject, config: EvalConfig, work: Work) -> dict:
    run = subject.run
    return {
        "evaluator": name,
        "model": subject.name,
        "run": run.name if run else None,
        "checkpoint": subject.name.partition("/")[2] if run else config.checkpoint,
        "parameters": subject.parameters,
        "train_length": subject.train_length,
        # What tells two models apart in a table.
        "model_config": dataclasses.asdict(run.model) if run else {"model_type": subject.model.config.model_type},
        "versions": versions(),
        "device": subject.device_name,
        "processes": work.world,
        "batch_size": config.batch_size,
    }


def versions() -> dict[str, str]:
    found = {}
    for name in ("glalm", "torch", "transformers", "lm-eval"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"python": platform.python_version()}


def processes() -> tuple[int, int, torch.device]:
    """This process's number, how many there are, and its device. They exchange results only: over gloo, by the host."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
        atexit.register(torch.distributed.destroy_process_group)  # its threads would abort one process in six
    if not torch.cuda.is_available():
        return rank, world, torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    torch.cuda.set_device(device)
    return rank, world, device


# ------------------------------------------------------------------------------------------------------ the console


@contextmanager
def progress(name: str, job: Job, work: Work) -> Iterator[None]:
    """A bar on stderr, when that is a terminal, that the work moves."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), Rate(job.unit), TimeRemainingColumn())
    hidden = work.rank != 0 or not console.is_terminal
    with Progress(*columns, TextColumn("left"), console=console, disable=hidden) as bar:
        task = bar.add_task(name, total=job.total)
        work.advance = lambda done: bar.advance(task, done * work.world)  # the others are about as far
        yield


class Rate(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed or 0
        return Text(f"{int(task.completed):,} {self.unit}  {speed:,.0f} {self.unit}/s")
