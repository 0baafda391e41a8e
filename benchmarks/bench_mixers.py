"""Time the operators of Mamba, Mamba-2 and the short convolution on one GPU beside PyTorch and their floors.

    python benchmarks/bench_mixers.py                       times, peaks and errors
    python benchmarks/bench_mixers.py --only scan conv      those of some operators
    python benchmarks/bench_mixers.py --kernels             the time of each GPU kernel of a forward and a backward pass
    python benchmarks/bench_mixers.py --tune                candidates for the tables of kernels/triton/launch.py
    python benchmarks/bench_mixers.py --smoke               tiny sizes in PyTorch, to test the script on a CPU

Sizes are those of one layer of a 340M preset at 32 x 2048 tokens in bfloat16. Times are medians in ms of a forward
pass, and of a forward and a backward pass. Peak is the memory above the inputs in MiB over both passes. A floor is the
time for the bytes that must be read and written, at the bandwidth of a copy that is measured first, or for the
exponentials that must be computed, at 16 a cycle and multiprocessor, whichever is longer. Errors are relative RMS
errors against float64, at a small size, beside those of other implementations on the same inputs. --tune first
compiles the candidates in parallel; "differs" is the largest relative difference of a result from that with the
table's row.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm import kernels
from glalm.kernels import reference
from glalm.kernels.triton import launch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MODULES = {name: sys.modules[f"glalm.kernels.{name}"] for name in ("selective_scan", "short_conv")}


@dataclasses.dataclass
class Case:
    """One operator at one size."""

    operator: str  # as --only names it
    name: str
    draw: Callable[[], dict[str, Tensor | None]]  # the arguments
    ours: Callable[..., Tensor]
    others: dict[str, Callable[..., Tensor]]
    bytes_forward: int
    bytes_both: int
    exponentials_forward: int = 0
    exponentials_both: int = 0
    # The arguments for one of `others` that wants them in another layout.
    draw_for: dict[str, Callable[[], dict[str, Tensor | None]]] = dataclasses.field(default_factory=dict)


# Operators --------------------------------------------------------------------------------------------------


def normal(*shape: int, dtype=torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def scan_arguments(B: int, T: int, D: int, N: int, channels_first: bool = False) -> dict[str, Tensor]:
    """Draw the arguments, [B, T, D]. With `channels_first`, for mamba_ssm, they lie in memory as [B, D, T]."""

    def draw(width: int, seed: int) -> Tensor:
        return normal(B, width, T, seed=seed).mT if channels_first else normal(B, T, width, seed=seed)

    return {
        "x": draw(D, 0),
        "dt": draw(D, 1),
        "A": -torch.arange(1, N + 1, device=DEVICE).float().expand(D, -1).contiguous(),
        "B": draw(N, 2),
        "C": draw(N, 3),
        "D": torch.ones(D, device=DEVICE),
        "z": draw(D, 4),
        "dt_bias": normal(D, dtype=torch.float32, seed=5) - 4,
    }


def scan_in_pytorch(**arguments) -> Tensor:
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "cu_seqlens")
    return MODULES["selective_scan"].scan_in_pytorch(*(arguments.get(name) for name in names))[0]


def conv_arguments(B: int, T: int, D: int, taps: int, states: bool, sequences: int) -> dict[str, Tensor | None]:
    rows = 1 if sequences else B
    bounds = torch.linspace(0, B * T, sequences + 1, device=DEVICE).long() if sequences else None
    return {
        "x": normal(rows, B * T // rows, D),
        "weight": normal(D, taps, dtype=torch.float32, seed=1) / 2,
        "bias": normal(D, dtype=torch.float32, seed=2),
        "initial_state": normal(sequences or B, taps - 1, D, seed=3) if states else None,
        "cu_seqlens": bounds,
    }


def conv_in_pytorch(**arguments) -> Tensor:
    names = ("x", "weight", "bias", "initial_state", "cu_seqlens")
    return MODULES["short_conv"].convolve_in_pytorch(*(arguments.get(name) for name in names))[0]


def ssd_arguments(B: int, T: int, H: int, G: int, N: int, P: int) -> dict[str, Tensor]:
    return {
        "x": normal(B, T, H, P),
        "dt": normal(B, T, H, seed=1),
        "A": -torch.arange(1, H + 1, device=DEVICE).float(),
        "B": normal(B, T, G, N, seed=2),
        "C": normal(B, T, G, N, seed=3),
        "D": torch.ones(H, device=DEVICE),
        "dt_bias": normal(H, dtype=torch.float32, seed=4) - 4,
    }


def ssd_as_linear_attention(x, dt, A, B, C, D, dt_bias) -> Tensor:
    """Compute chunk_ssd with copies of B and C for every head."""
    dt = F.softplus(dt.float() + dt_bias)
    k, q = (y.repeat_interleave(x.shape[2] // B.shape[2], 2) for y in (B, C))
    o, _ = kernels.chunk_simple_gla(q, k, (x * dt[..., None]).to(x.dtype), dt * A, scale=1.0)
    return (o + x * D[:, None]).to(x.dtype)


def mamba_ssm_scan() -> Callable[..., Tensor] | None:
    """Return mamba_ssm's selective scan, or None if that package is not installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None

    def call(x, dt, A, B, C, D, z, dt_bias) -> Tensor:
        tensors = (tensor.mT for tensor in (x, dt))
        return selective_scan_fn(*tensors, A, B.mT, C.mT, D, z.mT, dt_bias, True).mT

    return call


def mamba_ssm_ssd() -> Callable[..., Tensor] | None:
    """Return mamba_ssm's chunked scan of Mamba-2, or None if that package is not installed."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None

    def call(x, dt, A, B, C, D, dt_bias) -> Tensor:
        options = {"chunk_size": 256, "D": D, "dt_bias": dt_bias, "dt_softplus": True}
        return mamba_chunk_scan_combined(x, dt, A, B, C, **options)

    return call


def installed(operators: dict[str, Callable[..., Tensor] | None]) -> dict[str, Callable[..., Tensor]]:
    """Return the operators without those whose package is not installed."""
    return {name: operator for name, operator in operators.items() if operator is not None}


def cases(smoke: bool) -> Iterator[Case]:
    """Yield every operator at the sizes of a 340M model, or at tiny ones."""
    B, T = (1, 16) if smoke else (32, 2048)
    H, N, P = (2, 16, 16) if smoke else (32, 128, 64)
    values = B * T * H * P
    coefficients = B * T * N
    yield Case(
        "mamba2",
        "Mamba-2",
        lambda: ssd_arguments(B, T, H, 1, N, P),
        lambda **a: kernels.chunk_ssd(**a)[0],
        installed({"as linear attention": ssd_as_linear_attention, "mamba_ssm": mamba_ssm_ssd()}),
        bytes_forward=2 * (2 * values + 2 * coefficients),
        bytes_both=2 * (5 * values + 6 * coefficients),
    )
    D = 8 if smoke else 2048
    elements = B * T * D
    yield Case(
        "scan",
        "selective scan",
        lambda: scan_arguments(B, T, D, 16),
        lambda **a: kernels.selective_scan(**a)[0],
        installed({"mamba_ssm": mamba_ssm_scan()}),
        bytes_forward=2 * 4 * elements,
        bytes_both=2 * (4 + 7) * elements,
        exponentials_forward=16 * elements,
        exponentials_both=2 * 16 * elements,
        draw_for={"mamba_ssm": lambda: scan_arguments(B, T, D, 16, channels_first=True)},
    )
    # Compiled, the PyTorch form of packed sequences reads beyond its indices (PyTorch 2.11).
    compiled = {"compiled": torch.compile(conv_in_pytorch)} if CUDA else {}
    for label, states, sequences in (("", False, 0), (", states", True, 0), (", packed with states", True, 3 * B)):
        yield Case(
            "conv",
            f"short convolution{label}",
            functools.partial(conv_arguments, B, T, D, 4, states, sequences),
            lambda **a: kernels.short_conv(**a)[0],
            {"PyTorch": conv_in_pytorch, **({} if sequences else compiled)},
            bytes_forward=2 * 2 * elements,
            bytes_both=2 * (2 + 3) * elements,
        )


# Measurements -----------------------------------------------------------------------------------------------


def require_gradients(arguments: dict) -> dict:
    floating = {n: x.requires_grad_() for n, x in arguments.items() if x is not None and x.is_floating_point()}
    return {**arguments, **floating}


def median_ms(call: Callable[[], object], runs: int = 30) -> float:
    """Return the median time of a call, each with a cold L2 cache.

    The GPU waits before each call, so that it finds all kernels launched, as in a training step whose host is ahead.
    """
    if not CUDA:
        call()
        return 0.0
    cache = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(runs)] for _ in range(2))
    call()
    for start, end in zip(starts, ends, strict=True):
        cache.zero_()
        torch.cuda._sleep(3_000_000)  # cycles, 1.5 ms
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True))


def measure(operator: Callable[..., Tensor], arguments: dict) -> dict[str, float]:
    """Return the times in ms and the peak in MiB."""
    arguments = require_gradients(arguments)
    do = torch.randn_like(operator(**arguments).detach())

    def both() -> None:
        differentiate(operator, arguments, do)

    both()
    peak = 0.0
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.no_grad():
        forward = median_ms(lambda: operator(**arguments))
    return {"forward": forward, "both": median_ms(both), "peak": peak}


def differentiate(operator: Callable[..., Tensor], arguments: dict, do: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradients of all arguments that require them."""
    leaves = {name: x for name, x in arguments.items() if x is not None and x.requires_grad}
    y = operator(**arguments)
    grads = torch.autograd.grad(y, list(leaves.values()), do.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def print_kernels(case: Case) -> None:
    """Print the mean time of every GPU kernel of a forward and a backward pass, the longest first."""
    arguments = require_gradients(case.draw())
    do = torch.randn_like(case.ours(**arguments).detach())
    differentiate(case.ours, arguments, do)
    runs = 10
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(runs):
            differentiate(case.ours, arguments, do)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) / runs / 1e3
    print(f"{case.name}: GPU kernels of both passes, {total:.3f} ms in all", flush=True)
    for event in events[:16]:
        print(f"    {event.self_device_time_total / runs / 1e3:.3f} ms  x{event.count / runs:g}  {event.key[:90]}")


def measure_floors(case: Case) -> dict[str, float]:
    """Return the floors of the forward pass and of both passes in ms."""
    if not CUDA:
        return {"forward": 0.0, "both": 0.0}
    properties = torch.cuda.get_device_properties(0)
    kilohertz = getattr(properties, "clock_rate", 1_980_000)  # A Hopper's, where PyTorch does not tell.
    exponentials_per_ms = 16 * properties.multi_processor_count * kilohertz
    bytes_per_ms = copy_bandwidth() / 1e3
    return {
        which: max(
            getattr(case, f"bytes_{which}") / bytes_per_ms,
            getattr(case, f"exponentials_{which}") / exponentials_per_ms,
        )
        for which in ("forward", "both")
    }


def copy_bandwidth() -> float:
    """Return the bytes per second that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_ms(lambda: target.copy_(source)) / 1e3)


def relative_error(x: Tensor, expected: Tensor) -> float:
    return float((x.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def errors(operator, truth, arguments: dict) -> dict[str, float]:
    """Return the relative RMS errors of the output and of all gradients."""

    def compute(function, dtype: torch.dtype | None) -> dict[str, Tensor]:
        leaves = {n: x if x is None else x.detach().clone() for n, x in arguments.items()}
        if dtype is not None:
            leaves = {n: x.to(dtype) if x is not None and x.is_floating_point() else x for n, x in leaves.items()}
        return differentiate(function, require_gradients(leaves), normal(*arguments["x"].shape, seed=9))

    found = compute(operator, None)
    expected = compute(lambda **a: truth(**a)[0], torch.float64)
    return {name: relative_error(found[name], expected[name]) for name in expected}


def print_errors(operators: list[str]) -> None:
    """Print the errors of the operators and of other implementations at small sizes."""
    T = 16 if not CUDA else 600  # Several chunks of every implementation: mamba_ssm's have 256 tokens.
    rows = {
        "mamba2": (
            lambda **a: kernels.chunk_ssd(**a)[0],
            {"as linear attention": ssd_as_linear_attention, "mamba_ssm": mamba_ssm_ssd()},
            reference.recurrent_ssd,
            ssd_arguments(2, T, 4, 1, 128, 64),
        ),
        "scan": (
            lambda **a: kernels.selective_scan(**a)[0],
            {"PyTorch": scan_in_pytorch, "mamba_ssm": mamba_ssm_scan()},
            reference.recurrent_selective_scan,
            scan_arguments(2, T, 64, 16),
        ),
        "conv": (
            lambda **a: kernels.short_conv(**a)[0],
            {"PyTorch": conv_in_pytorch},
            reference.recurrent_short_conv,
            conv_arguments(2, T, 64, 4, True, 0),
        ),
    }
    for name in operators:
        ours, others, truth, arguments = rows[name]
        for label, operator in installed({"ours": ours, **others}).items():
            found = errors(operator, truth, arguments)
            print(f"error {name:8s} {label:19s}", " ".join(f"{n} {e:.2e}" for n, e in found.items()), flush=True)


# Candidates for the tables ----------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """An entry for a table of launch.py in which one kernel's configuration is another one."""

    operator: str
    kernel: str
    table: str
    key: int | tuple
    configs: tuple
    config: launch.LaunchConfig

    def __str__(self) -> str:
        config = self.config
        tile = " ".join(f"{name}={value}" for name, value in config.tile.items())
        return f"{tile} warps={config.warps} stages={config.stages} registers={config.registers}"


def candidates() -> Iterator[Candidate]:
    """Yield the candidates, one kernel varied at a time. The first of each kernel is the table's own entry."""
    device = torch.device(DEVICE)
    major = launch.architecture(device)

    ssd = launch.ssd_config(device, 128, 64, 16)
    rows = (
        (64, 4, 2, None), (64, 4, 1, None), (64, 4, 1, 168), (64, 4, 2, 168), (64, 4, 3, None), (64, 8, 2, None),
        (64, 8, 1, None),
    )  # fmt: skip
    for name in ("scan_forward", "scan_states", "scan_backward"):
        for config in with_own(getattr(ssd, name), (launch.LaunchConfig({"BV": BV}, *row) for BV, *row in rows)):
            yield Candidate("mamba2", name, "SSD", (major, 128, 64), ssd._replace(**{name: config}), config)
    rows = (
        (128, 8, 2, None), (128, 8, 1, None), (128, 8, 3, None), (64, 4, 2, None), (64, 4, 1, None), (64, 8, 2, None),
        (64, 8, 1, 128), (64, 4, 3, None), (128, 4, 1, None),
    )  # fmt: skip
    for config in with_own(ssd.gradients, (launch.LaunchConfig({"BK": BK, "BV": 64}, *row) for BK, *row in rows)):
        yield Candidate("mamba2", "gradients", "SSD", (major, 128, 64), ssd._replace(gradients=config), config)

    scan = launch.selective_scan_config(device, 16)
    rows = (
        (4, 2, 48, 128), (4, 4, 48, 128), (4, 2, 48, 96), (8, 2, 48, 128),
    )  # fmt: skip
    for config in with_own(scan.forward, (launch._selective_config(*row) for row in rows)):
        yield Candidate("scan", "forward", "SELECTIVE_SCAN", major, scan._replace(forward=config), config)
    rows = (
        (3, 4, 48), (3, 2, 48), (2, 4, 48), (2, 2, 48, 200),
    )  # fmt: skip
    for config in with_own(scan.backward, (launch._selective_config(*row) for row in rows)):
        forward = scan.forward._replace(tile={**scan.forward.tile, "CELL": config.tile["CELL"]})
        yield Candidate(
            "scan", "backward", "SELECTIVE_SCAN", major, launch.SelectiveScanConfigs(forward, config), config
        )

    conv = launch.conv_config(device)
    rows = {
        "forward": (
            (4, 256, 1, 8), (4, 128, 1, 8), (4, 512, 1, 8), (4, 256, 2, 8), (4, 256, 1, 4), (4, 512, 1, 4),
            (8, 256, 1, 4), (8, 512, 1, 4), (8, 512, 1, 2), (8, 256, 1, 8),
        ),
        "backward": (
            (4, 512, 1, 4, 128), (4, 256, 1, 4, 128), (4, 128, 1, 4, 128), (4, 512, 2, 4, 128), (4, 512, 1, 4),
            (4, 256, 1, 4), (8, 256, 1, 4), (8, 512, 1, 4), (4, 512, 1, 8), (4, 256, 1, 8), (8, 512, 1, 2),
            (8, 256, 1, 2), (4, 512, 1, 2), (3, 512, 1, 4, 128),
        ),
    }  # fmt: skip
    for name, configs in rows.items():
        for config in with_own(getattr(conv, name), (launch._conv_config(*row) for row in configs)):
            yield Candidate("conv", name, "SHORT_CONV", major, conv._replace(**{name: config}), config)


def with_own(own: launch.LaunchConfig, others: Iterable[launch.LaunchConfig]) -> list[launch.LaunchConfig]:
    return [own, *(config for config in others if config != own)]


def choose(candidate: Candidate) -> None:
    getattr(launch, candidate.table)[candidate.key] = candidate.configs


def run_candidate(candidate: Candidate, case: Case) -> dict[str, Tensor]:
    choose(candidate)
    arguments = require_gradients(case.draw())
    return differentiate(case.ours, arguments, normal(*arguments["x"].shape, seed=9))


def compile_candidate(candidate: Candidate) -> str | None:
    """Compile the kernels into Triton's cache by running them once. Return the error, if there is one."""
    try:
        run_candidate(candidate, case_to_tune(candidate.operator))
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return None


def case_to_tune(operator: str) -> Case:
    return next(case for case in cases(False) if case.operator == operator)


def time_candidate(candidate: Candidate, case: Case) -> float:
    """Return the time in ms of the pass that a candidate's kernel belongs to."""
    choose(candidate)
    if candidate.kernel.endswith("forward"):
        arguments = case.draw()
        with torch.no_grad():
            return median_ms(lambda: case.ours(**arguments))
    arguments = require_gradients(case.draw())
    leaves = [x for x in arguments.values() if x is not None and x.requires_grad]
    y = case.ours(**arguments)
    do = torch.randn_like(y)
    return median_ms(lambda: torch.autograd.grad(y, leaves, do, retain_graph=True))


def tune(operators: list[str]) -> None:
    """Print the time of every candidate."""
    tasks = [candidate for candidate in candidates() if candidate.operator in operators]
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        failures = list(pool.map(compile_candidate, tasks))
    groups: dict[tuple[str, str], list] = {}
    for task, failure in zip(tasks, failures, strict=True):
        groups.setdefault(task[:2], []).append((task, failure))
    for (operator, kernel), group in groups.items():
        case = case_to_tune(operator)
        own = group[0][0]
        expected = run_candidate(own, case)
        for task, failure in group:
            if failure is not None:
                print(f"tune {operator} {kernel}: failed  {task}  {failure}", flush=True)
                continue
            found = run_candidate(task, case)
            worst = max(relative_error(found[name], expected[name].double()) for name in expected)
            note = "  (table)" if task is own else ""
            time = time_candidate(task, case)
            print(f"tune {operator} {kernel}: {time:.3f} ms  {task}  differs {worst:.1e}{note}", flush=True)
        choose(own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    operators = ["mamba2", "scan", "conv"]
    parser.add_argument("--only", nargs="+", choices=operators, default=operators, help="some of the operators")
    parser.add_argument("--tune", action="store_true", help="time candidates for the tables instead")
    parser.add_argument("--kernels", action="store_true", help="time each GPU kernel instead")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to test the script on a CPU")
    parser.add_argument("--json", type=Path, help="also write the times to this file")
    options = parser.parse_args()
    if not CUDA and not options.smoke:
        parser.error("There is no CUDA device. To test the script without one, add --smoke.")
    chosen = [case for case in cases(options.smoke) if case.operator in options.only]
    if options.tune:
        tune(options.only)
    elif options.kernels:
        for case in chosen:
            print_kernels(case)
    else:
        record = {case.name: print_times(case) for case in chosen}
        print_errors(options.only)
        if options.json:
            options.json.write_text(json.dumps(record, indent=1))


def print_times(case: Case) -> dict[str, dict[str, float]]:
    """Print and return the floor of an operator and the times of its implementations."""
    rows = {"floor": measure_floors(case)}
    for label, operator in {"ours": case.ours, **case.others}.items():
        try:
            rows[label] = measure(operator, case.draw_for.get(label, case.draw)())
        except Exception as error:
            print(f"{case.name}, {label}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    for label, times in rows.items():
        print(f"{case.name:40s} {label:20s}", " ".join(f"{n} {x:.3f}" for n, x in times.items()), flush=True)
    return rows


if __name__ == "__main__":
    main()
