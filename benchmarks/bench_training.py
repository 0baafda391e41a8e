"""Measure the training throughput of our models, flash-linear-attention's and a compiled Llama of the same size.

    python benchmarks/bench_training.py                              all rows and models, a table in Markdown
    python benchmarks/bench_training.py --rows 1b3 --models glalm    one row and model
    python benchmarks/bench_training.py --rows 340m:8x8192           8 sequences of 8,192 tokens
    python benchmarks/bench_training.py --rows 340m --models glalm --profile     and the time of a step by kernel
    python benchmarks/bench_training.py --rows 340m --models glalm fla --set model=deltanet_340m     another mixer
    torchrun --nproc-per-node 2 benchmarks/bench_training.py --rows 340m --set parallel=fsdp2     weak scaling
    torchrun --nproc-per-node 2 benchmarks/bench_training.py --rows 340m --accumulation 4         with 4 micro-batches
    python benchmarks/bench_training.py --tiny                       tiny sizes, in seconds on a CPU

A step is forward, backward, clipping and fused AdamW on random tokens, with float32 master weights under bfloat16
autocast. Our step is that of the training loop with its config, which --set changes. flash-linear-attention's model has
the mixer and the widths of this config, and Llama those of the preset attention; their optimiser is the same. Every
model runs in its own process. The column "host" is the time until the call of a step returns, from an idle device on:
what Python takes to launch the kernels, and waits for room in the queue of some 1,024 launches. Where it is as long as
the step, training waits for the host. The seconds of the first step include everything that is compiled then, or loaded
from the caches of earlier runs. With an empty Triton cache flash-linear-attention autotunes for minutes.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedConfig, PreTrainedModel

from glalm.cli import compose_config
from glalm.compat.fla import config_to_fla
from glalm.config.run import RunConfig
from glalm.evals.options import TrainingRun
from glalm.hf import GLALMConfig
from glalm.model.config import ModelConfig
from glalm.model.decoder import model_cost
from glalm.model.mixers.attention import attention_heads
from glalm.train import optim, parallel
from glalm.train.environment import describe_environment, peak_flops
from glalm.train.memory import GIB, estimate_memory
from glalm.train.state import BatchPlan, plan_batches
from glalm.train.trainer import Trainer


class Row(NamedTuple):
    size: str  # of configs/model/gla_SIZE.yaml
    batch: int  # sequences a GPU
    T: int


ROWS = {
    "340m": Row("340m", 32, 2048),
    "1b3": Row("1b3", 8, 2048),
    "340m-long": Row("340m", 2, 32768),
    "small": Row("small", 8, 512),
}
TINY = Row("tiny", 2, 64)
# Classes of flash-linear-attention for mixers whose checkpoints cannot be exported to it, but whose widths it can have.
FLA_ARCHITECTURES = {
    "deltanet": "DeltaNetForCausalLM",
    "gated_deltanet": "GatedDeltaNetForCausalLM",
    "kda": "KDAForCausalLM",
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
}
WORLD = int(os.environ.get("WORLD_SIZE", 1))
CUDA = torch.cuda.is_available()


def named_row(label: str) -> tuple[str, Row]:
    """Return a label and its row: one of ROWS, or SIZE:SEQUENCESxTOKENS."""
    known = {**ROWS, "tiny": TINY}
    if label in known:
        return label, known[label]
    match = re.fullmatch(r"(\w+):(\d+)x(\d+)", label)
    if match is None:
        raise argparse.ArgumentTypeError(f"{label} is none of {', '.join(ROWS)}, and not like 340m:8x8192")
    return label, Row(match[1], int(match[2]), int(match[3]))


def compose_run_config(row: Row, mixer: str, changes: list[str], accumulation: int = 1) -> RunConfig:
    sequences = row.batch * accumulation * WORLD
    batch = [f"data.seq_len={row.T}", f"train.batch_size={sequences}", f"train.micro_batch_size={row.batch}"]
    model = f"model={mixer}_{row.size}"
    return compose_config(TrainingRun, "train", [model, "optim=adamw", *batch, "train.steps=1000", *changes])


# -------------------------------------------------------------------------------------------------------- the models


def glalm(row: Row, arguments: argparse.Namespace) -> tuple[RunConfig, Callable[[Tensor], Tensor]]:
    """Return the config of a run, and a function that trains one step on token ids [batch, T + 1] for the loss."""
    config = compose_run_config(row, "gla", arguments.set, arguments.accumulation)
    accelerator = parallel.start_processes(config)
    trainer = Trainer(config, plan_batches(config, accelerator.num_processes), accelerator)

    def step(ids: Tensor) -> Tensor:
        return trainer.step({"input_ids": ids[:, :-1], "labels": ids[:, 1:]}).loss

    return config, step


def fla(row: Row, arguments: argparse.Namespace) -> tuple[RunConfig, Callable[[Tensor], Tensor]]:
    config = compose_run_config(row, "gla", arguments.set)
    model_class, model_config = fla_model(config.model)
    return config, build_step(model_class(model_config), config)


def fla_model(config: ModelConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Return the class of flash-linear-attention's model with the mixer and the widths of ours, and its config.

    Raises:
        ConfigError: That library has no such model.
        ImportError: It is not installed, or a library is missing without which its Mamba runs on slow PyTorch code.
    """
    fields = fla_fields(config)
    import fla.models

    if "Mamba" in fields["architectures"][0]:
        for library in ("mamba_ssm", "causal_conv1d"):
            importlib.import_module(library)
    model_class = getattr(fla.models, fields["architectures"][0])
    return model_class, model_class.config_class(**fields)


def fla_fields(config: ModelConfig) -> dict:
    """Return the fields of the config of `fla_model`, among them `architectures` with the name of the model's class."""
    mixers = config.layer_mixers()
    if len(set(mixers)) > 1 or mixers[0] not in FLA_ARCHITECTURES:
        fields = config_to_fla(GLALMConfig.from_model_config(config))
        del fields["model_type"]
        return fields
    mixer = mixers[0]
    fields = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    fields["architectures"] = [FLA_ARCHITECTURES[mixer]]
    if mixer == "mamba":
        options = config.mamba
        return fields | {"state_size": options.state_size, "expand": options.expand, "conv_kernel": options.conv}
    if mixer == "mamba2":
        options = config.mamba2
        fields |= {"state_size": options.state_size, "expand": options.expand, "conv_kernel": options.conv}
        return fields | {"head_dim": options.head_dim, "n_groups": options.groups}
    taps = config.kda.short_conv if mixer == "kda" else config.deltanet.short_conv
    fields |= {"num_heads": config.num_heads, "intermediate_size": config.intermediate_size}
    fields |= {"use_short_conv": taps > 0, "conv_size": taps or 4}
    if mixer == "deltanet":
        return fields | {"expand_k": config.expand_k, "expand_v": config.expand_v}
    # In these models expand_v is relative to the width of the keys.
    head_dim = config.key_dim // config.num_heads
    return fields | {"head_dim": head_dim, "expand_v": config.value_dim / config.key_dim}


def llama(row: Row, arguments: argparse.Namespace) -> tuple[RunConfig, Callable[[Tensor], Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = compose_run_config(row, "attention", [])
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    shape = {name: getattr(config.model, name) for name in names} | {"max_position_embeddings": row.T}
    heads, _ = attention_heads(config.model)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=heads, attn_implementation="sdpa"))
    return config, build_step(torch.compile(model) if CUDA else model, config)


def build_step(model: torch.nn.Module, config: RunConfig) -> Callable[[Tensor], Tensor]:
    """Return a training step of another library's model."""
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
    """Train a model for a few steps and return the numbers of its row."""
    torch.set_float32_matmul_precision("high")
    config, step = MODELS[name](row, arguments)
    device = torch.device("cuda", torch.cuda.current_device()) if CUDA else torch.device("cpu")
    sequences = row.batch * (arguments.accumulation if name == "glalm" else 1)
    ids = torch.randint(config.model.vocab_size, (sequences, row.T + 1), device=device)
    start = synchronized_time()
    step(ids)
    result = {"first_step_seconds": synchronized_time() - start}
    if CUDA:
        # Not later: the memory of a CUDA graph is counted when it is captured, in the third step, and not in replays.
        torch.cuda.reset_peak_memory_stats()
    for _ in range(arguments.warmup - 1):
        step(ids)
    start = synchronized_time()
    for _ in range(arguments.steps):
        loss = step(ids)
    seconds = (synchronized_time() - start) / arguments.steps
    per_gpu = sequences * row.T / seconds
    peak = peak_flops(device)
    result |= {"step_ms": 1e3 * seconds, "tokens_per_second": per_gpu * WORLD, "tokens_per_second_per_gpu": per_gpu}
    result["mfu"] = peak and per_gpu * model_cost(config.model, row.T).training / peak
    result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / GIB if CUDA else None
    result["reserved_memory_gib"] = torch.cuda.max_memory_reserved() / GIB if CUDA else None
    result["loss"] = loss.item()
    result["host_ms"] = median(measure_host_ms(step, ids) for _ in range(arguments.steps))
    if arguments.estimate and name == "glalm":
        compiled = config.train.compile in ("auto", True) and CUDA
        plan = BatchPlan.from_config(config, WORLD)
        parts = estimate_memory(config, plan, parallel.local_world_size(), CUDA, compiled, is_gpu=CUDA)
        result["estimate_gib"] = sum(parts.values()) / GIB
    if arguments.profile:
        result["profile"] = profile_step(lambda: step(ids))
    return result


def synchronized_time() -> float:
    """Return the time in seconds after all work of the device is complete."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_host_ms(step: Callable[[Tensor], Tensor], ids: Tensor) -> float:
    """Return how long the host is in the call of a step, which the device is idle before."""
    start = synchronized_time()
    step(ids)
    return 1e3 * (time.perf_counter() - start)


RECURRENT = "rescale|scan|segments|gradients|recurrent|prepare|decays|scores"  # in our kernels' names
KERNEL_KINDS = {  # kind of a kernel: a pattern of its name; the first that matches counts
    "communication": r"nccl",
    "copies": r"^Mem(cpy|set)",
    "loss, without its matmuls": r"cross_entropy|nll_loss|log_softmax",
    "attention": r"flash|fmha|sdpa|attention",
    "recurrent kernels": rf"({RECURRENT})\w*_kernel|^chunk_|fused_recurrent",
    "optimiser and clipping": r"multi_tensor|[Ff]used[Aa]dam|lpnorm|foreach",
    "matmuls": r"gemm|cutlass|nvjet|cublas|xmma|splitK|triton_tem_",
    "convolutions": r"^conv_|^sum_shares",
    "norms and elementwise": r"^triton_|elementwise|norm|reduce|layer_|swiglu|gate|embedding|index|cat|scatter|gather",
}


def kernel_kind(kernel: str) -> str:
    return next((kind for kind, pattern in KERNEL_KINDS.items() if re.search(pattern, kernel)), "other")


def profile_step(step: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Profile one step on the device.

    Returns:
        kinds: ms by kind of kernel, and idle. Communication is exposed where no other kernel runs.
        kernels: ms of the forty kernels that take longest.
    """
    step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA) as record:
        step()
        synchronized_time()
    device_type = torch.autograd.DeviceType.CUDA if CUDA else torch.autograd.DeviceType.CPU
    # Other events of the device contain those of many kernels: a step's, an optimizer's, a collective's.
    ranges = ("ProfilerStep", "## ", "Optimizer.", "nccl:", "FSDP::", "DistributedDataParallel")
    events = [e for e in record.events() if e.device_type == device_type and not e.name.startswith(ranges)]
    times = [(e.name, e.time_range.start / 1e3, e.time_range.end / 1e3) for e in events]
    kernels = Counter()
    for name, start, end in times:
        kernels[name] += end - start
    return {"kinds": sum_kinds(times), "kernels": dict(kernels.most_common(40))}


def sum_kinds(times: list[tuple[str, float, float]]) -> dict[str, float]:
    """Return the ms of each kind of kernel and of idle, from the kernels' names, starts and ends in ms."""
    kinds = Counter()
    for name, start, end in times:
        kinds[kernel_kind(name)] += end - start
    idle = idle_time([(start, end) for _, start, end in times])
    if communication := kinds.pop("communication", 0.0):
        computing = [(start, end) for name, start, end in times if kernel_kind(name) != "communication"]
        kinds["exposed communication"] = idle_time(computing) - idle
        kinds["overlapped communication"] = communication - kinds["exposed communication"]
    return dict(kinds.most_common()) | {"idle": idle}


def idle_time(spans: list[tuple[float, float]]) -> float:
    """Return the time between the first start and the last end that no span covers."""
    idle = 0.0
    last_end = min(start for start, _ in spans)
    for start, end in sorted(spans):
        idle += max(0.0, start - last_end)
        last_end = max(last_end, end)
    return idle


# --------------------------------------------------------------------------------------------------------- the table


def measure_in_process(name: str, label: str, arguments: argparse.Namespace) -> dict:
    """Call `measure` in a new process, because memory and compiled code of one model would affect the next."""
    command = [sys.executable, __file__, "--one", name, "--rows", label, "--steps", str(arguments.steps)]
    command += ["--warmup", str(arguments.warmup), "--accumulation", str(arguments.accumulation)]
    command += ["--set", *arguments.set]
    command += [f"--{flag}" for flag in ("tiny", "profile", "estimate") if getattr(arguments, flag)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def print_header() -> None:
    print("| row | model | tokens/s | step, ms | host, ms | MFU | peak GiB | first step, s |", flush=True)
    print("|-|-|-|-|-|-|-|-|", flush=True)


def print_row(label: str, name: str, result: dict) -> None:
    if "error" in result:
        print(f"| {label} | {name} | {result['error']} |", flush=True)
        return
    mfu = "-" if result["mfu"] is None else f"{result['mfu']:.1%}"
    peak = "-" if result["peak_memory_gib"] is None else f"{result['peak_memory_gib']:.1f}"
    peak += f" (estimate {result['estimate_gib']:.1f})" if "estimate_gib" in result else ""
    print(
        f"| {label} | {name} | {result['tokens_per_second'] / 1e3:,.1f}k | {result['step_ms']:,.1f} | "
        f"{result['host_ms']:,.1f} | {mfu} | {peak} | {result['first_step_seconds']:.1f} |",
        flush=True,
    )
    for table in result.get("profile", {}).values():
        total = sum(table.values())
        print("\n".join(f"    {ms:8.2f} ms {ms / total:6.1%}  {what[:100]}" for what, ms in table.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows_help = f"{', '.join(ROWS)} (default: all of these), or 340m:8x8192"
    parser.add_argument("--rows", nargs="+", type=named_row, default=[*ROWS.items()], metavar="ROW", help=rows_help)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS] if WORLD == 1 else ["glalm"])
    parser.add_argument("--steps", type=int, default=8, help="timed steps (default: %(default)s)")
    parser.add_argument(
        "--warmup", type=int, default=3, help="steps before them, including the first (default: %(default)s)"
    )
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of our step (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="an override of our config and fla's")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--estimate", action="store_true", help="print the dry run's estimate next to the peak")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rows = {"tiny": TINY} if arguments.tiny else dict(arguments.rows)
    attention = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(attention, set_priority=True) if CUDA else contextlib.nullcontext():
        if arguments.one:
            print(json.dumps(measure(arguments.one, next(iter(rows.values())), arguments)))
            return
        is_first = int(os.environ.get("RANK", 0)) == 0
        results = []
        if is_first:
            print_header()
        for label, row in rows.items():
            for name in arguments.models:
                alone = WORLD == 1
                result = measure_in_process(name, label, arguments) if alone else measure(name, row, arguments)
                results.append({"row": label, "model": name, "gpus": WORLD, **row._asdict(), **result})
                if is_first:
                    print_row(label, name, result)
    if is_first and arguments.json:
        record = {"environment": describe_environment(), "changes": arguments.set, "results": results}
        arguments.json.write_text(json.dumps(record, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
