"""Measure how long saving a checkpoint blocks training.

    python benchmarks/bench_checkpoint.py                            340M GLA, in a temporary folder
    python benchmarks/bench_checkpoint.py --folder DIR               on the filesystem of DIR
    torchrun --standalone --nproc-per-node=2 benchmarks/bench_checkpoint.py --folder DIR --set parallel=fsdp2

Trains a model on random tokens with AdamW and saves it, first synchronously and then asynchronously. For each save it
prints how long `save` blocked, the seconds until the checkpoint was complete, the MB/s, and the seconds of the training
steps that ran meanwhile beside those of a step without a save. With several processes the numbers are those of rank 0,
and the size is that of all of them.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from glalm.cli import CONFIGS, compose_config
from glalm.config.run import CheckpointConfig
from glalm.evals.options import TrainingRun
from glalm.train import parallel
from glalm.train.checkpoint import CheckpointSaver
from glalm.train.collectives import max_over_processes
from glalm.train.state import TrainState, plan_batches
from glalm.train.trainer import Trainer

WORLD = int(os.environ.get("WORLD_SIZE", 1))
IS_FIRST = int(os.environ.get("RANK", 0)) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
    parser.add_argument(
        "--model", default="gla_340m", choices=presets, metavar="MODEL", help="a file of configs/model/"
    )
    parser.add_argument("--folder", type=Path, help="a folder on the filesystem to measure; default: a temporary one")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs=2, default=(8, 2048), metavar=("SEQUENCES", "TOKENS"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="an override of the run's config")
    args = parser.parse_args()
    if WORLD > 1 and not args.folder:
        parser.error("several processes need a folder that all of them see: --folder DIR")
    trainer = build_trainer(args)
    device = trainer.accelerator.device
    vocabulary = trainer.state.model.config.vocab_size
    ids = torch.randint(vocabulary, (args.batch[0], args.batch[1] + 1), device=device)

    def train_step() -> None:
        trainer.step({"input_ids": ids[:, :-1], "labels": ids[:, 1:]})

    step_seconds = min(measure_seconds(train_step) for _ in range(5))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print_once(f"{args.model} on {WORLD} x {name}: {step_seconds:.3f} s a step")
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    folder = args.folder or Path(tempfile.mkdtemp())
    for asynchronous in (False, True):
        measure_saves(folder / f"asynchronous_{asynchronous}", asynchronous, args.saves, trainer.state, train_step)
    if not args.folder:
        shutil.rmtree(folder)
    parallel.leave_process_group()


def build_trainer(args: argparse.Namespace) -> Trainer:
    sequences, tokens = args.batch
    batch = [f"train.batch_size={sequences * WORLD}", f"train.micro_batch_size={sequences}", f"data.seq_len={tokens}"]
    overrides = [f"model={args.model}", "optim=adamw", "train.steps=1000", "train.compile=false", *batch, *args.set]
    config = compose_config(TrainingRun, "train", overrides)
    accelerator = parallel.start_processes(config)
    return Trainer(config, plan_batches(config, WORLD), accelerator)


def measure_saves(
    folder: Path, asynchronous: bool, saves: int, state: TrainState, train_step: Callable[[], None]
) -> None:
    """Save `saves` times in `folder`, which is removed in the end, and print a line for each."""
    with CheckpointSaver(folder, CheckpointConfig(asynchronous=asynchronous, keep_last=1)) as saver:
        saver.warm_up(state)
        alone = min(measure_seconds(train_step) for _ in range(10))
        for number in range(1, saves + 1):
            train_step()
            synchronize()
            start = time.perf_counter()
            saver.save(state, {})
            stall = time.perf_counter() - start
            steps = [measure_seconds(train_step)]
            while max_over_processes(saver.in_flight):  # All take the same number of steps.
                steps.append(measure_seconds(train_step))
            path = saver.finish()
            total = time.perf_counter() - start
            size = sum(file.stat().st_size for file in path.iterdir())
            print_once(
                f"{'asynchronous' if asynchronous else 'synchronous':<12} save {number}: stall {stall:6.3f} s, "
                f"complete after {total:6.2f} s ({size / 1e6:,.0f} MB, {size / 1e6 / total:,.0f} MB/s), the next step "
                f"{steps[0]:.3f} s, mean {sum(steps) / len(steps):.3f} s (alone {alone:.3f} s)"
            )
    if IS_FIRST:
        shutil.rmtree(folder)


def measure_seconds(call: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def print_once(line: str) -> None:
    if IS_FIRST:
        print(line, flush=True)


if __name__ == "__main__":
    main()
