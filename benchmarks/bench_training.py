"""Training throughput of this project, flash-linear-attention's GLA and a compiled Llama of the same size.

    python benchmarks/bench_training.py                              every row and model, a table in Markdown
    python benchmarks/bench_training.py --rows 1b3 --models glalm    one of them
    python benchmarks/bench_training.py --rows 340m --models glalm --profile     and where a step's time goes
    torchrun --nproc-per-node 2 benchmarks/bench_training.py --rows 340m --set parallel=fsdp2     weak scaling
    python benchmarks/bench_training.py --tiny                       the same on a CPU, in seconds, for its test

Forward, backward, clipping and fused AdamW on random tokens: float32 master weights under bfloat16 autocast. Ours is
the training loop's own step with its own config (--set changes it); the others get the same optimiser. Every model
runs in a process of its own. First step: seconds from its start to its end, with everything that is compiled then, or
found in the caches of earlier runs. With an empty Triton cache flash-linear-attention autotunes for minutes.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from glalm.cli import compose_config
from glalm.config.run import RunConfig
from glalm.evals.options import TrainingRun
from glalm.model.flops import model_cost
from glalm.model.mixers.attention import attention_heads
from glalm.train import optim, parallel
from glalm.train.environment import describe_environment, peak_flops
from glalm.train.estimate import GIB, estimate_memory
from glalm.train.state import BatchPlan
from glalm.train.trainer import Trainer


class Row(NamedTuple):
    size: str  # of configs/model/gla_SIZE.yaml
    batch: int  # sequences a GPU
    T: int


ROWS = {"340m": Row("340m", 32, 2048), "1b3": Row("1b3", 8, 2048), "340m-long": Row("340m", 2, 32768)}
TINY = {"tiny": Row("tiny", 2, 64)}
WORLD = int(os.environ.get("WORLD_SIZE", 1))
CUDA = torch.cuda.is_available()


def run_config(row: Row, mixer: str, changes: list[str]) -> RunConfig:
    batch = [f"data.seq_len={row.T}", f"train.batch_size={row.batch * WORLD}", f"train.micro_batch_size={row.batch}"]
    model = f"model={mixer}_{row.size}"
    return compose_config(TrainingRun, "train", [model, "optim=adamw", *batch, "train.steps=1000", *changes])


# -------------------------------------------------------------------------------------------------------- the models


def glalm(row: Row, changes: list[str]) -> tuple[RunConfig, Callable[[Tensor], Tensor]]:
    """A run's config, and a call that makes one step of it on token ids [batch, T + 1] and returns the loss."""
    config = run_config(row, "gla", changes)
    accelerator = parallel.start_processes(config)
    trainer = Trainer(config, BatchPlan.from_config(config, accelerator.num_processes), accelerator)

    def step(ids: Tensor) -> Tensor:
        return trainer.step({"input_ids": ids[:, :-1], "labels": ids[:, 1:]}).loss

    return config, step


def fla(row: Row, changes: list[str]) -> tuple[RunConfig, Callable[[Tensor], Tensor]]:
    from fla.models import GLAConfig, GLAForCausalLM  # only where it is installed

    config = run_config(row, "gla", [])
    shape = {name: getattr(config.model, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    return config, plain_step(GLAForCausalLM(GLAConfig(**shape, num_heads=config.model.num_heads)), config)


def llama(row: Row, changes: list[str]) -> tuple[RunConfig, Callable[[Tensor], Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = run_config(row, "attention", [])
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    shape = {name: getattr(config.model, name) for name in names} | {"max_position_embeddings": row.T}
    heads, _ = attention_heads(config.model)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=heads, attn_implementation="sdpa"))
    return config, plain_step(torch.compile(model) if CUDA else model, config)


def plain_step(model: torch.nn.Module, config: RunConfig) -> Callable[[Tensor], Tensor]:
    device = torch.device("cuda" if CUDA else "cpu")
    model = model.to(device).train()
    [optimizer] = optim.build_optimizers(model, config.optim)

    def step(ids: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=CUDA):
            loss = model(input_ids=ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


MODELS = {"glalm": glalm, "fla": fla, "llama": llama}


# ------------------------------------------------------------------------------------------------------ measurements


def measure(name: str, row: Row, arguments: argparse.Namespace) -> dict:
    torch.set_float32_matmul_precision("high")
    config, step = MODELS[name](row, arguments.set)
    device = torch.device("cuda", torch.cuda.current_device()) if CUDA else torch.device("cpu")
    ids = torch.randint(config.model.vocab_size, (row.batch, row.T + 1), device=device)
    begun = clock()
    step(ids)
    result = {"first_step_seconds": clock() - begun}
    for _ in range(arguments.warmup - 1):
        step(ids)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    begun = clock()
    for _ in range(arguments.steps):
        loss = step(ids)
    seconds = (clock() - begun) / arguments.steps
    each, peak = row.batch * row.T / seconds, peak_flops(device)
    result |= {"step_ms": 1e3 * seconds, "tokens_per_second": each * WORLD, "tokens_per_second_per_gpu": each}
    result["mfu"] = peak and each * model_cost(config.model, row.T).training / peak
    result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / GIB if CUDA else None
    result["loss"] = loss.item()
    if arguments.estimate and name == "glalm":
        compiled = config.train.compile in ("auto", True) and CUDA
        plan = BatchPlan.from_config(config, WORLD)
        parts = estimate_memory(config, plan, parallel.local_world_size(), CUDA, compiled)
        result["estimate_gib"] = sum(parts.values()) / GIB
    if arguments.profile:
        result["profile"] = kinds(lambda: step(ids))
    return result


def clock() -> float:
    """Seconds, with everything that was asked of the device done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


KINDS = {  # of kernels by their names: the first that fits
    "communication": r"nccl",
    "copies": r"^Mem(cpy|set)",
    "loss, without its matmuls": r"cross_entropy|nll_loss|log_softmax",
    "attention": r"flash|fmha|sdpa|attention",
    "recurrent kernels": r"(prepare|scan|join|gradients|recurrent)(_head)?_kernel|^chunk_|fused_recurrent",
    "optimiser and clipping": r"multi_tensor|[Ff]used[Aa]dam|lpnorm|foreach",
    "matmuls": r"gemm|cutlass|nvjet|cublas|xmma|splitK|triton_tem_",
    "norms and elementwise": r"^triton_|elementwise|norm|reduce|layer_|swiglu|gate|embedding|index|cat|scatter|gather",
}


def kind(kernel: str) -> str:
    return next((name for name, pattern in KINDS.items() if re.search(pattern, kernel)), "other")


def kinds(step: Callable[[], object]) -> dict[str, float]:
    """ms of one step on the device by kind of kernel, and idle; `kernels`: the twenty that take longest."""
    step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA) as record:
        step()
        clock()
    where = torch.autograd.DeviceType.CUDA if CUDA else torch.autograd.DeviceType.CPU
    spans = ("ProfilerStep", "## ", "Optimizer.")  # of many kernels
    events = [e for e in record.events() if e.device_type == where and not e.name.startswith(spans)]
    table, each = {}, {}
    for event in events:
        ms = event.time_range.elapsed_us() / 1e3
        table[kind(event.name)] = table.get(kind(event.name), 0.0) + ms
        each[event.name] = each.get(event.name, 0.0) + ms
    table = dict(sorted(table.items(), key=lambda item: -item[1]))
    table["idle"] = idle([(e.time_range.start / 1e3, e.time_range.end / 1e3) for e in events])
    return {"kinds": table, "kernels": dict(sorted(each.items(), key=lambda item: -item[1])[:20])}


def idle(spans: list[tuple[float, float]]) -> float:
    """How much of the time from the first start to the last end lies in none of `spans`."""
    gaps, reached = 0.0, min(start for start, _ in spans)
    for start, end in sorted(spans):
        gaps += max(0.0, start - reached)
        reached = max(reached, end)
    return gaps


# --------------------------------------------------------------------------------------------------------- the table


def in_a_process(name: str, label: str, arguments: argparse.Namespace) -> dict:
    """`measure` in a process of its own, so that memory and compiled code are one model's alone."""
    command = [sys.executable, __file__, "--one", name, "--rows", label, "--steps", str(arguments.steps)]
    command += ["--warmup", str(arguments.warmup), "--set", *arguments.set]
    command += [f"--{flag}" for flag in ("tiny", "profile", "estimate") if getattr(arguments, flag)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def show(label: str, name: str, result: dict) -> None:
    if "error" in result:
        print(f"| {label} | {name} | {result['error']} |", flush=True)
        return
    mfu = "-" if result["mfu"] is None else f"{result['mfu']:.1%}"
    peak = "-" if result["peak_memory_gib"] is None else f"{result['peak_memory_gib']:.1f}"
    peak += f" (estimate {result['estimate_gib']:.1f})" if "estimate_gib" in result else ""
    print(
        f"| {label} | {name} | {result['tokens_per_second'] / 1e3:,.1f}k | {result['step_ms']:,.1f} | {mfu} | {peak} | "
        f"{result['first_step_seconds']:.1f} |",
        flush=True,
    )
    for table in result.get("profile", {}).values():
        total = sum(table.values())
        print("\n".join(f"    {ms:8.2f} ms {ms / total:6.1%}  {what[:100]}" for what, ms in table.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *TINY], help="all")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS] if WORLD == 1 else ["glalm"])
    parser.add_argument("--steps", type=int, default=8, help="timed")
    parser.add_argument("--warmup", type=int, default=3, help="before them, the first included")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of our config")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--estimate", action="store_true", help="the dry run's estimate beside the peak")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rows = TINY if arguments.tiny else {label: ROWS[label] for label in arguments.rows or ROWS}
    attention = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(attention, set_priority=True) if CUDA else contextlib.nullcontext():
        if arguments.one:
            print(json.dumps(measure(arguments.one, next(iter(rows.values())), arguments)))
            return
        first, results = int(os.environ.get("RANK", 0)) == 0, []
        if first:
            print("| row | model | tokens/s | step, ms | MFU | peak GiB | first step, s |\n|-|-|-|-|-|-|-|", flush=True)
        for label, row in rows.items():
            for name in arguments.models:
                alone = WORLD == 1
                result = in_a_process(name, label, arguments) if alone else measure(name, row, arguments)
                results.append({"row": label, "model": name, "gpus": WORLD, **row._asdict(), **result})
                if first:
                    show(label, name, result)
    if first and arguments.json:
        record = {"environment": describe_environment(), "changes": arguments.set, "results": results}
        arguments.json.write_text(json.dumps(record, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
