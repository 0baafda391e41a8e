"""Time the delta rule's kernels on one GPU: the operator, and each kernel under candidate launch configurations.

    python benchmarks/bench_delta.py                     errors, times and peak memory of the operator
    python benchmarks/bench_delta.py --kernels           every kernel, beside its floor by bytes
    python benchmarks/bench_delta.py --tune              every kernel with every candidate, beside its floor by bytes
    python benchmarks/bench_delta.py --only gated kda    some of the rows

Times are medians in ms with a cold L2 cache. Floors are the bytes that must move, each tensor once, at BANDWIDTH.
Errors are RMS(x - ref) / RMS(ref) against the chunkwise form in float64; "bf16" is the same formula in PyTorch with
every matmul's operands rounded to bfloat16 and summed in float32, the yardstick where no other library's kernel runs.
Peak is the memory above the inputs over one forward and backward pass. --tune first compiles the candidates in
parallel.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from glalm.kernels import chunk_delta_rule
from glalm.kernels.triton import delta
from glalm.kernels.triton.delta import LaunchPlan, SavedForBackward, saved_shapes
from glalm.kernels.triton.launch import LaunchConfig, launch

BANDWIDTH = 4.2e12  # bytes per second of an H200, as measured by a copy
DEVICE = "cuda"
SHAPES = {  # B, T, H, K, V and the gates: none, one per head, or one per key channel
    "delta": (32, 2048, 8, 128, 128, "none"),
    "gated": (32, 2048, 6, 128, 256, "head"),
    "kda": (32, 2048, 6, 128, 256, "channel"),
    "kda_340m": (32, 2048, 8, 128, 128, "channel"),
}
STAGES = ("prepare", "scan_forward", "scan_states", "scan_backward", "gradients")


# The operator -----------------------------------------------------------------------------------------------


def draw_inputs(shape: tuple, B: int | None = None, T: int | None = None) -> list[Tensor | None]:
    """Return q, k, v, beta and g for a row of SHAPES, perhaps with another batch or length."""
    rows, tokens, H, K, V, gates = shape
    rows = B or rows
    tokens = T or tokens
    random = torch.Generator(DEVICE).manual_seed(1)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=DEVICE, generator=random)

    q, k = (F.normalize(draw(rows, tokens, H, K), dim=-1).bfloat16() for _ in range(2))
    v = draw(rows, tokens, H, V).bfloat16()
    beta = draw(rows, tokens, H).sigmoid().bfloat16()
    size = {"none": None, "head": (rows, tokens, H), "channel": (rows, tokens, H, K)}[gates]
    g = None if size is None else F.logsigmoid(draw(*size) + 4)
    return [q, k, v, beta, g]


def differentiate(operator: Callable, inputs: list, do: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return o and the gradients of the inputs, computed in `dtype`."""
    leaves = [x if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    o = operator(*leaves)
    return [o, *torch.autograd.grad(o, [x for x in leaves if x is not None], do.to(dtype))]


class RoundedMatmul(torch.autograd.Function):
    """a @ b with operands rounded to bfloat16 and sums in float32, forward and backward."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return rounded(a) @ rounded(b)

    @staticmethod
    def backward(ctx, d):
        a, b = ctx.saved_tensors
        da = rounded(d) @ rounded(b).mT
        db = rounded(a).mT @ rounded(d)
        return da.sum_to_size(a.shape), db.sum_to_size(b.shape)


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def delta_rule_in_bfloat16(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, C: int = 64
) -> Tensor:
    """Compute the chunkwise form of glalm.kernels.delta with rounded matmuls. Gates per channel must be slow."""
    matmul = RoundedMatmul.apply
    B, T, H, K = q.shape
    g = beta.new_zeros(B, T, H, 1) if g is None else g.view(B, T, H, -1)
    q, k, v, beta, g = (x.unflatten(1, (T // C, C)).permute(1, 0, 3, 2, 4) for x in (q, k, v, beta[..., None], g))
    S = q.new_zeros(B, H, K, v.shape[-1])
    outputs = []
    for q_n, k_n, v_n, beta_n, g_n in zip(q, k, v, beta, g, strict=True):
        sums = g_n.cumsum(-2)
        half = sums[..., -1:, :] / 2
        reads = k_n * (sums - half).exp()
        writes = k_n * (half - sums).exp()
        queries = q_n * (sums - half).exp() * K**-0.5
        system = torch.eye(C, device=q.device) + (matmul(reads, writes.mT) * beta_n).tril(-1)
        inverse = torch.linalg.solve_triangular(system, torch.eye(C, device=q.device).expand_as(system), upper=False)
        S = S * half.mT.exp()
        u = matmul(inverse * beta_n.mT, v_n - matmul(reads, S))
        outputs.append(matmul(queries, S) + matmul(matmul(queries, writes.mT).tril(), u))
        S = (S + matmul(writes.mT, u)) * half.mT.exp()
    return torch.stack(outputs, 1).permute(0, 1, 3, 2, 4).flatten(1, 2)


def print_errors(shape: tuple) -> None:
    """Compare the kernels and the rounded formula with float64, on a part of the batch."""
    inputs = draw_inputs(shape, B=1, T=1024)
    do = torch.randn_like(inputs[2])
    exact = differentiate(lambda *x: chunk_delta_rule(*x)[0], inputs, do, torch.float64)
    leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
    o = chunk_delta_rule(*leaves)[0]
    ours = [o, *torch.autograd.grad(o, [x for x in leaves if x is not None], do)]
    yardstick = differentiate(delta_rule_in_bfloat16, inputs, do, torch.float32)
    names = ("o", "dq", "dk", "dv", "dbeta", "dg")
    for name, ref, a, b in zip(names, exact, ours, yardstick, strict=False):
        b = b.to(a.dtype)  # The kernels' results are rounded, too.
        print(f"    {name:6s} ours {relative_error(a, ref):.2e}  bf16 {relative_error(b, ref):.2e}")


def relative_error(x: Tensor, expected: Tensor) -> float:
    return float((x.double() - expected).norm() / expected.norm())


def print_times(shape: tuple) -> None:
    """Print the time and the peak memory of the operator, with and without normalization inside."""
    inputs = [x if x is None else x.requires_grad_() for x in draw_inputs(shape)]
    leaves = [x for x in inputs if x is not None]
    do = torch.randn_like(inputs[2])
    size = sum(x.nbytes for x in leaves) + do.nbytes
    least = (size + do.nbytes + size + sum(x.nbytes for x in leaves)) / BANDWIDTH * 1e3
    for normalize in (False, True):
        forward = lambda n=normalize: chunk_delta_rule(*inputs, normalize=n)[0]  # noqa: E731

        def both(forward=forward):
            torch.autograd.grad(forward(), leaves, do)

        both()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        times = [do_bench(call, warmup=20, rep=100, return_mode="median") for call in (forward, both)]
        print(
            f"    normalize {normalize!s:5s}  forward {times[0]:.3f}  both {times[1]:.3f} ms  "
            f"floor {least:.3f}  peak {peak:.0f} MiB"
        )


# The kernels ------------------------------------------------------------------------------------------------


def candidates(stage: str, K: int, V: int, gates: str) -> list[LaunchConfig]:
    """Return the configurations to compare for a kernel at 16-bit head sizes of 128 by 128 or 256.

    They are those that compile for Hopper without spilled registers and of which no other leaves more programs on a
    multiprocessor for the same work.
    """
    if stage == "prepare":
        options = [(64, 4, 2, 168), (64, 4, 2, None), (64, 4, 1, 168), (64, 4, 1, 128), (128, 4, 1, 168)]
        if gates == "channel":
            options = [(64, 4, 1, None), (64, 4, 2, None), (64, 4, 1, 168), (64, 8, 2, None), (128, 8, 1, None)]
        return [LaunchConfig({"BK": BK}, *rest) for BK, *rest in options if BK <= K]
    if stage == "gradients":
        options = [(64, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 4, 1)]
        return [LaunchConfig({"BK": BK, "BV": BV}, *rest) for BK, BV, *rest in options if BK <= K]
    options = [(64, 4, 2), (64, 4, 3), (128, 8, 2), (128, 8, 3), (128, 8, 4), (256, 8, 2)]
    return [LaunchConfig({"BV": BV}, *rest) for BV, *rest in options if BV <= V]


class StageRunner:
    """The kernels of one shape, to be run one at a time on the results of those before, or on zeros."""

    def __init__(self, shape: tuple, normalize: bool, zeros: bool = False):
        q, k, v, beta, g = draw_inputs(shape, 1, 128) if zeros else draw_inputs(shape)
        self.plan = LaunchPlan(q, k, v, beta, g, shape[3] ** -0.5, normalize, None)
        self.do = torch.randn_like(v)
        shapes = saved_shapes(q, g, normalize, None)
        self.saved = SavedForBackward(*(torch.zeros(*size, device=DEVICE, dtype=dtype) for size, dtype in shapes))
        self.updates, self.dv, self.out = (torch.empty_like(v) for _ in range(3))
        self.states = self.plan.allocate_chunk_states()
        self.dstates = self.plan.allocate_chunk_states()
        if not zeros:
            self.saved = self.plan.prepare()
            self.run("scan_states", self.plan.config.scan_states)
            self.run("scan_backward", self.plan.config.scan_backward)

    def field(self, stage: str) -> str:
        """Return the name of a kernel's configuration."""
        return "gradients_normalized" if stage == "gradients" and self.plan.normalize else stage

    def today(self, stage: str) -> LaunchConfig:
        return getattr(self.plan.config, self.field(stage))

    def run(self, stage: str, config: LaunchConfig) -> list[Tensor]:
        """Run a kernel with a configuration, and return some of what it writes."""
        plan = self.plan
        plan.config = plan.config._replace(**{self.field(stage): config})
        if stage == "prepare":
            return [*plan.prepare()[:2]]
        if stage == "scan_forward":
            plan.scan(config, self.saved, None, None, out=self.out)
            return [self.out]
        if stage == "scan_states":
            plan.scan(config, self.saved, None, None, updates=self.updates, states=self.states)
            return [self.updates, self.states]
        if stage == "scan_backward":
            plan.scan_back(self.saved, self.do, self.dv, self.dstates, None, None)
            return [self.dv, self.dstates]
        grads = plan.compute_gradients(self.saved, self.do, self.updates, self.dv, self.states, self.dstates)
        return [x for x in grads if x is not None]

    def floor(self, stage: str) -> float:
        """Return the time in ms to move a kernel's bytes once."""
        plan, saved = self.plan, self.saved
        size = sum(x.nbytes for x in saved)
        keys = saved.hats.nbytes if saved.hats.numel() else plan.q.nbytes + plan.k.nbytes
        gates = 0 if plan.g is None else plan.g.nbytes
        raw = plan.q.nbytes + plan.k.nbytes + gates
        squares = saved.resolvent.nbytes + saved.scores.nbytes
        count = {
            "prepare": raw + size,
            "scan_forward": keys + squares + 2 * plan.v.nbytes,
            "scan_states": keys * 2 / (3 if saved.hats.numel() else 4) + squares / 2 + 2 * plan.v.nbytes
            + self.states.nbytes,
            "scan_backward": keys + squares + 2 * plan.v.nbytes + self.states.nbytes,
            "gradients": 2 * raw + 3 * plan.v.nbytes + 2 * self.states.nbytes,
        }  # fmt: skip
        return count[stage] / BANDWIDTH * 1e3


def time_kernels(shape: tuple, normalize: bool) -> None:
    """Print the time of every launch of both passes beside its floor."""
    calls = []
    with record_launches(calls):
        runner = StageRunner(shape, normalize)
        stages = []
        for stage in STAGES:
            del calls[:]
            runner.run(stage, runner.today(stage))
            stages += [(stage, call) for call in calls]
    total = 0.0
    for stage, call in stages:
        marked = call[3].get("MARKED", False)
        time = do_bench(lambda c=call: launch(*c), warmup=10, rep=50, return_mode="median")
        total += time
        floor = 0.0 if marked else runner.floor(stage)
        name = stage + (" (marked)" if marked else "")
        print(f"    {name:20s} {time:.3f} ms  floor {floor:.3f}  {describe(runner.today(stage))}")
    print(f"    {'sum':20s} {total:.3f} ms", flush=True)


@contextmanager
def record_launches(calls: list[tuple]) -> Iterator[None]:
    """Append the arguments of every launch to `calls`."""

    def record(*call) -> None:
        calls.append(call)
        launch(*call)

    with patch.object(delta, "launch", record):
        yield


def launch_unmarked(kernel, programs: int, args: tuple, constants: dict, options: dict) -> None:
    """Launch a kernel, but not the variant for marked chunks, which is slow to compile and normally does nothing."""
    if not constants.get("MARKED"):
        launch(kernel, programs, args, constants, options)


def compile_candidate(shape: tuple, normalize: bool, stage: str, config: LaunchConfig) -> str | None:
    """Compile one kernel into Triton's cache by running it on zeros. Return the error, if there is one."""
    try:
        with patch.object(delta, "launch", launch_unmarked):
            StageRunner(shape, normalize, zeros=True).run(stage, config)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


def tune(shape: tuple, normalize: bool, stages: Iterable[str]) -> None:
    """Print the time of every kernel with today's configuration and with every candidate, the fastest first."""
    runner = StageRunner(shape, normalize, zeros=True)
    tasks = {stage: [runner.today(stage), *candidates(stage, *shape[3:])] for stage in stages}
    tasks = {stage: list({describe(config): config for config in configs}.values()) for stage, configs in tasks.items()}
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        runs = {
            (stage, describe(config)): pool.submit(compile_candidate, shape, normalize, stage, config)
            for stage, configs in tasks.items()
            for config in configs
        }
        errors = {task: run.result() for task, run in runs.items()}
    runner = StageRunner(shape, normalize)
    with patch.object(delta, "launch", launch_unmarked):
        for stage, configs in tasks.items():
            time_candidates(runner, stage, configs, errors)


def time_candidates(runner: StageRunner, stage: str, configs: list[LaunchConfig], errors: dict) -> None:
    """Print the time of one kernel with several configurations, of which the first is today's."""
    expected = [x.float().clone() for x in runner.run(stage, configs[0])]
    rows = []
    for config in configs:
        error = errors[stage, describe(config)]
        if error is not None:
            rows.append((math.inf, f"{describe(config)}  failed: {error}"))
            continue
        found = runner.run(stage, config)
        worst = max(relative_error(x, y.double()) for x, y in zip(found, expected, strict=True))
        time = do_bench(lambda c=config: runner.run(stage, c), warmup=5, rep=30, return_mode="median")
        today = "  today" if config is configs[0] else ""
        rows.append((time, f"{describe(config)}  differs {worst:.1e}{today}"))
    runner.run(stage, configs[0])
    for time, text in sorted(rows):
        print(f"    {stage:13s} {time:.3f} ms  floor {runner.floor(stage):.3f}  {text}", flush=True)


def describe(config: LaunchConfig) -> str:
    tile = " ".join(f"{name}={value}" for name, value in config.tile.items())
    return f"{tile} warps={config.warps} stages={config.stages} registers={config.registers}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=["delta", "gated", "kda"])
    parser.add_argument("--kernels", action="store_true", help="time every kernel of both passes")
    parser.add_argument("--tune", action="store_true", help="time every kernel with every candidate configuration")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="with --tune: these kernels only")
    parser.add_argument("--normalize", action="store_true", help="with the above: the kernels normalize q and k")
    options = parser.parse_args()
    for name in options.only:
        print(name, SHAPES[name], flush=True)
        if options.kernels:
            time_kernels(SHAPES[name], options.normalize)
        if options.tune:
            tune(SHAPES[name], options.normalize, options.stages)
        if not options.kernels and not options.tune:
            print_errors(SHAPES[name])
            print_times(SHAPES[name])


if __name__ == "__main__":
    main()
