"""How kernels are launched: tile sizes, warps and pipeline stages for each kernel, and a launcher with little overhead.

Nothing is tuned at run time. `benchmarks/bench_kernels.py --tune K V` measures candidates and prints entries for TABLE.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

# ---------------------------------------------------------------------------------------------------- configurations


class LaunchConfig(NamedTuple):
    """How one kernel is launched. The kernel's signature says what each tile size cuts."""

    tile: dict[str, int]
    warps: int
    stages: int  # of the software pipeline
    registers: int | None = None  # limit for each thread, so that more programs fit on a multiprocessor

    @property
    def options(self) -> dict[str, int | None]:
        """Return the launch options under Triton's names."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


class KernelConfigs(NamedTuple):
    """One LaunchConfig for every kernel of chunk_gla.

    The `pairwise` variants run on chunks that forget too much for the fast path. `gradients_fixed_gate` serves gates
    without a gradient: their loads take more shared memory, so they have fewer pipeline stages.
    """

    rescale: LaunchConfig
    rescale_pairwise: LaunchConfig
    scan_forward: LaunchConfig  # computes o
    scan_states: LaunchConfig  # recomputes the states alone, for the backward pass
    scan_segment_starts: LaunchConfig  # finds the states that the segments of a long sequence start from
    scan_backward: LaunchConfig  # computes dv and the gradients of the states
    gradients: LaunchConfig
    gradients_fixed_gate: LaunchConfig
    gradients_pairwise: LaunchConfig


def _rescale_config(BK: int, warps: int, stages: int, registers: int | None = None) -> LaunchConfig:
    return LaunchConfig({"BK": BK}, warps, stages, registers)


def _scan_config(
    BV: int, STORE_BANDS: int, warps: int, stages: int, registers: int | None = None, PREFETCH: bool = False
) -> LaunchConfig:
    return LaunchConfig({"BV": BV, "STORE_BANDS": STORE_BANDS, "PREFETCH": PREFETCH}, warps, stages, registers)


def _gradients_config(BK: int, BV: int, warps: int, stages: int, PREFETCH: bool = False) -> LaunchConfig:
    return LaunchConfig({"BK": BK, "BV": BV, "PREFETCH": PREFETCH}, warps, stages)


TABLE: dict[tuple[int, int, int], KernelConfigs] = {
    # (compute capability major, K, V), bfloat16 operands
    (9, 256, 512): KernelConfigs(
        rescale=_rescale_config(64, 4, 2, 168),
        rescale_pairwise=_rescale_config(64, 4, 1),
        scan_forward=_scan_config(128, 1, 8, 2),
        scan_states=_scan_config(64, 1, 4, 1, PREFETCH=True),
        scan_segment_starts=_scan_config(64, 1, 4, 2, 168),
        scan_backward=_scan_config(128, 4, 8, 2, PREFETCH=True),
        gradients=_gradients_config(64, 64, 4, 4),
        gradients_fixed_gate=_gradients_config(64, 64, 4, 3),
        gradients_pairwise=_gradients_config(64, 64, 4, 1),
    ),
    (9, 128, 256): KernelConfigs(
        rescale=_rescale_config(64, 4, 2, 168),
        rescale_pairwise=_rescale_config(64, 4, 1),
        scan_forward=_scan_config(64, 1, 4, 2),
        scan_states=_scan_config(64, 1, 4, 1, PREFETCH=True),
        scan_segment_starts=_scan_config(64, 1, 4, 2),
        scan_backward=_scan_config(256, 4, 8, 2, PREFETCH=True),
        gradients=_gradients_config(64, 64, 4, 4),
        gradients_fixed_gate=_gradients_config(64, 64, 4, 3),
        gradients_pairwise=_gradients_config(64, 64, 4, 1),
    ),
    (9, 64, 64): KernelConfigs(
        rescale=_rescale_config(64, 4, 1, 128),
        rescale_pairwise=_rescale_config(64, 4, 1),
        scan_forward=_scan_config(64, 1, 4, 1),
        scan_states=_scan_config(64, 1, 4, 2),
        scan_segment_starts=_scan_config(64, 1, 4, 3),
        # With 128 registers four programs fit on a multiprocessor; with three, 512 heads would take two turns.
        scan_backward=_scan_config(64, 1, 4, 1, 128),
        gradients=_gradients_config(64, 64, 4, 1, PREFETCH=True),
        gradients_fixed_gate=_gradients_config(64, 64, 4, 1, PREFETCH=True),
        gradients_pairwise=_gradients_config(64, 64, 4, 1),
    ),
}


def default_configs(KP: int, VP: int, bits: int) -> KernelConfigs:
    """Return configurations for head sizes that TABLE lacks: correct everywhere, fast for bfloat16 tiles of 64."""
    if bits == 16 and min(KP, VP) >= 64:
        wide_tiles = KP <= 256
        BV = 64 if wide_tiles else 32
        scan = _scan_config(BV, max(1, KP // 64) if wide_tiles else 1, 4, 2 if KP <= 128 else 1)
        return KernelConfigs(
            rescale=_rescale_config(64, 4, 2, 168) if KP > 64 else _rescale_config(64, 4, 1, 128),
            rescale_pairwise=_rescale_config(64, 4, 1),
            **_scan_configs(scan),
            **_gradients_configs(_gradients_config(64, 64, 4, 3 if VP > 64 else 1, PREFETCH=VP == 64)),
            gradients_pairwise=_gradients_config(64, 64, 4, 1),
        )
    # With tiles narrower than 64, Hopper's wgmma (tiles of 64 rows and at least four warps) reads beyond a program's
    # shared memory in Triton 3.6. These tiles or warps stay below one of the two limits.
    rescale = _rescale_config(min(KP, 32), 2, 1)
    gradients = _gradients_config(16, 16, 2, 1)
    return KernelConfigs(
        rescale=rescale,
        rescale_pairwise=rescale,
        **_scan_configs(_scan_config(max(16, min(32, VP, 8192 // KP)), 1, 4, 1)),
        **_gradients_configs(gradients),
        gradients_pairwise=gradients,
    )


def _scan_configs(scan: LaunchConfig) -> dict[str, LaunchConfig]:
    return dict.fromkeys(("scan_forward", "scan_states", "scan_segment_starts", "scan_backward"), scan)


def _gradients_configs(gradients: LaunchConfig) -> dict[str, LaunchConfig]:
    return dict.fromkeys(("gradients", "gradients_fixed_gate"), gradients)


def padded_head_size(n: int) -> int:
    """Return a head size rounded up to a power of two of at least 16, as the kernels' tiles need it."""
    return max(16, triton.next_power_of_2(n))


def config_for(device: torch.device, KP: int, VP: int, bits: int) -> KernelConfigs:
    """Return the configurations for padded head sizes KP and VP and operands of `bits` bits."""
    key = architecture(device), KP, VP
    if bits == 16 and key in TABLE:
        return TABLE[key]
    return default_configs(KP, VP, bits)


# Every call of the operator asks for these two, so they are cached.
@functools.cache
def architecture(device: torch.device) -> int:
    """Return the major compute capability: 9 for Hopper, which the interpreter on a CPU stands in for."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


# ---------------------------------------------------------------------------------------------------------- launching

# On every call Triton inspects all arguments to find the compiled kernel, which takes about 0.05 ms for as many
# arguments as these kernels have. A training step at small sizes is a dozen launches of 0.1 ms each, so `launch` caches
# compiled kernels itself.
_SCALARS = (int, float, type(None))
_compiled: dict[tuple, tuple[Any, tuple]] = {}


def launch(kernel, programs: int, args: tuple, constants: dict[str, Any], options: dict[str, int | None]) -> None:
    """Run kernel[(programs,)](*args, **constants, **options) on the current stream of the arguments' device.

    `args` are the kernel's first parameters and `constants` all that follow. A kernel must list its integer arguments
    in do_not_specialize, because the cache does not distinguish integers by value. With no programs nothing is
    launched.
    """
    if programs == 0:
        return
    if triton.knobs.runtime.interpret:
        kernel[(programs,)](*args, **constants, **options)
        return
    device = _device_of_arguments(args)
    if device != torch.cuda.current_device():  # This happens when a model is spread over several GPUs.
        with torch.cuda.device(device):
            return launch(kernel, programs, args, constants, options)
    # Triton hashes a kernel by its source, which is slow. The kernels are module-level, so their ids are stable.
    key = (id(kernel), device, *map(_specialization_key, args), *constants.values(), *options.values())
    cached = _compiled.get(key)
    if cached is not None:
        compiled, constant_values = cached
        compiled[(programs, 1, 1)](*args, *constant_values)
        return
    compiled = kernel[(programs,)](*args, **constants, **options)
    constant_names = kernel.arg_names[len(args) :]
    named_values = {**constants, **options}
    _compiled[key] = compiled, tuple(named_values[name] for name in constant_names)


def _device_of_arguments(args: tuple) -> int:
    for x in args:
        if type(x) is TensorDescriptor:
            return x.base.get_device()
        if type(x) not in _SCALARS:
            return x.get_device()
    raise TypeError("a kernel needs at least one tensor argument")


def _specialization_key(x: Any) -> Any:
    """Return the properties of an argument that its kernel was compiled for."""
    kind = type(x)  # isinstance is slow on tensors, and this runs for every argument of every launch.
    if kind is TensorDescriptor:
        return x.base.dtype, *x.block_shape
    if kind in _SCALARS:
        return kind
    return x.dtype, x.data_ptr() % 16 == 0
