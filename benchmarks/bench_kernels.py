"""Time chunk_gla, torch's causal attention and, if it is installed, flash-linear-attention on one GPU.

    python benchmarks/bench_kernels.py                       the table of docs/performance.md, in Markdown
    python benchmarks/bench_kernels.py --gates               every gate of the family, with its logits fused or not
    python benchmarks/bench_kernels.py --figure speed.png    tokens a second by length; also writes speed.json
    python benchmarks/bench_kernels.py --tune 128 256        configurations for (K, V), for kernels/triton/launch.py

Times are medians in ms, and every call starts with a cold L2 cache. Without --graph, a time spans from the beginning of
a call on the GPU to its end, including waits for the host: where Python and launches take longer than the kernels, the
host is measured. With --graph, the same call, including its gradients, is captured in a CUDA graph and its replays are
timed: the kernels and the short gaps between them. "-" means that the call failed or cannot be captured; stderr has the
reason. Peak is the memory above the inputs in MiB over one forward and backward pass, without a graph.
"""

import argparse
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from glalm import kernels
from glalm.kernels import chunk_gla
from glalm.kernels.graph_capture import GraphCapture
from glalm.kernels.triton import gla
from glalm.kernels.triton.gla import SavedForBackward
from glalm.kernels.triton.launch import LaunchConfig

SHAPES = {  # B, T, H, K, V, and the heads of attention and their width in a model of the same size
    "1.3B layer B8 T2048": (8, 2048, 4, 256, 512, 16, 128),
    "1.3B layer B1 T16384": (1, 16384, 4, 256, 512, 16, 128),
    "340M layer B32 T2048": (32, 2048, 4, 128, 256, 16, 64),
    "340M layer B2 T32768": (2, 32768, 4, 128, 256, 16, 64),
    "D64 B32 T1024": (32, 1024, 16, 64, 64, 16, 64),
    "D64 B32 T4096": (32, 4096, 16, 64, 64, 16, 64),
    "D64 B32 T16384": (32, 16384, 16, 64, 64, 16, 64),
}


def causal_attention(backend: SDPBackend) -> Callable[..., Tensor]:
    """Return torch's causal attention on (q, k, v) by one of its backends."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


def list_operators() -> Iterator[tuple[str, bool, Callable[..., Tensor]]]:
    """Yield name, whether it takes gates, and the function of every operator."""
    yield "glalm", True, lambda *inputs: chunk_gla(*inputs)[0]
    try:
        from fla.ops.gla import chunk_gla as peer

        yield "fla", True, lambda *inputs: peer(*inputs)[0]
    except ImportError:
        pass
    yield "FlashAttention-2", False, causal_attention(SDPBackend.FLASH_ATTENTION)
    yield "cuDNN", False, causal_attention(SDPBackend.CUDNN_ATTENTION)


@functools.cache
def generator() -> torch.Generator:
    """Return a random generator. A failed capture of a CUDA graph would make torch's own unusable."""
    return torch.Generator("cuda")


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(), device="cuda", dtype=torch.bfloat16)


def random_inputs(B: int, T: int, H: int, K: int, V: int) -> list[Tensor]:
    """Draw q, k, v and log gates g."""
    q, k, v, x = (random_tensor(B, T, H, n) for n in (K, K, V, K))
    return [y.detach().requires_grad_() for y in (q, k, v, F.logsigmoid(x) / 16)]


def attempt(measure: Callable[..., float], *arguments) -> float | None:
    """Return the measurement, or None if it fails, after printing the reason to stderr."""
    try:
        return measure(*arguments)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None


def format_number(number: float | None, digits: int = 3) -> str:
    return "-" if number is None else f"{number:.{digits}f}"


def median_ms(call: Callable[[], object], leaves: list[Tensor], graph: bool) -> float:
    """Time a call that may add gradients to `leaves`."""
    clear_gradients(leaves)
    return do_bench(capture_graph(call, leaves) if graph else call, grad_to_none=leaves, return_mode="median")


def capture_graph(call: Callable[[], object], leaves: list[Tensor]) -> Callable[[], None]:
    """Return the replay of a call as one CUDA graph, whose memory holds outputs and gradients."""
    capture = GraphCapture(torch.device("cuda"))
    capture.warm_up(call)
    clear_gradients(leaves)  # The graph would add to gradients that exist.
    graph, _ = capture.capture(call)
    return graph.replay


def clear_gradients(leaves: list[Tensor]) -> None:
    for x in leaves:
        x.grad = None


def peak_mib(call: Callable[[], object], leaves: list[Tensor]) -> float:
    """Return the peak memory of a call above that before it."""
    call()
    clear_gradients(leaves)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(call: Callable[..., Tensor], inputs: list[Tensor], graph: bool) -> tuple[float | None, ...]:
    """Return median ms of the forward pass and of both passes, and the peak in MiB."""
    do = random_tensor(*inputs[2].shape)  # The output has the shape of v.

    def both() -> None:
        call(*inputs).backward(do)

    forward = torch.no_grad()(lambda: call(*inputs))
    return (
        attempt(median_ms, forward, inputs, graph),
        attempt(median_ms, both, inputs, graph),
        attempt(peak_mib, both, inputs),
    )


def print_table(shapes: dict[str, tuple[int, ...]], graph: bool) -> dict[str, dict[str, tuple[float | None, ...]]]:
    """Measure every operator at every shape, print a row for each shape, and return {shape: {operator: numbers}}."""
    rows = {}
    for name, (B, T, H, K, V, heads, width) in shapes.items():
        rows[name] = {}
        for operator, gated, call in list_operators():
            if gated:
                inputs = random_inputs(B, T, H, K, V)
            else:
                inputs = [random_tensor(B, heads, T, width).requires_grad_() for _ in range(3)]
            rows[name][operator] = measure(call, inputs, graph)
            torch.cuda.empty_cache()
        cells = (
            f"{format_number(f)} / {format_number(b)} ms, {format_number(p, 0)} MiB" for f, b, p in rows[name].values()
        )
        if len(rows) == 1:
            print(f"| forward / both, peak | {' | '.join(rows[name])} |\n|{'-|' * (len(rows[name]) + 1)}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return rows


def print_gates(B: int, T: int, H: int, K: int, V: int, graph: bool) -> None:
    """Print ms of the forward pass and of both passes for every kind of gate."""
    q, k, v, g = random_inputs(B, T, H, K, V)
    x = random_tensor(*g.shape).requires_grad_()
    head, head_x = (y.detach()[..., 0].contiguous().requires_grad_() for y in (g, x))
    fused = {"gate_logit_normalizer": 16.0}
    cases = {
        "a gate a channel, bf16": lambda: chunk_gla(q, k, v, g),
        "its logits, fused": lambda: chunk_gla(q, k, v, x, **fused),
        "its logits, fp32 outside": lambda: chunk_gla(q, k, v, F.logsigmoid(x.float()) / 16),
        "a gate a head, bf16": lambda: kernels.chunk_simple_gla(q, k, v, head),
        "its logits": lambda: kernels.chunk_simple_gla(q, k, v, head_x, **fused),
        "fixed decay (RetNet)": lambda: kernels.chunk_retention(q, k, v),
        "no gate": lambda: kernels.chunk_linear_attn(q, k, v),
    }
    do = random_tensor(*v.shape)
    leaves = [q, k, v, g, x, head, head_x]
    for name, call in cases.items():
        forward = attempt(median_ms, torch.no_grad()(call), leaves, graph)
        both = attempt(median_ms, lambda c=call: c()[0].backward(do), leaves, graph)
        print(f"| B{B} T{T} H{H} K{K} V{V} | {name} | {format_number(forward)} / {format_number(both)} |", flush=True)


def plot_speed(path: str, graph: bool) -> None:
    """Measure and plot tokens a second by length. The number of tokens in a batch is constant."""
    lengths = [1024 * 2**i for i in range(6)]
    rows = print_table({f"T{T}": (2**17 // T, T, 16, 64, 64, 16, 64) for T in lengths}, graph)
    Path(path).with_suffix(".json").write_text(json.dumps(rows, indent=1))

    import matplotlib.pyplot as plt

    plt.figure(figsize=(6, 4))
    for operator in next(iter(rows.values())):
        speeds = [2**17 / (rows[f"T{T}"][operator][1] or math.nan) / 1e3 for T in lengths]
        plt.loglog(lengths, speeds, "o-", base=2, label=operator)
    plt.xticks(lengths, [f"{T // 1024}K" for T in lengths])
    ticks = [2**i for i in range(6)]
    plt.yticks(ticks, map(str, ticks))
    plt.grid(alpha=0.3)
    plt.xlabel("length (tokens)")
    plt.ylabel("million tokens a second, both passes")
    plt.title("16 heads of 64, 131,072 tokens a batch", fontsize="medium")
    plt.legend()
    plt.tight_layout()
    plt.savefig(path, dpi=150)


def tune_kernels(B: int, T: int, K: int, V: int) -> None:
    """Time each kernel alone with its candidate configurations. Later kernels run with the best of earlier ones."""
    widths = [v for v in (64, 128, 256) if v <= V]
    plain = [{"BV": v, "STORE_BANDS": p, "PREFETCH": False} for v, p in itertools.product(widths, (1, 4))]
    scans = plain + [tile | {"PREFETCH": True} for tile in plain]
    square = [{"BK": 64, "BV": 64, "PREFETCH": f} for f in (False, True)]
    q, k, v, g = (x.detach() for x in random_inputs(B, T, 4, K, V))
    do = torch.randn_like(v)
    o = torch.empty_like(v)
    plan = gla.LaunchPlan(q, k, v, g, K**-0.5, None, None)
    ungated = gla.LaunchPlan(q, k, v, None, K**-0.5, None, None)
    saved = plan.rescale(with_residual=True)
    states = plan.allocate_chunk_states()
    dstates = plan.allocate_chunk_states()
    allocate_state = functools.cache(plan.allocate_state)

    def with_starts() -> SavedForBackward:
        """Return `saved` with room for as many segment starts as the current forward configuration needs."""
        return saved._replace(segment_starts=allocate_state(plan.segments_of_scan(reverse=False)))

    def compute_starts() -> None:
        segments = plan.segments_of_scan(reverse=False)
        plan.compute_segment_starts(allocate_state(segments), segments, saved, v, None, None, False)

    candidates = {
        "rescale": ([{"BK": 64}], lambda: plan.rescale(with_residual=True)),
        "scan_forward": (plain, lambda: plan.scan(with_starts(), v, None, None, out=o)),
        "scan_states": (scans, lambda: plan.scan(with_starts(), v, None, None, states=states)),
        "scan_segment_starts": (plain, compute_starts),
        "scan_backward": (scans, lambda: plan.scan(saved, do, None, None, out=o, states=dstates, reverse=True)),
        "gradients": (square, lambda: plan.compute_gradients(saved, do, states, dstates)),
        "gradients_fixed_gate": (square, lambda: ungated.compute_gradients(saved, do, states, dstates)),
    }
    for kernel, (tiles, call) in candidates.items():
        if kernel == "scan_segment_starts" and plan.segments_of_scan(reverse=False) == 1:
            continue
        found = []
        for tile, warps, stages, limit in itertools.product(tiles, (4, 8), (1, 2, 3, 4), (None, 168, 128)):
            if warps == 8 and (limit or "STORE_BANDS" not in tile):
                continue  # A chunk's 64 rows occupy one warp group. A second group would only repeat its work.
            launch = LaunchConfig(tile, warps, stages, limit)
            plan.config = ungated.config = plan.config._replace(**{kernel: launch})
            try:
                call()
                found.append((do_bench(call, return_mode="median"), launch))
            except OutOfResources as error:
                print(f"{kernel} {launch}: {error}")
        ms, best = min(found, key=lambda x: x[0])
        plan.config = ungated.config = plan.config._replace(**{kernel: best})
        print(f"B{B} T{T} {kernel:15s} {ms:.3f} ms  {best}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", metavar="PNG")
    parser.add_argument("--gates", action="store_true")
    parser.add_argument("--tune", nargs=2, type=int, metavar=("K", "V"))
    parser.add_argument("--graph", action="store_true", help="time replays of CUDA graphs; not with --tune")
    arguments = parser.parse_args()
    if arguments.graph and arguments.tune:
        parser.error("--tune times single kernels. Leave --graph out")
    if not torch.cuda.is_available():
        parser.error("There is no CUDA device, which the kernels need")
    if arguments.tune:
        for B, T in ((32, 2048), (2, 32768)):  # many heads, and few
            tune_kernels(B, T, *arguments.tune)
    elif arguments.gates:
        for name in ("1.3B layer B8 T2048", "340M layer B32 T2048", "D64 B32 T1024"):
            print_gates(*SHAPES[name][:5], arguments.graph)
    elif arguments.figure:
        plot_speed(arguments.figure, arguments.graph)
    else:
        print_table(SHAPES, arguments.graph)
