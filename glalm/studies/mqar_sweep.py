"""The sweep of multi-query associative recall: a model for every mixer, length, width and learning rate."""

import itertools
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryFile

import torch

from glalm.config.strict import ConfigError, RunError
from glalm.evals.identity import ResultIdentity
from glalm.evals.plot import plot_mqar
from glalm.evals.result_files import load_results, save_result
from glalm.prepare.workers import bind_to_parent
from glalm.studies.mqar import Job, MQARConfig, train
from glalm.train.run_lock import RunLock, lock_run_dir


def main(config: MQARConfig) -> int:
    """Train what is missing in config.folder, and draw the figure of all results there.

    Raises ConfigError if the folder cannot be written or is in use, and RunError if some models could not be trained.
    """
    folder = Path(config.folder)
    check_writable(folder)
    with lock_run_dir(folder) as lock:
        return run_sweep(config, folder, lock)


def check_writable(folder: Path) -> None:
    """Raise ConfigError if results could not be written, before any model is trained."""
    try:
        for part in ("eval", "partial", "plots"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder / part).close()
    except OSError as error:
        raise ConfigError(f"folder={folder}: nothing can be written there ({error}); choose another folder") from error


def run_sweep(config: MQARConfig, folder: Path, lock: RunLock) -> int:
    settings = config.settings()
    results: dict[Job, dict] = {}
    saved = {record.get("identity"): record for record in load_results(folder, skip_damaged=True).values()}
    for job in list_jobs(config):
        if found := saved.get(identify_job(config, job).digest):
            results[job] = found["results"]
    missing = [job for job in list_jobs(config) if job not in results and not is_solved(config, job, results)]
    print(
        f"{folder}: {len(results)} models are trained, at most {len(missing)} remain, {config.workers} at once",
        flush=True,
    )
    failures = []
    for n, (job, future) in enumerate(train_all(config, missing, results), 1):
        progress = f"{n}/{len(missing)} {job.name}"
        if error := future.exception():
            failures.append(f"{job.name}: {type(error).__name__}: {error}")
            print(f"{n}/{len(missing)} {failures[-1]}", file=sys.stderr, flush=True)
            continue
        results[job] = result = asdict(job) | future.result()
        record = identify_job(config, job).to_record() | {"settings": settings, "results": result}
        lock.renew()  # Another sweep may have the folder if its lock was removed.
        save_result(folder, record, job.name)
        partial_path(folder, job).unlink(missing_ok=True)
        print(
            f"{progress}: accuracy {result['accuracy']:.3f} after {result['epochs']} epochs, {result['seconds']:.0f} s",
            flush=True,
        )
    if results:
        for figure in plot_mqar([{"results": result} for result in results.values()], folder / "plots" / "mqar.png"):
            print(f"wrote {figure}")
    if failures:
        raise RunError(f"{len(failures)} models were not trained: {'; '.join(failures)}")
    return 0


def list_jobs(config: MQARConfig) -> list[Job]:
    """Return every model of the sweep in the order of training.

    The first learning rate comes first, because it may save the others; within a rate the longest sequences come first,
    so that the slowest models do not start last.
    """
    shapes = sorted(zip(config.lengths, config.pairs, strict=True), reverse=True)
    widths = sorted(config.widths, reverse=True)
    axes = itertools.product(config.learning_rates, shapes, widths, config.mixers)
    return [Job(mixer, length, pairs, width, lr) for lr, (length, pairs), width, mixer in axes]


def is_solved(config: MQARConfig, job: Job, results: dict[Job, dict]) -> bool:
    """Return whether this model has reached `stop_at` at any learning rate."""
    same_task = (replace(job, lr=lr) for lr in config.learning_rates)
    return any(other in results and results[other]["accuracy"] >= config.stop_at for other in same_task)


def train_all(config: MQARConfig, jobs: list[Job], results: dict[Job, dict]) -> Iterator[tuple[Job, Future]]:
    """Train the jobs in a pool of processes, and yield each with its future when it ends.

    A job is skipped if another learning rate has solved its task by then; the caller adds results to `results`.
    """
    waiting = deque(enumerate(jobs))
    running: dict[Future, Job] = {}
    with ProcessPoolExecutor(config.workers, get_context("spawn"), bind_to_parent) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < config.workers:
                    number, job = waiting.popleft()
                    if not is_solved(config, job, results):
                        running[submit(pool, train_job, config, number, job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future
        except KeyboardInterrupt:
            print("Interrupted. Run the same command to resume each model after its last epoch.", file=sys.stderr)
            sys.stderr.flush()
            os._exit(130)  # Leaving the pool normally would wait for all models in training.


def submit(pool: Executor, *call) -> Future:
    """Submit a call. If a killed process has broken the pool, return a future with that error."""
    try:
        return pool.submit(*call)
    except BrokenExecutor as error:
        failed = Future()
        failed.set_exception(error)
        return failed


def train_job(config: MQARConfig, number: int, job: Job) -> dict:
    """Train one model in a process of the pool, on the GPUs in turn or on one CPU core."""
    torch.set_num_threads(1)  # The models share the cores.
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", number % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    return train(config, job, device, partial_path(Path(config.folder), job))


def identify_job(config: MQARConfig, job: Job) -> ResultIdentity:
    """Return what the result of one model of the sweep depends on."""
    return ResultIdentity("mqar", None, "", config.settings() | asdict(job))


def partial_path(folder: Path, job: Job) -> Path:
    """Return where a model in training is saved."""
    return folder / "partial" / f"{job.name}.safetensors"
