"""The sweep of multi-query associative recall: a model for every mixer, length, width and learning rate."""

import itertools
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from glalm.cli import launch_jobs
from glalm.config.strict import ConfigError, RunError
from glalm.evals.identity import ResultIdentity
from glalm.evals.plot import plot_mqar
from glalm.evals.result_files import load_results, save_result
from glalm.model.mixers import import_user_mixers
from glalm.studies.mqar import Job, MQARConfig, describe_model, hash_user_code, train
from glalm.train.run_lock import RunLock, lock_run_dir


def main(config: MQARConfig, launcher: Sequence[str] = ()) -> int:
    """Train what is missing in config.folder, and draw the figure of all results there.

    `launcher` are overrides that choose a launcher of Hydra and its options. Without them, one model is trained after
    the other in this process.

    Raises ConfigError if the folder cannot be written or is in use, or a model cannot have its width, and RunError if
    some models could not be trained.
    """
    folder = Path(config.folder)
    try:
        for part in ("eval", "partial", "plots"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder / part).close()
    except OSError as error:
        raise ConfigError(f"folder={folder}: nothing can be written there ({error}); choose another folder") from error
    with lock_run_dir(folder, "folder=...") as lock:
        return run_sweep(config, folder, lock, launcher)


def run_sweep(config: MQARConfig, folder: Path, lock: RunLock, launcher: Sequence[str]) -> int:
    shapes = sorted(zip(config.lengths, config.pairs, strict=True), reverse=True)
    widths = sorted(config.widths, reverse=True)
    # The first learning rate comes first, because it may save the others. Within a rate the longest sequences do, so
    # that the slowest models do not start last.
    axes = itertools.product(config.learning_rates, shapes, widths, config.mixers)
    jobs = [Job(mixer, length, pairs, width, lr) for lr, (length, pairs), width, mixer in axes]
    import_user_mixers({}, config.mixers)
    for job in jobs:
        describe_model(config, job)  # No model is trained before a width is found that another one cannot have.
    results = find_results(config, folder, jobs)
    remaining = [job for job in jobs if job not in results and not is_solved(config, job, results)]
    print(f"{folder}: {len(results)} models are trained, at most {len(remaining)} remain", flush=True)
    failures = {}
    for rate in config.learning_rates:
        # A model is skipped if a rate before has solved its task.
        missing = [job for job in remaining if job.lr == rate and not is_solved(config, job, results)]
        if not missing:
            continue
        lock.renew()  # Another sweep may have the folder if its lock was removed.
        reasons = launch_jobs(MQARConfig, "mqar", TrainJobs(config, missing), launcher, [[] for _ in missing])
        results |= find_results(config, folder, missing)
        failures |= {job: reason for job, reason in zip(missing, reasons, strict=True) if job not in results}
    if results:
        for figure in plot_mqar([{"results": result} for result in results.values()], folder / "plots" / "mqar.png"):
            print(f"wrote {figure}")
    if failures:
        reasons = "; ".join(f"{job.name}: {reason}" for job, reason in failures.items())
        raise RunError(f"{len(failures)} models were not trained: {reasons}")
    return 0


def find_results(config: MQARConfig, folder: Path, jobs: list[Job]) -> dict[Job, dict]:
    """Return the results of those of `jobs` that are trained."""
    saved = {record.get("identity"): record for record in load_results(folder, skip_damaged=True).values()}
    found = {job: saved.get(identify_job(config, job).digest) for job in jobs}
    return {job: record["results"] for job, record in found.items() if record}


def is_solved(config: MQARConfig, job: Job, results: dict[Job, dict]) -> bool:
    """Return whether this model has reached `stop_at` at any learning rate."""
    same_task = (replace(job, lr=lr) for lr in config.learning_rates)
    return any(other in results and results[other]["accuracy"] >= config.stop_at for other in same_task)


@dataclass(frozen=True)
class TrainJobs:
    """What a launcher calls for each of `jobs`. The result is in the sweep's folder as soon as a model is trained."""

    config: MQARConfig
    jobs: list[Job]

    def __call__(self, tree: DictConfig) -> str | None:
        """Train the model whose number the launcher gives. Return the reason of a failure, or None."""
        job = self.jobs[HydraConfig.get().job.num]
        folder = Path(self.config.folder)
        import_user_mixers({}, self.config.mixers)
        try:
            result = asdict(job) | train_job(self.config, job)
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
        record = identify_job(self.config, job).to_record()
        settings = self.config.settings() | hash_user_code(job.mixer)
        save_result(folder, record | {"settings": settings, "results": result}, job.name)
        partial_path(folder, job).unlink(missing_ok=True)
        accuracy = f"accuracy {result['accuracy']:.3f} after {result['epochs']} epochs"
        print(f"{job.name}: {accuracy}, {result['seconds']:.0f} s", flush=True)
        return None


def train_job(config: MQARConfig, job: Job) -> dict:
    """Train one model on the first visible GPU, or on one CPU core."""
    torch.set_num_threads(1)  # The models share the cores.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return train(config, job, device, partial_path(Path(config.folder), job))


def identify_job(config: MQARConfig, job: Job) -> ResultIdentity:
    """Return what the result of one model of the sweep depends on."""
    return ResultIdentity("mqar", None, "", config.settings() | asdict(job) | hash_user_code(job.mixer))


def partial_path(folder: Path, job: Job) -> Path:
    """Return where a model in training is saved."""
    return folder / "partial" / f"{job.name}.safetensors"
