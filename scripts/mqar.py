"""Multi-query associative recall (Zoology, arXiv 2312.04927): python scripts/mqar.py [KEY=VALUE ...]

Trains a small model for every mixer, length, width and learning rate, until one rate solves it: FOLDER/eval/*.json,
one a model, and the figure FOLDER/plots/mqar.png and .svg. The same command again trains what is missing, and goes on
after the last epoch of what was interrupted. For example, in minutes on two cores:

    python scripts/mqar.py mixers=[attention,gla] lengths=[64] pairs=[4] widths=[64] learning_rates=[3e-3] \
        vocab_size=512 train_examples=20000 test_examples=1000 epochs=8 batch_size=128

and on one GPU, many models at once: python scripts/mqar.py workers=12
"""

import itertools
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryFile

from glalm.cli import hydra_entry
from glalm.config.strict import ConfigError, RunError
from glalm.evals.plot import plot_mqar
from glalm.evals.result_files import read_json, write_json
from glalm.prepare.workers import bind_to_parent
from glalm.studies.mqar_config import MQARConfig


def main(config: MQARConfig) -> int:
    folder = Path(config.folder)
    need_writable(folder)
    from glalm.train.run_dir import lock_run_dir  # with torch, for which a config that is wrong need not wait

    with lock_run_dir(folder):
        return run(config, folder)


def run(config: MQARConfig, folder: Path) -> int:
    settings = config.settings()
    trained = {job: result for job in sweep(config) if (result := trained_before(path_of(folder, *job), settings))}
    missing = [job for job in sweep(config) if job not in trained and not solved(config, job, trained)]
    more = f"at most {len(missing)} to train, {config.workers} at once"
    print(f"{folder}: {len(trained)} models are there, {more}", flush=True)
    failed = []
    for n, (job, future) in enumerate(train_all(config, missing, trained), 1):
        path = path_of(folder, *job)
        if error := future.exception():
            failed.append(f"{path.stem}: {type(error).__name__}: {error}")
            print(f"{n}/{len(missing)} {failed[-1]}", file=sys.stderr, flush=True)
            continue
        trained[job] = result = future.result()
        write_json(path, {"evaluator": "mqar", "settings": settings, "results": result})
        partial_of(path).unlink(missing_ok=True)
        score = f"accuracy {result['accuracy']:.3f} after {result['epochs']} epochs, {result['seconds']:.0f} s"
        print(f"{n}/{len(missing)} {path.stem}: {score}", flush=True)
    there = [path_of(folder, *job) for job in sweep(config) if job in trained]
    for figure in plot_mqar(there, folder / "plots" / "mqar.png") if there else ():
        print(f"wrote {figure}")
    if failed:
        raise RunError(f"{len(failed)} models were not trained: {'; '.join(failed)}")
    return 0


def sweep(config: MQARConfig) -> list[tuple]:
    """(mixer, length, pairs, width, lr) of every model. All at the first learning rate come first, which may save the
    others; of these the longest, since what takes longest must not come last."""
    shapes = sorted(zip(config.lengths, config.pairs, strict=True), reverse=True)
    return [
        (mixer, *shape, width, lr)
        for lr, shape, width, mixer in itertools.product(
            config.learning_rates, shapes, sorted(config.widths, reverse=True), config.mixers
        )
    ]


def train_all(config: MQARConfig, jobs: list[tuple], trained: dict[tuple, dict]) -> Iterator[tuple[tuple, Future]]:
    """Each job as it ends, and its future. One whose model another learning rate has taught by then is left out: the
    best rate counts. The caller adds results to `trained`."""
    waiting, running = deque(enumerate(jobs)), {}
    with ProcessPoolExecutor(config.workers, get_context("spawn"), bind_to_parent) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < config.workers:
                    number, job = waiting.popleft()
                    if not solved(config, job, trained):
                        running[submitted(pool, train_one, config, number, *job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future
        except KeyboardInterrupt:  # to leave the pool would be to wait for all models in training
            print("interrupted; the same command goes on after each model's last epoch", file=sys.stderr, flush=True)
            os._exit(130)


def submitted(pool: Executor, *call) -> Future:
    """Of a pool that a killed process has broken, a future that says so."""
    try:
        return pool.submit(*call)
    except BrokenExecutor as error:
        failed = Future()
        failed.set_exception(error)
        return failed


def solved(config: MQARConfig, job: tuple, trained: dict[tuple, dict]) -> bool:
    """Whether a model of the job's mixer, length and width has reached `stop_at`, at any learning rate."""
    results = (trained.get((*job[:-1], lr)) for lr in config.learning_rates)
    return any(result is not None and result["accuracy"] >= config.stop_at for result in results)


def path_of(folder: Path, mixer: str, length: int, pairs: int, width: int, lr: float) -> Path:
    return folder / "eval" / f"{mixer}_{length}x{pairs}_d{width}_lr{lr:g}.json"


def partial_of(path: Path) -> Path:
    """Of a model that is being trained: folder/partial/*.pt for folder/eval/*.json."""
    return path.parents[1] / "partial" / f"{path.stem}.pt"


def need_writable(folder: Path) -> None:
    """ConfigError where results could not be written: before any model is trained."""
    try:
        for part in ("eval", "partial", "plots"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder / part).close()
    except OSError as error:
        raise ConfigError(f"folder={folder}: nothing can be written there ({error}); write another") from error


def trained_before(path: Path, settings: dict) -> dict | None:
    """The results of a model that was trained by the same settings."""
    result = read_json(path)
    return result["results"] if result is not None and result["settings"] == settings else None


def train_one(config: MQARConfig, number: int, mixer: str, length: int, pairs: int, width: int, lr: float) -> dict:
    """One model, in a process of the pool: on the GPUs in turn, else on a core."""
    import torch

    from glalm.studies import mqar

    torch.set_num_threads(1)  # the models share the cores
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", number % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    what = {"mixer": mixer, "length": length, "pairs": pairs, "width": width, "lr": lr}
    partial = partial_of(path_of(Path(config.folder), mixer, length, pairs, width, lr))
    return what | mqar.train(config, mixer, length, pairs, width, lr, device, partial)


if __name__ == "__main__":
    hydra_entry(main, MQARConfig, "mqar")
