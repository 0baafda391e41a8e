"""Time chunk_gla beside torch's causal attention and, where it is installed, flash-linear-attention; on one GPU.

    python scripts/bench_kernels.py                       the table of docs/performance.md, in Markdown
    python scripts/bench_kernels.py --gates               every gate of the family, and logits fused or not
    python scripts/bench_kernels.py --figure speed.png    tokens a second against the length, and speed.json
    python scripts/bench_kernels.py --tune 128 256        candidates for one (K, V) of glalm/kernels/triton/configs.py

Times are medians in ms; peak is the memory above the inputs, in MiB, over one forward and backward.
"""

import argparse
import itertools
import json
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
from glalm.kernels.triton import configs, gla

SHAPES = {  # B, T, H, K, V and the attention heads of the same width
    "1.3B layer B8 T2048": (8, 2048, 4, 256, 512, 16, 128),
    "1.3B layer B1 T16384": (1, 16384, 4, 256, 512, 16, 128),
    "340M layer B32 T2048": (32, 2048, 4, 128, 256, 16, 64),
    "340M layer B2 T32768": (2, 32768, 4, 128, 256, 16, 64),
    "D64 B32 T1024": (32, 1024, 16, 64, 64, 16, 64),
    "D64 B32 T4096": (32, 4096, 16, 64, 64, 16, 64),
    "D64 B32 T16384": (32, 16384, 16, 64, 64, 16, 64),
}


def attention(backend: SDPBackend) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


def operators() -> Iterator[tuple[str, bool, Callable[..., Tensor]]]:
    """Name, whether it takes gates, and the call."""
    yield "glalm", True, lambda *inputs: chunk_gla(*inputs)[0]
    try:
        from fla.ops.gla import chunk_gla as peer

        yield "fla", True, lambda *inputs: peer(*inputs)[0]
    except ImportError:
        pass
    yield "FlashAttention-2", False, attention(SDPBackend.FLASH_ATTENTION)
    yield "cuDNN", False, attention(SDPBackend.CUDNN_ATTENTION)


def random_inputs(B: int, T: int, H: int, K: int, V: int) -> list[Tensor]:
    q, k, v, x = (torch.randn(B, T, H, n, device="cuda", dtype=torch.bfloat16) for n in (K, K, V, K))
    return [y.detach().requires_grad_() for y in (q, k, v, F.logsigmoid(x) / 16)]


def measure(call: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, float, float]:
    """Median ms of the forward and of both passes, and the peak in MiB."""
    do = torch.randn_like(call(*inputs))
    call(*inputs).backward(do)
    for x in inputs:
        x.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(*inputs).backward(do)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.no_grad():
        forward = do_bench(lambda: call(*inputs), return_mode="median")
    both = do_bench(lambda: call(*inputs).backward(do), grad_to_none=inputs, return_mode="median")
    return forward, both, peak


def table(shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[float, float, float]]]:
    rows = {}
    for name, (B, T, H, K, V, heads, width) in shapes.items():
        rows[name] = {}
        for operator, gated, call in operators():
            if gated:
                inputs = random_inputs(B, T, H, K, V)
            else:
                new = dict(device="cuda", dtype=torch.bfloat16, requires_grad=True)
                inputs = [torch.randn(B, heads, T, width, **new) for _ in range(3)]
            rows[name][operator] = measure(call, inputs)
            torch.cuda.empty_cache()
        cells = (f"{f:.3f} / {b:.3f} ms, {p:.0f} MiB" for f, b, p in rows[name].values())
        if len(rows) == 1:
            print(f"| forward / both, peak | {' | '.join(rows[name])} |\n|{'-|' * (len(rows[name]) + 1)}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return rows


def gates(B: int, T: int, H: int, K: int, V: int) -> dict[str, tuple[float, float]]:
    """Forward and both, ms, for every gate."""
    q, k, v, g = random_inputs(B, T, H, K, V)
    x = torch.randn_like(g).requires_grad_()
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
    times, do = {}, torch.randn_like(v)
    for name, call in cases.items():
        with torch.no_grad():
            forward = do_bench(call, rep=40, return_mode="median")
        leaves = [q, k, v, g, x, head, head_x]
        both = do_bench(lambda c=call: c()[0].backward(do), rep=40, grad_to_none=leaves, return_mode="median")
        times[name] = forward, both
        print(f"| B{B} T{T} H{H} K{K} V{V} | {name} | {forward:.3f} / {both:.3f} |", flush=True)
    return times


def figure(path: str) -> None:
    """Time per token against the length, batch times length constant."""
    import matplotlib.pyplot as plt

    lengths = [1024 * 2**i for i in range(6)]
    rows = table({f"T{T}": (2**17 // T, T, 16, 64, 64, 16, 64) for T in lengths})
    plt.figure(figsize=(6, 4))
    for operator in next(iter(rows.values())):
        plt.loglog(lengths, [2**17 / rows[f"T{T}"][operator][1] / 1e3 for T in lengths], "o-", base=2, label=operator)
    plt.xlabel("length")
    plt.ylabel("million tokens a second, forward and backward")
    plt.title("16 heads of 64, 131,072 tokens a batch")
    plt.legend()
    plt.tight_layout()
    plt.savefig(path, dpi=150)
    Path(path).with_suffix(".json").write_text(json.dumps(rows, indent=1))  # ms forward, ms of both passes, MiB


def tune(B: int, T: int, K: int, V: int) -> None:
    """Every kernel by itself over its candidates; the best of each is kept for those after it."""
    scans = [{"BV": v, "PARTS": p} for v in (64, 128, 256) for p in (1, 4) if v <= V]
    square = [{"BK": 64, "BV": 64}]
    q, k, v, g = (x.detach() for x in random_inputs(B, T, 4, K, V))
    do, o = torch.randn_like(v), torch.empty_like(v)
    plan = gla.Plan(q, k, v, g, K**-0.5, None, None)
    kept, states, dstates = plan.prepare(low=True), plan.new_states(), plan.new_states()
    candidates = {
        "prepare": ([{"BK": 64}], lambda: plan.prepare(low=True)),
        "forward": (scans, lambda: plan.scan(kept, v, None, None, out=o)),
        "states": (scans, lambda: plan.scan(kept, v, None, None, states=states)),
        "reverse": (scans, lambda: plan.scan(kept, do, None, None, out=o, states=dstates, reverse=True)),
        "dscores": ([{"BV": 64}], lambda: plan.dscores(do)),
        "gradients": (square, lambda: plan.gradients(kept, do, states, dstates)),
    }
    for kernel, (tiles, call) in candidates.items():
        found = []
        for tile, warps, stages in itertools.product(tiles, (4, 8), (1, 2, 3)):
            if tiles is not scans and warps == 8:
                continue  # a chunk's 64 rows are one warp group's worth: the second would only repeat it
            launch = configs.Launch(tile, warps, stages)
            plan.config = plan.config._replace(**{kernel: launch})
            try:
                call()
                found.append((do_bench(call, return_mode="median"), launch))
            except OutOfResources as error:
                print(f"{kernel} {launch}: {error}")
        ms, best = min(found, key=lambda x: x[0])
        plan.config = plan.config._replace(**{kernel: best})
        print(f"B{B} T{T} {kernel:10s} {ms:.3f} ms  {best}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", metavar="PNG")
    parser.add_argument("--gates", action="store_true")
    parser.add_argument("--tune", nargs=2, type=int, metavar=("K", "V"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("the kernels are timed on a CUDA device, and there is none")
    if arguments.tune:
        for B, T in ((32, 2048), (2, 32768)):  # many heads, and few
            tune(B, T, *arguments.tune)
    elif arguments.gates:
        for name in ("1.3B layer B8 T2048", "340M layer B32 T2048", "D64 B32 T1024"):
            gates(*SHAPES[name][:5])
    elif arguments.figure:
        figure(arguments.figure)
    else:
        table(SHAPES)
