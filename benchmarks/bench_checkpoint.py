"""Measure how long saving a checkpoint blocks training: python benchmarks/bench_checkpoint.py [--folder DIR]

Trains a model on random tokens with AdamW and saves it, first synchronously and then asynchronously. For each save it
prints how long `save` blocked, the seconds until the checkpoint was complete, the MB/s, and the seconds of the training
steps that ran meanwhile beside those of a step without a save.
"""

import argparse
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import OmegaConf

from glalm.cli import CONFIGS
from glalm.config.run import CheckpointConfig, OptimConfig
from glalm.config.strict import build_dataclass
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.model.config import ModelConfig
from glalm.train.checkpoint import CheckpointSaver
from glalm.train.optim import build_optimizers
from glalm.train.state import TrainState


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
    parser.add_argument(
        "--model", default="gla_340m", choices=presets, metavar="MODEL", help="a file of configs/model/"
    )
    parser.add_argument("--folder", type=Path, help="a folder on the filesystem to measure; default: a temporary one")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs=2, default=(8, 2048), metavar=("SEQUENCES", "TOKENS"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tree = OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / f"{args.model}.yaml"))
    model = GLALMForCausalLM(GLALMConfig(**dataclasses.asdict(build_dataclass(ModelConfig, tree)))).to(device)
    state = TrainState(model, build_optimizers(model, OptimConfig()))
    ids = torch.randint(model.config.vocab_size, tuple(args.batch), device=device)

    def train_step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(ids, labels=ids).loss
        loss.backward()
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    step_seconds = min(measure_seconds(train_step) for _ in range(5))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{args.model} on {name}: {step_seconds:.3f} s a step")
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for asynchronous in (False, True):
            measure_saves(Path(folder), asynchronous, args.saves, state, train_step, step_seconds)


def measure_saves(
    folder: Path,
    asynchronous: bool,
    saves: int,
    state: TrainState,
    train_step: Callable[[], None],
    step_seconds: float,
) -> None:
    """Save `saves` times and print a line for each. `step_seconds` is the duration of a step without a save."""
    with CheckpointSaver(folder, CheckpointConfig(asynchronous=asynchronous, keep_last=1)) as saver:
        saver.warm_up(state)
        for _ in range(10):
            train_step()
        for number in range(1, saves + 1):
            train_step()
            synchronize()
            state.step = number
            start = time.perf_counter()
            saver.save(state, {})
            stall = time.perf_counter() - start
            steps = [measure_seconds(train_step)]
            while saver.in_flight:
                steps.append(measure_seconds(train_step))
            path = saver.finish()
            total = time.perf_counter() - start
            size = sum(file.stat().st_size for file in path.iterdir())
            print(
                f"{'asynchronous' if asynchronous else 'synchronous':<12} save {number}: stall {stall:6.3f} s, "
                f"complete after {total:6.2f} s ({size / 1e6:,.0f} MB, {size / 1e6 / total:,.0f} MB/s), the next step "
                f"{steps[0]:.3f} s, mean {sum(steps) / len(steps):.3f} s (alone {step_seconds:.3f} s)"
            )
    shutil.rmtree(path)


def measure_seconds(call: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
