"""Time cross-entropy with the output projection, forward and backward: ours by chunk size, torch's and Liger's.

    python benchmarks/bench_loss.py                  65,536 tokens x 32,000 words x width 1,024, and 16,384 at 2,048
    python benchmarks/bench_loss.py --tiny           on a CPU, in a second

The table shows median ms, TFLOP/s of the three matmuls, and peak memory above the inputs in MiB. Hidden states are
bfloat16 and the weight is float32, under bfloat16 autocast. Libraries that are not installed are skipped.
"""

import argparse
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.kernels import cross_entropy
from glalm.model.loss import linear_cross_entropy

SHAPES = {"340M 32 x 2048": (65536, 1024, 32000), "1.3B 8 x 2048": (16384, 2048, 32000)}
TINY = {"tiny": (256, 32, 100)}
CUDA = torch.cuda.is_available()


def chunked_loss(elements: int) -> Callable[..., Tensor]:
    """Return our loss with chunks of so many logits."""

    def call(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
        cross_entropy.CHUNK_ELEMENTS = elements
        return linear_cross_entropy(hidden, weight, targets, z_loss)

    return call


def list_losses() -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """Yield name and function of every loss: (hidden, weight, targets) to a scalar."""
    for power in (25, 26, 27, 28):
        yield f"glalm, 2^{power} logits a chunk", chunked_loss(2**power)
    yield "glalm, z-loss", lambda *inputs: chunked_loss(2**27)(*inputs, 1e-4)
    yield "whole logits", lambda h, w, t: F.cross_entropy(F.linear(h, w).float(), t)
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):  # since torch 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        yield "torch", lambda h, w, t: F.linear_cross_entropy(h, w.to(h.dtype), t, options=options)
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        yield "Liger", lambda h, w, t: liger(w.to(h.dtype), h, t)
    except ImportError:
        pass


def measure(loss: Callable[..., Tensor], tokens: int, width: int, words: int) -> tuple[float, float, float]:
    """Return median ms and peak MiB above the inputs, both NaN on a CPU, and the loss in nats."""
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(words, width, device=device) * 0.02).requires_grad_()
    targets = torch.randint(words, (tokens,), device=device)

    def call() -> Tensor:
        hidden.grad = weight.grad = None
        with torch.autocast(device, torch.bfloat16):
            value = loss(hidden, weight, targets)
        value.backward()
        return value

    value = call().item()
    if not CUDA:
        return math.nan, math.nan, value
    from triton.testing import do_bench

    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return do_bench(call, warmup=50, rep=300, return_mode="median"), peak, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    shapes = TINY if parser.parse_args().tiny else SHAPES
    if not CUDA and shapes is SHAPES:
        parser.error("There is no CUDA device. Add --tiny to run on the CPU")
    for shape, (tokens, width, words) in shapes.items():
        print(f"| {shape} | ms | TFLOP/s | peak MiB | loss |\n|-|-|-|-|-|")
        for name, loss in list_losses():
            try:
                ms, peak, value = measure(loss, tokens, width, words)
            except torch.OutOfMemoryError:
                print(f"| {name} | out of memory |")
                continue
            rate = 6 * tokens * width * words / ms / 1e9
            print(f"| {name} | {ms:.2f} | {rate:.0f} | {peak:.0f} | {value:.4f} |", flush=True)
            if CUDA:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
