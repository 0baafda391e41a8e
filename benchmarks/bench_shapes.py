"""Measure what the first training step of each new window length costs, because its kernels are compiled and tuned.

    python benchmarks/bench_shapes.py                                       340M GLA, windows of 512 to 8,192 tokens
    python benchmarks/bench_shapes.py --model gla_1b3 --lengths 2048 32768 --step-tokens 32768
    python benchmarks/bench_shapes.py --tiny                                tiny sizes, in seconds on a CPU

Each length is a stage of one run (docs/stages.md), whose steps have as many tokens. The caches of torch.compile and
Triton shorten the first steps. To measure without them, set TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR to new
folders.
"""

import argparse
import time
from statistics import median

import torch

from glalm.cli import compose_config
from glalm.config.run import RunConfig
from glalm.evals.options import TrainingRun
from glalm.train import parallel
from glalm.train.environment import describe_environment
from glalm.train.state import plan_batches
from glalm.train.trainer import Trainer

TINY = {"model": "gla_tiny", "lengths": [32, 64], "step_tokens": 128}


def compose_run_config(args: argparse.Namespace) -> RunConfig:
    """Return the config of a run with a stage for each length, in which a forward pass has all tokens of a step."""
    tokens = args.steps * args.step_tokens
    stages = ", ".join(f"length_{length}: {{tokens: {tokens}, seq_len: {length}}}" for length in args.lengths)
    batch = [f"train.batch_tokens={args.step_tokens}", "train.batch_size=null", "train.micro_batch_size=null"]
    model = [f"model={args.model}", "model.vocab_size=32000", "optim=adamw", "optim.warmup_steps=1"]
    length = [f"data.seq_len={args.lengths[0]}", "train.steps=null", f"train.stages={{{stages}}}"]
    return compose_config(TrainingRun, "train", [*model, *batch, *length, *args.set])


def time_steps(trainer: Trainer, steps: int, length: int, sequences: int) -> list[float]:
    """Take steps on random tokens, and return the seconds of each."""
    device = trainer.accelerator.device
    seconds = []
    for _ in range(steps):
        ids = torch.randint(trainer.config.model.vocab_size, (sequences, length + 1), device=device)
        batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        start = time.perf_counter()
        trainer.step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gla_340m", help="a file of configs/model (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], metavar="N")
    parser.add_argument("--step-tokens", type=int, default=65_536, metavar="N", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="of each length (%(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the run's config")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    if args.tiny:
        parser.set_defaults(**TINY)
        args = parser.parse_args()
    config = compose_run_config(args)
    accelerator = parallel.start_processes(config)
    trainer = Trainer(config, plan_batches(config, accelerator.num_processes), accelerator)
    print(f"{args.model}, {args.step_tokens:,} tokens a step, {describe_environment()['versions']}")
    print("| sequences x tokens | first step, s | later steps, s | once, s |\n|-|-|-|-|")
    for phase in config.phases:
        length = phase.config.data.seq_len
        first, *later = time_steps(trainer, phase.steps, length, phase.config.batch_size)
        usual = median(later)
        print(
            f"| {phase.config.batch_size} x {length:,} | {first:.2f} | {usual:.3f} | {first - usual:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
