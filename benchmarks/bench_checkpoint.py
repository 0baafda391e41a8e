"""How long saving keeps training waiting: python benchmarks/bench_checkpoint.py [--model gla_340m] [--folder DIR]

Trains the model (random tokens, AdamW) and saves, first synchronously, then asynchronously: the stall of `save`, the
seconds until the checkpoint is complete, the MB/s, and the steps that went on beside it against those without.
"""

import argparse
import dataclasses
import shutil
import tempfile
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf

from glalm.cli import CONFIGS
from glalm.config.run import CheckpointConfig, OptimConfig
from glalm.config.strict import build_dataclass
from glalm.model.config import ModelConfig
from glalm.model.decoder import GLALMForCausalLM
from glalm.model.hf_config import GLALMConfig
from glalm.train.optim import build_optimizers
from glalm.train.saver import Saver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = sorted(p.stem for p in (CONFIGS / "model").glob("*.yaml"))
    parser.add_argument(
        "--model", default="gla_340m", choices=presets, metavar="MODEL", help="a file of configs/model/"
    )
    parser.add_argument("--folder", type=Path, help="where to save, on the filesystem to measure; a temporary one")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs=2, default=(8, 2048), metavar=("SEQUENCES", "TOKENS"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tree = OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / f"{args.model}.yaml"))
    model = GLALMForCausalLM(GLALMConfig(**dataclasses.asdict(build_dataclass(ModelConfig, tree)))).to(device)
    found = build_optimizers(model, OptimConfig())
    ids = torch.randint(model.config.vocab_size, tuple(args.batch), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(ids, labels=ids).loss
        loss.backward()
        for optimizer in found:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    alone = min(timed(step, device) for _ in range(5))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{args.model} on {name}: {alone:.3f} s a step")
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for asynchronous in (False, True):
            bench(Path(folder), asynchronous, args.saves, model, found, step, alone, device)


def bench(folder: Path, asynchronous: bool, saves: int, model, found, step, alone: float, device) -> None:
    with Saver(folder, CheckpointConfig(asynchronous=asynchronous, keep_last=1)) as saver:
        saver.prepare(model, found)
        for _ in range(10):
            step()
        for number in range(1, saves + 1):
            step()
            synchronise(device)
            begun = time.perf_counter()
            saver.save(number, model, found, {})
            stall = time.perf_counter() - begun
            beside = [timed(step, device)]
            while saver.busy:
                beside.append(timed(step, device))
            saver.finish()
            total = time.perf_counter() - begun
            size = sum(f.stat().st_size for f in (folder / f"step_{number}").iterdir())
            print(
                f"{'asynchronous' if asynchronous else 'synchronous':<12} save {number}: stall {stall:6.3f} s, "
                f"complete after {total:6.2f} s ({size / 1e6:,.0f} MB, {size / 1e6 / total:,.0f} MB/s), the next step "
                f"{beside[0]:.3f} s, mean {sum(beside) / len(beside):.3f} s (alone {alone:.3f} s)"
            )
    shutil.rmtree(folder / f"step_{saves}")


def timed(call, device: torch.device) -> float:
    synchronise(device)
    begun = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - begun


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
