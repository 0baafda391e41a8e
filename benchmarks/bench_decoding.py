"""Time decoding: ours, flash-linear-attention's GLA where it is installed, and transformers' Llama with a static cache.

    python benchmarks/bench_decoding.py --out FOLDER                                  1.3B, bf16, all rows
    python benchmarks/bench_decoding.py --models glalm llama --batches 1 --prompts 2048 16384

Weights are random. A row is one model, batch size and prompt length: ms a step over --new greedy tokens, the peak of
memory, and what a sequence's state takes. Prompts of at most --read tokens in all are read, and the reading timed;
beyond, the state is one of that size that was not read, which costs a step the same. Llama's steps are compiled
(mode="reduce-overhead"). A row that cannot fit is not tried. "x weights": the step over the time of reading every
weight once at the bandwidth measured here by copying. Prints a table; FOLDER gets decoding.json and decoding.png, where
rows of earlier calls stay: python benchmarks/bench_decoding.py --models llama --batches 1 --prompts 2048 --out FOLDER
"""

import argparse
import gc
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from glalm.generation.cuda_graph import DecodeStep, prefill_prompt
from glalm.hf import GLALMConfig, GLALMForCausalLM

SIZES = {  # width, layers, GLA's heads, SwiGLU's width, vocabulary
    "tiny": (64, 2, 2, 128, 300),
    "340m": (1024, 24, 4, 2816, 32000),
    "1b3": (2048, 24, 4, 5632, 32000),
}
Stepper = Callable[[Tensor], Tensor]  # tokens [B, 1] to logits [B, vocabulary]


class Runner(NamedTuple):
    model: nn.Module
    read: Callable[[Tensor, int], Any]  # prompt [B, T] and room for so many more: the state behind it
    blank: Callable[[int, int, int], Any]  # the same for B, T and room, without reading
    step: Callable[[Any], Stepper]
    state_bytes: Callable[[int], int]  # of one sequence of T tokens


def made(kind: type[nn.Module], config, device: str) -> nn.Module:
    with torch.device(device):  # where drawing the weights takes no time
        return kind(config).to(torch.bfloat16).eval()


def glalm(size: str, device: str) -> Runner:
    d, layers, heads, inner, vocabulary = SIZES[size]
    config = GLALMConfig(
        hidden_size=d, num_hidden_layers=layers, num_heads=heads, intermediate_size=inner, vocab_size=vocabulary
    )
    model = made(GLALMForCausalLM, config, device)

    def read(ids: Tensor, room: int):
        return prefill_prompt(model, ids, None, None, 2**15)[1]

    def blank(B: int, T: int, room: int):
        return read(torch.zeros(B, 16, dtype=torch.int64, device=device), room)

    def step(cache) -> Stepper:
        made = DecodeStep(model, cache)
        made.load(cache)
        return made

    size_of_state = sum(x.nbytes for x in tree_leaves(blank(1, 1, 0).states))
    return Runner(model, read, blank, step, lambda T: size_of_state)


def fla(size: str, device: str) -> Runner:
    from fla.models import GLAConfig
    from fla.models import GLAForCausalLM as Peer

    d, layers, heads, inner, vocabulary = SIZES[size]
    config = GLAConfig(
        hidden_size=d, num_hidden_layers=layers, num_heads=heads, intermediate_size=inner, vocab_size=vocabulary
    )
    model = made(Peer, config, device)

    def read(ids: Tensor, room: int):
        return model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def blank(B: int, T: int, room: int):
        return read(torch.zeros(B, 64, dtype=torch.int64, device=device), room)

    def step(cache) -> Stepper:
        def next_logits(tokens: Tensor) -> Tensor:
            nonlocal cache
            out = model(tokens, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            return out.logits[:, -1]

        return next_logits

    return Runner(model, read, blank, step, lambda T: layers * d // 2 * d // heads * 4)


def llama(size: str, device: str) -> Runner:
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    d, layers, _, inner, vocabulary = SIZES[size]
    heads = max(2, d // 128)
    config = LlamaConfig(
        hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner,
        vocab_size=vocabulary, max_position_embeddings=65536,
    )  # fmt: skip
    model = made(LlamaForCausalLM, config, device)

    def blank(B: int, T: int, room: int) -> StaticCache:
        cache = StaticCache(config, max_cache_len=T + room)
        cache.early_initialization(B, heads, d // heads, torch.bfloat16, torch.device(device))
        for layer in cache.layers:
            layer.cumulative_length.fill_(T)
        return cache

    def read(ids: Tensor, room: int) -> StaticCache:
        cache = blank(*ids.shape, room)
        for layer in cache.layers:
            layer.cumulative_length.fill_(0)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def step(cache: StaticCache) -> Stepper:
        forward = model.forward
        if device != "cpu":
            torch._dynamo.reset()
            forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
        return lambda tokens: forward(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]

    return Runner(model, read, blank, step, lambda T: layers * 2 * d * 2 * T)


RUNNERS = {"glalm": glalm, "fla": fla, "llama": llama}


def wait(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a copy."""
    x = torch.empty(2**30 if device != "cpu" else 2**22, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    start = wait(device)
    for _ in range(10):
        y.copy_(x)
    return 20 * x.nbytes / (wait(device) - start)


def row(runner: Runner, B: int, T: int, args: argparse.Namespace) -> dict[str, float]:
    """What is timed of a row."""
    ids = torch.randint(SIZES[args.size][4], (B, T), device=args.device)
    found = {}
    if args.read >= B * T:
        runner.read(ids, args.new)  # compiles
        start = wait(args.device)
        cache = runner.read(ids, args.new)
        found["prefill_tokens_per_second"] = B * T / (wait(args.device) - start)
    else:
        cache = runner.blank(B, T, args.new)
    step, tokens = runner.step(cache), ids[:, -1:]
    warm = min(4, args.new // 2)
    for t in range(args.new):
        if t == warm:
            start = wait(args.device)
        tokens = step(tokens).argmax(-1, keepdim=True)
    seconds = (wait(args.device) - start) / (args.new - warm)
    return found | {"ms": 1e3 * seconds, "tokens_per_second": B / seconds}


def training_forward(runner: Runner, args: argparse.Namespace) -> float:
    """Tokens a second of the forward pass that training runs, without logits, on 8 sequences of 2048 tokens."""
    ids = torch.randint(SIZES[args.size][4], (8, 2048 if args.size != "tiny" else 32), device=args.device)
    runner.model(ids, shift_labels=ids, use_cache=False)
    start = wait(args.device)
    for _ in range(3):
        runner.model(ids, shift_labels=ids, use_cache=False)
    return 3 * ids.numel() / (wait(args.device) - start)


@torch.no_grad()
def bench(args: argparse.Namespace) -> dict:
    """Prints the table; what it returns is also in args.out, after every row. Rows of earlier calls stay there."""
    result = {"size": args.size, "device": name_of(args.device)}
    earlier = read(args.out, result)
    result = {**earlier, **result, "bandwidth": bandwidth(args.device), "rows": earlier.get("rows", [])}
    print("| model | batch | prompt | ms a step | tokens/s | x weights | prefill tokens/s | state MiB | peak GiB |")
    print("|-|-|-|-|-|-|-|-|-|", flush=True)
    for name in args.models:
        try:
            runner = RUNNERS[name](args.size, args.device)
        except Exception as error:  # not installed, or not with this transformers: the others are still wanted
            print(f"{name} is left out: {type(error).__name__}: {error}", flush=True)
            continue
        if name == "glalm":
            result["training_forward_tokens_per_second"] = training_forward(runner, args)
        for B, T in itertools.product(args.batches, args.prompts):
            found = {"model": name, "batch": B, "prompt": T, **guarded(runner, B, T, result["bandwidth"], args)}
            result["rows"] = [r for r in result["rows"] if key(r) != key(found)] + [found]
            print(line(found), flush=True)
            write(args.out, result)
        del runner
        clear(args.device)
    return result


def key(row: dict) -> tuple:
    return row["model"], row["batch"], row["prompt"]


def read(folder: Path | None, wanted: dict) -> dict:
    """What earlier calls found for the same size on the same device."""
    path = folder and folder / "decoding.json"
    found = json.loads(path.read_text()) if path and path.exists() else {}
    return found if found.items() >= wanted.items() else {}


def write(folder: Path | None, result: dict) -> None:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "decoding.json").write_text(json.dumps(result, indent=1))


def guarded(runner: Runner, B: int, T: int, bytes_a_second: float, args: argparse.Namespace) -> dict:
    """A row, or why there is none: memory, or what a peer's kernels or the compiler raised."""
    weights = sum(p.nbytes for n, p in runner.model.named_parameters() if "embed" not in n)
    states = B * runner.state_bytes(T + args.new)
    sizes = {"new": args.new, "weights_bytes": weights, "state_mib": states / B / 2**20}
    clear(args.device)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        if weights + states > 0.95 * torch.cuda.get_device_properties(args.device).total_memory:
            return sizes | {"failed": "out of memory"}
    try:
        found = row(runner, B, T, args)
    except torch.OutOfMemoryError:
        return sizes | {"failed": "out of memory"}
    except Exception as error:
        return sizes | {"failed": f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]}
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device != "cpu" else None
    return sizes | found | {"times_weights": found["ms"] / 1e3 / (weights / bytes_a_second), "peak_gib": peak}


def clear(device: str) -> None:
    torch._dynamo.reset()  # a compiled step's graph holds memory
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def name_of(device: str) -> str:
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


def line(found: dict) -> str:
    if "failed" in found:
        cells = [found["failed"], *[""] * 3, f"{found['state_mib']:.1f}", ""]
    else:
        read, peak = found.get("prefill_tokens_per_second"), found["peak_gib"]
        cells = [f"{found['ms']:.3f}", f"{found['tokens_per_second']:,.0f}", f"{found['times_weights']:.2f}"]
        cells += [
            "" if read is None else f"{read:,.0f}",
            f"{found['state_mib']:.1f}",
            "" if peak is None else f"{peak:.1f}",
        ]
    return "| " + " | ".join([found["model"], str(found["batch"]), str(found["prompt"]), *cells]) + " |"


def figure(result: dict, path: Path) -> None:
    """Tokens a second against the prompt's length: a panel a batch size, a line a model; it ends where memory does."""
    from matplotlib.figure import Figure

    batches = sorted({r["batch"] for r in result["rows"]})
    drawn = Figure(figsize=(3.2 * len(batches), 3.2), layout="constrained")
    for axis, B in zip(drawn.subplots(1, len(batches), sharey=True, squeeze=False)[0], batches, strict=True):
        for name in dict.fromkeys(r["model"] for r in result["rows"]):
            points = [r for r in result["rows"] if (r["model"], r["batch"]) == (name, B) and "ms" in r]
            axis.plot([r["prompt"] for r in points], [r["tokens_per_second"] for r in points], "o-", label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.set_title(f"batch {B}")
        axis.set_xlabel("prompt (tokens)")
    drawn.axes[0].set_ylabel("tokens a second")
    drawn.axes[0].legend()
    drawn.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=RUNNERS, default=[*RUNNERS])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--prompts", nargs="+", type=int, default=[2048, 8192, 16384, 32768])
    parser.add_argument("--new", type=int, default=256, help="tokens to generate (256)")
    parser.add_argument("--read", type=int, default=2**17, help="the most tokens of prompts that are read (131072)")
    parser.add_argument("--size", choices=SIZES, default="1b3")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="folder for decoding.json and decoding.png")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"there is no --device {args.device}; write --device cpu, and smaller --prompts")
    result = bench(args)
    forward = result.get("training_forward_tokens_per_second")
    print(f"\n{result['device']}: {result['bandwidth'] / 1e12:.2f} TB/s by copying", end="")
    print("" if forward is None else f"; glalm's training forward {forward:,.0f} tokens/s")
    if args.out and result["rows"]:
        figure(result, args.out / "decoding.png")


if __name__ == "__main__":
    main()
