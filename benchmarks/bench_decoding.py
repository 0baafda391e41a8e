"""Time decoding of our models, those of flash-linear-attention if it is installed, and Llama with a static cache.

    python benchmarks/bench_decoding.py --out FOLDER                                  1.3B, bf16, all rows
    python benchmarks/bench_decoding.py --models glalm llama --batches 1 --prompts 2048 16384
    python benchmarks/bench_decoding.py --models glalm --presets gla mamba2 kda --size 340m --batches 1 8 --prompts 2048

Weights are random. A row of the table is one model, batch size and prompt length. It shows ms a step over --new greedy
tokens, peak memory, and the size of the state of one sequence. If the prompts of a batch have at most --read tokens in
all, the prefill is run and timed. Otherwise decoding starts from a state of the same size, which costs a step the
same. Llama's steps are compiled (mode="reduce-overhead"). Rows that cannot fit into memory are skipped. "x weights"
is the time of a step divided by the time of reading every weight once, at the bandwidth of a copy on this device.

--presets are names in configs/model without the size. Each has rows of our model, and of flash-linear-attention's of
the same mixer and widths. Llama has the widths of the preset gla.

FOLDER gets decoding.json and decoding.png. Rows of earlier calls are kept, so models can be added one by one:
python benchmarks/bench_decoding.py --models llama --batches 1 --prompts 2048 --out FOLDER
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
from bench_training import Row, compose_run_config, fla_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from glalm.generation.cuda_graph import CudaGraphGenerator, prefill_prompt
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.model.config import ModelConfig

Stepper = Callable[[Tensor], Tensor]  # tokens [B, 1] to logits [B, vocabulary]


class Runner(NamedTuple):
    """A model, and how to decode with it.

    prefill(ids, room) reads a prompt [B, T] and returns the state after it, with room for so many more tokens.
    empty_state(B, T, room) returns a state of the same size without reading B prompts.
    start(state) returns the function that computes the next step.
    state_bytes(T) is the size of the state of one sequence of T tokens.
    """

    model: nn.Module
    prefill: Callable[[Tensor, int], Any]
    empty_state: Callable[[int, int, int], Any]
    start: Callable[[Any], Stepper]
    state_bytes: Callable[[int], int]


def build_model(model_class: type[nn.Module], config, device: str) -> nn.Module:
    with torch.device(device):  # Drawing random weights on the CPU would be slow.
        return model_class(config).to(torch.bfloat16).eval()


def count_bytes(states: list) -> int:
    return sum(x.nbytes for x in tree_leaves(states) if isinstance(x, Tensor))


def glalm(config: ModelConfig, device: str) -> Runner:
    model = build_model(GLALMForCausalLM, GLALMConfig.from_model_config(config), device)

    def prefill(ids: Tensor, room: int):
        return prefill_prompt(model, ids, None, None, 2**15)[1]

    def empty_state(B: int, T: int, room: int):
        cache = prefill(torch.zeros(1, T, dtype=torch.int64, device=device), room)
        cache.batch_repeat_interleave(B)
        return cache

    generator = CudaGraphGenerator(model)
    return Runner(model, prefill, empty_state, generator.start_step, lambda T: count_bytes(empty_state(1, T, 0).states))


def fla(config: ModelConfig, device: str) -> Runner:
    model = build_model(*fla_model(config), device)

    def prefill(ids: Tensor, room: int):
        return model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def empty_state(B: int, T: int, room: int):
        return prefill(torch.zeros(B, 64, dtype=torch.int64, device=device), room)

    def start(cache) -> Stepper:
        def next_logits(tokens: Tensor) -> Tensor:
            nonlocal cache
            out = model(tokens, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            return out.logits[:, -1]

        return next_logits

    state_bytes = count_bytes(list(empty_state(1, 1, 0)))
    return Runner(model, prefill, empty_state, start, lambda T: state_bytes)


def llama(config: ModelConfig, device: str) -> Runner:
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    d = config.hidden_size
    layers = config.num_hidden_layers
    heads = max(2, d // 128)
    llama_config = LlamaConfig(
        hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size, max_position_embeddings=65536,
    )  # fmt: skip
    model = build_model(LlamaForCausalLM, llama_config, device)

    def empty_state(B: int, T: int, room: int) -> StaticCache:
        cache = StaticCache(llama_config, max_cache_len=T + room)
        cache.early_initialization(B, heads, d // heads, torch.bfloat16, torch.device(device))
        for layer in cache.layers:
            layer.cumulative_length.fill_(T)
        return cache

    def prefill(ids: Tensor, room: int) -> StaticCache:
        cache = empty_state(*ids.shape, room)
        for layer in cache.layers:
            layer.cumulative_length.fill_(0)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def start(cache: StaticCache) -> Stepper:
        forward = model.forward
        if device != "cpu":
            torch._dynamo.reset()
            forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
        return lambda tokens: forward(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]

    return Runner(model, prefill, empty_state, start, lambda T: layers * 2 * d * 2 * T)


RUNNERS = {"glalm": glalm, "fla": fla, "llama": llama}


def synchronized_time(device: str) -> float:
    """Return the time in seconds after all work of the device is complete."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_bandwidth(device: str) -> float:
    """Return the bytes a second that a copy reads and writes, added up."""
    x = torch.empty(2**30 if device != "cpu" else 2**22, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    start = synchronized_time(device)
    for _ in range(10):
        y.copy_(x)
    return 20 * x.nbytes / (synchronized_time(device) - start)


def time_row(runner: Runner, B: int, T: int, args: argparse.Namespace) -> dict[str, float]:
    """Time the prefill, if the prompts are short enough, and the steps of one row."""
    ids = torch.randint(runner.model.config.vocab_size, (B, T), device=args.device)
    times = {}
    if args.read >= B * T:
        runner.prefill(ids, args.new)  # This compiles.
        start = synchronized_time(args.device)
        cache = runner.prefill(ids, args.new)
        times["prefill_tokens_per_second"] = B * T / (synchronized_time(args.device) - start)
    else:
        cache = runner.empty_state(B, T, args.new)
    step = runner.start(cache)
    tokens = ids[:, -1:]
    warmup = min(4, args.new // 2)
    for t in range(args.new):
        if t == warmup:
            start = synchronized_time(args.device)
        tokens = step(tokens).argmax(-1, keepdim=True)
    seconds = (synchronized_time(args.device) - start) / (args.new - warmup)
    return times | {"ms": 1e3 * seconds, "tokens_per_second": B / seconds}


def training_forward(runner: Runner, args: argparse.Namespace) -> float:
    """Return the tokens a second of training's forward pass, without logits, on 8 sequences of 2048 tokens."""
    T = 2048 if args.size != "tiny" else 32
    ids = torch.randint(runner.model.config.vocab_size, (8, T), device=args.device)
    runner.model(ids, shift_labels=ids, use_cache=False)
    start = synchronized_time(args.device)
    for _ in range(3):
        runner.model(ids, shift_labels=ids, use_cache=False)
    return 3 * ids.numel() / (synchronized_time(args.device) - start)


@torch.no_grad()
def measure_rows(args: argparse.Namespace) -> dict:
    """Print the table and return it together with the rows of earlier calls. args.out is updated after every row."""
    result = {"size": args.size, "device": "cpu" if args.device == "cpu" else torch.cuda.get_device_name(args.device)}
    earlier = read_result(args.out, result)
    result = {**earlier, **result, "bandwidth": measure_bandwidth(args.device), "rows": earlier.get("rows", [])}
    print("| model | batch | prompt | ms a step | tokens/s | x weights | prefill tokens/s | state MiB | peak GiB |")
    print("|-|-|-|-|-|-|-|-|-|", flush=True)
    for name, (build_runner, config) in choose_runners(args).items():
        try:
            runner = build_runner(config, args.device)
        except Exception as error:  # The library is missing, or it does not support this version of transformers.
            print(f"{name} is left out: {type(error).__name__}: {error}", flush=True)
            continue
        if name == "glalm":
            result["training_forward_tokens_per_second"] = training_forward(runner, args)
        for B, T in itertools.product(args.batches, args.prompts):
            key = {"model": name, "batch": B, "prompt": T}
            row = key | measure_row(runner, B, T, result["bandwidth"], args)
            result["rows"] = [r for r in result["rows"] if not r.items() >= key.items()] + [row]
            print(format_row(row), flush=True)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / "decoding.json").write_text(json.dumps(result, indent=1))
        del runner
        free_memory(args.device)
    return result


def choose_runners(args: argparse.Namespace) -> dict[str, tuple[Callable[[ModelConfig, str], Runner], ModelConfig]]:
    """Return the function that builds a runner, and the config of our model, for the name of each row.

    Raises:
        ConfigError: A preset has no file in configs/model.
    """
    row = Row(args.size, batch=1, T=max(args.prompts))
    configs = {preset: compose_run_config(row, preset, []).model for preset in {"gla", *args.presets}}
    runners = {}
    for name in args.models:
        for preset in args.presets if name != "llama" else ["gla"]:
            runners[name if preset == "gla" else f"{name} {preset}"] = RUNNERS[name], configs[preset]
    return runners


def read_result(folder: Path | None, expected: dict) -> dict:
    """Return the result of earlier calls if its size and device are those of `expected`."""
    path = folder and folder / "decoding.json"
    result = json.loads(path.read_text()) if path and path.exists() else {}
    return result if result.items() >= expected.items() else {}


def measure_row(runner: Runner, B: int, T: int, bytes_per_second: float, args: argparse.Namespace) -> dict:
    """Return the numbers of a row, or in `failed` why there are none: memory, or an error of kernels or compiler."""
    weights = sum(p.nbytes for n, p in runner.model.named_parameters() if "embed" not in n)
    sizes = {"new": args.new, "weights_bytes": weights}
    free_memory(args.device)
    try:
        state = runner.state_bytes(T + args.new)
        sizes["state_mib"] = state / 2**20
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            if weights + B * state > 0.95 * torch.cuda.get_device_properties(args.device).total_memory:
                return sizes | {"failed": "out of memory"}
        times = time_row(runner, B, T, args)
    except torch.OutOfMemoryError:
        return sizes | {"failed": "out of memory"}
    except Exception as error:
        return sizes | {"failed": f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]}
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device != "cpu" else None
    return sizes | times | {"times_weights": times["ms"] / 1e3 / (weights / bytes_per_second), "peak_gib": peak}


def free_memory(device: str) -> None:
    torch._dynamo.reset()  # The graph of a compiled step holds memory.
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def format_row(row: dict) -> str:
    if "failed" in row:
        cells = [row["failed"], *[""] * 3, f"{row['state_mib']:.1f}" if "state_mib" in row else "", ""]
    else:
        prefill = row.get("prefill_tokens_per_second")
        cells = [f"{row['ms']:.3f}", f"{row['tokens_per_second']:,.0f}", f"{row['times_weights']:.2f}"]
        cells += ["" if prefill is None else f"{prefill:,.0f}", f"{row['state_mib']:.1f}"]
        cells += ["" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"]
    return "| " + " | ".join([row["model"], str(row["batch"]), str(row["prompt"]), *cells]) + " |"


def plot_speed(result: dict, path: Path) -> None:
    """Plot tokens a second by prompt length: one panel for each batch size, one line for each model.

    A line ends at the last prompt that fits into memory.
    """
    from matplotlib.figure import Figure

    batches = sorted({r["batch"] for r in result["rows"]})
    figure = Figure(figsize=(3.2 * len(batches), 3.2), layout="constrained")
    for axis, B in zip(figure.subplots(1, len(batches), sharey=True, squeeze=False)[0], batches, strict=True):
        for name in dict.fromkeys(r["model"] for r in result["rows"]):
            points = [r for r in result["rows"] if (r["model"], r["batch"]) == (name, B) and "ms" in r]
            axis.plot([r["prompt"] for r in points], [r["tokens_per_second"] for r in points], "o-", label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.set_title(f"batch {B}")
        axis.set_xlabel("prompt (tokens)")
    figure.axes[0].set_ylabel("tokens a second")
    figure.axes[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=RUNNERS, default=[*RUNNERS])
    parser.add_argument("--presets", nargs="+", default=["gla"], help="our presets, without _SIZE (gla)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--prompts", nargs="+", type=int, default=[2048, 8192, 16384, 32768])
    parser.add_argument("--new", type=int, default=256, help="tokens to generate (256)")
    parser.add_argument(
        "--read", type=int, default=2**17, help="run the prefill of batches of at most so many tokens (131072)"
    )
    parser.add_argument("--size", default="1b3", help="of the presets (1b3)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="folder for decoding.json and decoding.png")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"There is no CUDA device for --device {args.device}. Choose --device cpu and smaller --prompts")
    result = measure_rows(args)
    forward = result.get("training_forward_tokens_per_second")
    print(f"\n{result['device']}: {result['bandwidth'] / 1e12:.2f} TB/s by copying", end="")
    print("" if forward is None else f"; glalm's training forward {forward:,.0f} tokens/s")
    if args.out and result["rows"]:
        plot_speed(result, args.out / "decoding.png")


if __name__ == "__main__":
    main()
