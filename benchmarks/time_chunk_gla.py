"""Time `chunk_gla` on the GPU and on the host, and print the results as one JSON object.

    PYTHONPATH=TREE python benchmarks/time_chunk_gla.py

Only the public operator is called, so the script can time any checkout of the project: the one on PYTHONPATH. The GPU's
times are medians over replays of a CUDA graph, with a cold L2 cache, and contain no work of the host. The host's times
are those of eager calls that are queued one after another without waiting for the GPU.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from glalm.kernels import chunk_gla

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@dataclass(frozen=True)
class Shape:
    """The sizes of one call: `B` sequences of `T` tokens, `H` heads of `K` key and `V` value channels."""

    B: int
    T: int
    H: int
    K: int
    V: int

    def __str__(self) -> str:
        return f"B{self.B} T{self.T} H{self.H} K{self.K} V{self.V}"


GPU_SHAPES = {
    "1.3B layer": Shape(B=8, T=2048, H=4, K=256, V=512),
    "340M layer": Shape(B=32, T=2048, H=4, K=128, V=256),
    "64 channels": Shape(B=32, T=1024, H=32, K=64, V=64),
}
HOST_SHAPE = Shape(B=1, T=64, H=4, K=64, V=64)  # The kernels take less time than the host needs to launch them.
SMOKE_SHAPE = Shape(B=1, T=64, H=1, K=16, V=16)


def random_inputs(shape: Shape) -> list[Tensor]:
    """Draw q, k, v and the log gates g, all of which require a gradient."""
    torch.manual_seed(0)
    key_size = (shape.B, shape.T, shape.H, shape.K)
    value_size = (shape.B, shape.T, shape.H, shape.V)
    q = torch.randn(key_size, device=DEVICE, dtype=torch.bfloat16)
    k = torch.randn(key_size, device=DEVICE, dtype=torch.bfloat16)
    v = torch.randn(value_size, device=DEVICE, dtype=torch.bfloat16)
    g = F.logsigmoid(torch.randn(key_size, device=DEVICE, dtype=torch.bfloat16)) / 16
    return [x.requires_grad_() for x in (q, k, v, g)]


def forward_call(inputs: list[Tensor]) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> Tensor:
        return chunk_gla(*inputs)[0]

    return call


def training_call(inputs: list[Tensor]) -> Callable[[], object]:
    """Return a call that runs the forward and the backward pass."""
    output_gradient = torch.randn_like(inputs[2])

    def call() -> tuple[Tensor, ...]:
        output, _ = chunk_gla(*inputs)
        return torch.autograd.grad(output, inputs, output_gradient)

    return call


def gpu_milliseconds(call: Callable[[], object]) -> float:
    """Return the median time of the call's kernels. Without a GPU, return the time of one call instead."""
    call()  # Compile the kernels, which a capture forbids.
    if not CUDA:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        with torch.cuda.graph(graph, stream=stream):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    return do_bench(graph.replay, warmup=100, rep=600, return_mode="median")


def host_microseconds(call: Callable[[], object], calls: int, repeats: int) -> float:
    """Return the median, over `repeats` rounds of `calls` calls, of the host's time for one call."""
    for _ in range(calls):
        call()
    rounds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append(1e6 * (time.perf_counter() - start) / calls)
    return statistics.median(rounds)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to test the script on a CPU")
    smoke = parser.parse_args().smoke
    if not CUDA and not smoke:
        parser.error("There is no CUDA device. To test the script without one, add --smoke.")
    times = {}
    for name, shape in {"smoke": SMOKE_SHAPE}.items() if smoke else GPU_SHAPES.items():
        inputs = random_inputs(shape)
        times[f"chunk_gla {name} {shape} forward, ms"] = gpu_milliseconds(forward_call(inputs))
        times[f"chunk_gla {name} {shape} both passes, ms"] = gpu_milliseconds(training_call(inputs))
    calls, repeats = (2, 2) if smoke else (200, 25)
    inputs = random_inputs(SMOKE_SHAPE if smoke else HOST_SHAPE)
    times["chunk_gla on the host, forward, us"] = host_microseconds(forward_call(inputs), calls, repeats)
    times["chunk_gla on the host, both passes, us"] = host_microseconds(training_call(inputs), calls, repeats)
    print(json.dumps(times))


if __name__ == "__main__":
    main()
