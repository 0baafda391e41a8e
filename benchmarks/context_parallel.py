"""Measure what it costs to share sequences between processes (parallel.context), and print the results as tables.

    python benchmarks/context_parallel.py
    torchrun --standalone --nproc-per-node=8 benchmarks/context_parallel.py
    python benchmarks/context_parallel.py --train          the rows of one process, to compare with
    python benchmarks/context_parallel.py --json rows.json --figure context.png

One process takes the turns of a whole group on its device: it runs chunk_gla on one shard after another, forward and
backward, each with the summaries that the others have left, and compares time and results with one call on the whole
sequence. So the table shows the work that sharing adds, without the network. The shards apart, as sequences of their
own, show how much of it comes from their length.

Several processes train a model of each mixer on sequences that they share, and print the time of a step, its memory
beside the dry run's estimate, and the time in which a GPU only communicates: GLA, which exchanges states, beside
softmax attention, which gathers keys and values (arXiv 2311.02382). --json FILE adds the rows to a file, from which
--figure draws them.
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_training import profile_step
from torch import Tensor

from glalm.config.run import DataConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from glalm.data.loader import shard_batch
from glalm.kernels import chunk_gla, context_parallel
from glalm.kernels.context_parallel import ContextShard
from glalm.model.config import ModelConfig
from glalm.train import parallel
from glalm.train.memory import estimate_memory
from glalm.train.state import BatchPlan
from glalm.train.trainer import Trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, K, V = 4, 128, 256  # a layer of the 340M model
VOCABULARY = 32000
WORLD = int(os.environ.get("WORLD_SIZE", 1))
REPEATS = 3


class MessageBoard:
    """Stand in for the all-gather of a group whose ranks run in turn: return what they have posted in earlier turns.

    The buffer is the group's. So a turn only copies its own message, and the network's work is not counted.
    """

    def __init__(self, size: int):
        self.size = size
        self.rank = 0
        self.is_backward = False
        self.posted: dict[bool, Tensor] = {}

    def all_gather(self, message: Tensor, group: str, size: int) -> Tensor:
        if self.is_backward not in self.posted:
            self.posted[self.is_backward] = message.new_zeros(size, *message.shape)
        self.posted[self.is_backward][self.rank].copy_(message)
        return self.posted[self.is_backward]


def run_turn(board: MessageBoard, shards: list[list[Tensor]], rank: int) -> list[Tensor]:
    """Return the outputs and gradients of one rank's shard: of q, k, v, the log gates and the output's gradient."""
    *inputs, do = shards[rank]
    board.rank = rank
    board.is_backward = False
    o, _ = chunk_gla(*inputs, context=ContextShard("turns", rank, board.size))
    board.is_backward = True
    return [o, *torch.autograd.grad(o, inputs, do)]


def run_whole(inputs: list[Tensor], do: Tensor) -> list[Tensor]:
    o, _ = chunk_gla(*inputs)
    return [o, *torch.autograd.grad(o, inputs, do)]


def measure_seconds(call: Callable[[], object]) -> float:
    """Return the least time of a few calls: that of all kernels on a GPU, else that on the clock."""
    call()  # The first call compiles and allocates.
    times = []
    for _ in range(REPEATS):
        if DEVICE.type == "cuda":
            activity = torch.profiler.ProfilerActivity.CUDA
            with torch.profiler.profile(activities=[activity]) as profile:
                call()
                torch.cuda.synchronize()
            times.append(sum(event.self_device_time_total for event in profile.key_averages()) / 1e6)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return min(times)


def compare_turns(T: int, size: int) -> str:
    """Return a row of the table: times of the whole sequence and of all turns, and how far the results differ."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    q, k, v, do = (torch.randn(1, T, HEADS, n, device=DEVICE, dtype=dtype) for n in (K, K, V, V))
    g = F.logsigmoid(torch.randn(1, T, HEADS, K, device=DEVICE, dtype=dtype)) / 16
    inputs = [x.requires_grad_() for x in (q, k, v, g)]
    cut = [[x.detach().contiguous() for x in tensor.chunk(size, 1)] for tensor in (*inputs, do)]
    shards = [[*(x.requires_grad_() for x in shard[:4]), shard[4]] for shard in map(list, zip(*cut, strict=True))]
    board = MessageBoard(size)
    context_parallel.all_gather = board.all_gather
    for rank in range(size):  # Let every rank post its summaries.
        run_turn(board, shards, rank)
    found = [torch.cat(parts, 1) for parts in zip(*(run_turn(board, shards, r) for r in range(size)), strict=True)]
    expected = run_whole(inputs, do)
    difference = max(relative_difference(x, y) for x, y in zip(found, expected, strict=True))
    whole = measure_seconds(lambda: run_whole(inputs, do))
    alone = sum(measure_seconds(lambda rank=rank: run_whole(shards[rank][:4], shards[rank][4])) for rank in range(size))
    turns = sum(measure_seconds(lambda rank=rank: run_turn(board, shards, rank)) for rank in range(size))
    times = f"{whole * 1e3:.2f} | {alone * 1e3:.2f} | {turns * 1e3:.2f} | {turns / whole - 1:+.1%}"
    return f"| {T:,} | {size} | {times} | {difference:.1e} |"


def relative_difference(x: Tensor, y: Tensor) -> float:
    return ((x.float() - y.float()).norm() / y.float().norm()).item()


def measure_steps(mixer: str, sizes: dict, T: int, steps: int) -> dict:
    """Train on sequences of T tokens that all processes share, and return the measurements."""
    if DEVICE.type == "cuda":
        gc.collect()  # Free the model before.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = RunConfig(
        model=ModelConfig(mixer=mixer, vocab_size=VOCABULARY, **sizes),
        data=DataConfig(seq_len=T),
        optim=OptimConfig(warmup_steps=0),
        train=TrainConfig(steps=steps, batch_size=1, activation_checkpointing="full"),
        parallel=ParallelConfig(context=WORLD),
    )
    accelerator = parallel.start_processes(config)
    plan = BatchPlan.from_config(config, WORLD)
    trainer = Trainer(config, [plan], accelerator)
    tokens = torch.randint(VOCABULARY, (1, T + 1), generator=torch.Generator().manual_seed(0))
    shard = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}
    if trainer.context is not None:
        shard = shard_batch(shard, T, trainer.context.rank, trainer.context.size)
    shard = {name: x.to(accelerator.device) for name, x in shard.items()}
    trainer.step(shard)  # The first step compiles and allocates.
    start = time.perf_counter()
    for _ in range(steps):
        loss = trainer.step(shard).loss.item()
    seconds = (time.perf_counter() - start) / steps
    row = {"mixer": mixer, "gpus": WORLD, "tokens": T, "step_ms": 1e3 * seconds, "tokens_per_second": T / seconds}
    row["loss"] = loss
    if DEVICE.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        compiled = config.train.compile in ("auto", True)
        row["estimate_gib"] = sum(estimate_memory(config, plan, WORLD, True, compiled, is_gpu=True).values()) / 2**30
        kinds = profile_step(lambda: trainer.step(shard))["kinds"]
        row["exposed_communication"] = kinds.get("exposed communication", 0.0) / sum(kinds.values())
    return row


def format_row(row: dict) -> str:
    cells = [row["mixer"], f"{row['tokens']:,}", f"{row['step_ms']:,.0f}", f"{row['tokens_per_second']:,.0f}"]
    cells.append(f"{row['loss']:.3f}")
    if "peak_gib" in row:
        cells += [f"{row['peak_gib']:.1f}", f"{row['estimate_gib']:.1f}", f"{row['exposed_communication']:.1%}"]
    return f"| {' | '.join(cells)} |"


def draw_figure(rows: list[dict], path: Path) -> None:
    """Draw the speed and the memory of a GPU against the tokens that it holds, a line for each number of GPUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for mixer, gpus in sorted({(row["mixer"], row["gpus"]) for row in rows}):
        line = sorted((row for row in rows if (row["mixer"], row["gpus"]) == (mixer, gpus)), key=itemgetter("tokens"))
        held = [row["tokens"] / gpus for row in line]
        style = {"label": f"{mixer}, {gpus} GPU{'s' if gpus > 1 else ''}", "linestyle": "-" if mixer == "gla" else ":"}
        style |= {"marker": "osD^"[gpus.bit_length() - 1]}
        speed.plot(held, [row["tokens_per_second"] / gpus / 1e3 for row in line], **style)
        memory.plot(held, [row["peak_gib"] for row in line], **style)
    for axes, label in ((speed, "thousand tokens/s of a GPU"), (memory, "peak GiB of a GPU")):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="tokens of the sequence on each GPU", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    speed.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def print_header(*columns: str) -> None:
    print(f"| {' | '.join(columns)} |\n{'|-' * len(columns)}|")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536, 262144], help="tokens of a sequence")
    parser.add_argument("--size", type=int, default=8, help="ranks that take turns on one device")
    parser.add_argument("--mixers", nargs="+", default=["gla", "attention"], help="of the models that processes train")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each model")
    parser.add_argument("--train", action="store_true", help="train models with one process, too")
    parser.add_argument("--tiny", action="store_true", help="models of two small layers, for a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the rows of training to this file")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the rows of --json, and measure nothing")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    record = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    rows = record.setdefault("context_parallel", [])
    if options.figure:
        draw_figure(rows, options.figure)
        return
    if WORLD == 1 and not options.train:
        print_header("tokens", "ranks", "one call, ms", "shards apart, ms", "all turns, ms", "extra", "difference")
        for T in options.lengths:
            print(compare_turns(T, options.size), flush=True)
        return
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 128}
    is_first = int(os.environ.get("RANK", 0)) == 0
    if is_first:
        columns = ["mixer", "tokens", "step, ms", "tokens/s", "loss"]
        on_gpus = ["peak GiB of a GPU", "estimate", "communication alone"]
        print_header(*columns, *(on_gpus if DEVICE.type == "cuda" else []))
    for mixer in options.mixers:
        for T in options.lengths:
            row = measure_steps(mixer, small if options.tiny else {}, T, options.steps)
            rows.append(row)
            if is_first:
                print(format_row(row), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(record, indent=1))
    parallel.leave_process_group()


if __name__ == "__main__":
    main()
