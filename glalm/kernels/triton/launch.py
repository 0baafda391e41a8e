"""How kernels are launched: tile sizes, warps and pipeline stages for each kernel, and a launcher with little overhead.

Nothing is tuned at run time. `benchmarks/bench_kernels.py --tune K V` measures candidates and prints entries for GLA.
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


class GLAConfigs(NamedTuple):
    """One LaunchConfig for every kernel of chunk_gla.

    The `pairwise` variants run on chunks that forget too much for the fast path. `gradients_fixed_gate` serves calls
    without a gradient of the gate: a fixed gate, or none.
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


GLA: dict[tuple[int, int, int], GLAConfigs] = {
    # (compute capability major, K, V), bfloat16 operands
    (9, 256, 512): GLAConfigs(
        rescale=LaunchConfig({"BK": 64}, warps=4, stages=2, registers=168),
        rescale_pairwise=LaunchConfig({"BK": 64}, warps=4, stages=1),
        scan_forward=LaunchConfig({"BV": 128, "STORE_BANDS": 1, "PREFETCH": False}, warps=8, stages=2),
        scan_states=LaunchConfig({"BV": 64, "STORE_BANDS": 1, "PREFETCH": True}, warps=4, stages=1),
        scan_segment_starts=LaunchConfig(
            {"BV": 64, "STORE_BANDS": 1, "PREFETCH": False}, warps=4, stages=2, registers=168
        ),
        scan_backward=LaunchConfig({"BV": 128, "STORE_BANDS": 4, "PREFETCH": True}, warps=8, stages=2),
        gradients=LaunchConfig({"BK": 64, "BV": 64, "PREFETCH": False}, warps=4, stages=4),
        gradients_fixed_gate=LaunchConfig({"BK": 64, "BV": 64, "PREFETCH": False}, warps=4, stages=3),
        gradients_pairwise=LaunchConfig({"BK": 64, "BV": 64, "PREFETCH": False}, warps=4, stages=1),
    ),
    (9, 128, 256): GLAConfigs(
        rescale=LaunchConfig({"BK": 64}, warps=4, stages=2, registers=168),
        rescale_pairwise=LaunchConfig({"BK": 64}, warps=4, stages=1),
        scan_forward=LaunchConfig({"BV": 64, "STORE_BANDS": 1, "PREFETCH": False}, warps=4, stages=2),
        scan_states=LaunchConfig({"BV": 64, "STORE_BANDS": 1, "PREFETCH": True}, warps=4, stages=1),
        scan_segment_starts=LaunchConfig({"BV": 64, "STORE_BANDS": 1, "PREFETCH": False}, warps=4, stages=2),
        scan_backward=LaunchConfig({"BV": 256, "STORE_BANDS": 4, "PREFETCH": True}, warps=8, stages=2),
        gradients=LaunchConfig({"BK": 64, "BV": 64, "PREFETCH": False}, warps=4, stages=4),
        gradients_fixed_gate=LaunchConfig({"BK": 64, "BV": 64, "PREFETCH": False}, warps=4, stages=3),
        gradients_pairwise=LaunchConfig({"BK": 64, "BV": 64, "PREFETCH": False}, warps=4, stages=1),
    ),
    (9, 64, 64): GLAConfigs(
        rescale=LaunchConfig({"BK": 64}, warps=4, stages=1, registers=128),
        rescale_pairwise=LaunchConfig({"BK": 64}, warps=4, stages=1),
        scan_forward=LaunchConfig({"BV": 64, "STORE_BANDS": 1, "PREFETCH": False}, warps=4, stages=1),
        scan_states=LaunchConfig({"BV": 64, "STORE_BANDS": 1, "PREFETCH": False}, warps=4, stages=2),
        scan_segment_starts=LaunchConfig({"BV": 64, "STORE_BANDS": 1, "PREFETCH": False}, warps=4, stages=3),
        # With 128 registers four programs fit on a multiprocessor; with three, 512 heads would take two turns.
        scan_backward=LaunchConfig({"BV": 64, "STORE_BANDS": 1, "PREFETCH": False}, warps=4, stages=1, registers=128),
        gradients=LaunchConfig({"BK": 64, "BV": 64, "PREFETCH": True}, warps=4, stages=1),
        gradients_fixed_gate=LaunchConfig({"BK": 64, "BV": 64, "PREFETCH": True}, warps=4, stages=1),
        gradients_pairwise=LaunchConfig({"BK": 64, "BV": 64, "PREFETCH": False}, warps=4, stages=1),
    ),
}


def gla_config(device: torch.device, KP: int, VP: int, bits: int) -> GLAConfigs:
    """Return the configurations for padded head sizes KP and VP and operands of `bits` bits.

    Those for cards and head sizes that GLA lacks are correct everywhere. They are not tuned, but fast for bfloat16
    tiles of 64.
    """
    key = architecture(device), KP, VP
    if bits == 16 and key in GLA:
        return GLA[key]
    if bits == 16 and min(KP, VP) >= 64:
        rescale = LaunchConfig({"BK": 64}, warps=4, stages=2, registers=168)
        if KP == 64:
            rescale = LaunchConfig({"BK": 64}, warps=4, stages=1, registers=128)
        rescale_pairwise = LaunchConfig({"BK": 64}, warps=4, stages=1)
        wide_tiles = KP <= 256
        scan_tile = {"BV": 64 if wide_tiles else 32, "STORE_BANDS": KP // 64 if wide_tiles else 1, "PREFETCH": False}
        scan = LaunchConfig(scan_tile, warps=4, stages=2 if KP <= 128 else 1)
        gradients_tile = {"BK": 64, "BV": 64, "PREFETCH": VP == 64}
        gradients = LaunchConfig(gradients_tile, warps=4, stages=3 if VP > 64 else 1)
        gradients_pairwise = LaunchConfig({"BK": 64, "BV": 64, "PREFETCH": False}, warps=4, stages=1)
    else:
        # With tiles narrower than 64, Hopper's wgmma (tiles of 64 rows and at least four warps) reads beyond a
        # program's shared memory in Triton 3.6. These tiles or warps stay below one of the two limits.
        rescale = rescale_pairwise = LaunchConfig({"BK": min(KP, 32)}, warps=2, stages=1)
        scan_tile = {"BV": max(16, min(32, VP, 8192 // KP)), "STORE_BANDS": 1, "PREFETCH": False}
        scan = LaunchConfig(scan_tile, warps=4, stages=1)
        gradients = gradients_pairwise = LaunchConfig({"BK": 16, "BV": 16, "PREFETCH": False}, warps=2, stages=1)
    return GLAConfigs(
        rescale=rescale,
        rescale_pairwise=rescale_pairwise,
        scan_forward=scan,
        scan_states=scan,
        scan_segment_starts=scan,
        scan_backward=scan,
        gradients=gradients,
        gradients_fixed_gate=gradients,
        gradients_pairwise=gradients_pairwise,
    )


class DeltaConfigs(NamedTuple):
    """One LaunchConfig for every kernel of the delta rule."""

    prepare: LaunchConfig
    scan_forward: LaunchConfig  # computes o
    scan_states: LaunchConfig  # recomputes the states and updates, for the backward pass
    scan_backward: LaunchConfig  # computes dv and the gradients of the states
    gradients: LaunchConfig
    gradients_normalized: LaunchConfig  # with normalization; with a gate per channel, BK is K


DELTA: dict[tuple[int, int, int, bool], DeltaConfigs] = {
    # (compute capability major, K, V, whether there is a gate per channel), bfloat16 operands
    (9, 128, 128, False): DeltaConfigs(
        prepare=LaunchConfig({"BK": 64}, warps=4, stages=2, registers=168),
        scan_forward=LaunchConfig({"BV": 64}, warps=4, stages=2),
        scan_states=LaunchConfig({"BV": 64}, warps=4, stages=2),
        scan_backward=LaunchConfig({"BV": 128}, warps=8, stages=3),
        gradients=LaunchConfig({"BK": 64, "BV": 64}, warps=4, stages=2),
        gradients_normalized=LaunchConfig({"BK": 64, "BV": 64}, warps=4, stages=2),
    ),
    (9, 128, 256, False): DeltaConfigs(
        prepare=LaunchConfig({"BK": 64}, warps=4, stages=2, registers=168),
        scan_forward=LaunchConfig({"BV": 64}, warps=4, stages=2),
        scan_states=LaunchConfig({"BV": 128}, warps=8, stages=3),
        scan_backward=LaunchConfig({"BV": 64}, warps=4, stages=2),
        gradients=LaunchConfig({"BK": 64, "BV": 64}, warps=4, stages=2),
        gradients_normalized=LaunchConfig({"BK": 64, "BV": 64}, warps=4, stages=2),
    ),
    (9, 128, 128, True): DeltaConfigs(
        prepare=LaunchConfig({"BK": 64}, warps=4, stages=2),
        scan_forward=LaunchConfig({"BV": 128}, warps=8, stages=3),
        scan_states=LaunchConfig({"BV": 128}, warps=8, stages=3),
        scan_backward=LaunchConfig({"BV": 128}, warps=8, stages=2),
        gradients=LaunchConfig({"BK": 64, "BV": 64}, warps=4, stages=3),
        gradients_normalized=LaunchConfig({"BK": 128, "BV": 64}, warps=8, stages=3),
    ),
    (9, 128, 256, True): DeltaConfigs(
        prepare=LaunchConfig({"BK": 64}, warps=4, stages=2),
        scan_forward=LaunchConfig({"BV": 128}, warps=8, stages=3),
        scan_states=LaunchConfig({"BV": 128}, warps=8, stages=3),
        scan_backward=LaunchConfig({"BV": 128}, warps=8, stages=2),
        gradients=LaunchConfig({"BK": 64, "BV": 64}, warps=4, stages=3),
        gradients_normalized=LaunchConfig({"BK": 128, "BV": 64}, warps=8, stages=3),
    ),
}


def delta_config(device: torch.device, KP: int, VP: int, bits: int, per_channel: bool) -> DeltaConfigs:
    """Return the delta rule's configurations for padded head sizes KP and VP and operands of `bits` bits.

    Those for cards and head sizes that DELTA lacks are correct everywhere, and not tuned.
    """
    key = architecture(device), KP, VP, per_channel
    if bits == 16 and key in DELTA:
        return DELTA[key]
    if bits == 16:  # Every tile is at least 64 wide.
        prepare = LaunchConfig({"BK": 64}, warps=4, stages=1)
        scan = LaunchConfig({"BV": 64}, warps=8 if KP > 128 else 4, stages=1)
        gradients_tile = {"BK": min(KP, 128) if per_channel else 64, "BV": 64}
        gradients = LaunchConfig(gradients_tile, warps=8 if KP > 64 else 4, stages=1)
    else:
        # Tiles of 64 rows and at least four warps would be Hopper's wgmma, of which Triton 3.6 compiles narrow tiles
        # and float32 operands wrongly. These stay below one of the two limits.
        prepare = LaunchConfig({"BK": min(KP, 32)}, warps=2, stages=1)
        scan = LaunchConfig({"BV": max(16, min(32, VP, 4096 // KP))}, warps=4, stages=1)
        gradients = LaunchConfig({"BK": 16, "BV": 16}, warps=2, stages=1)
    return DeltaConfigs(
        prepare,
        scan_forward=scan,
        scan_states=scan,
        scan_backward=scan,
        gradients=gradients,
        gradients_normalized=gradients,
    )


class SelectiveScanConfigs(NamedTuple):
    """The LaunchConfigs of selective_scan's kernels, which must agree on CELL."""

    forward: LaunchConfig
    backward: LaunchConfig


def _selective_config(ROWS: int, warps: int, CELL: int, registers: int | None = None) -> LaunchConfig:
    """Return a configuration in which each thread owns a channel."""
    return LaunchConfig({"ROWS": ROWS, "BD": 32 * warps, "CELL": CELL}, warps, 1, registers)


_DEFAULT_SELECTIVE_SCAN = SelectiveScanConfigs(_selective_config(4, 2, 48), _selective_config(3, 4, 48))
_WIDE_SELECTIVE_SCAN = SelectiveScanConfigs(_selective_config(2, 2, 48), _selective_config(1, 4, 48, 255))
SELECTIVE_SCAN: dict[int, SelectiveScanConfigs] = {
    # compute capability major, states of at most 16 numbers
    9: _DEFAULT_SELECTIVE_SCAN._replace(forward=_selective_config(4, 2, 48, 128)),
}


def selective_scan_config(device: torch.device, N: int) -> SelectiveScanConfigs:
    """Return the configurations of selective_scan's kernels for states of N numbers."""
    if N > 16:  # A thread's states of several tokens would not fit in its registers.
        return _WIDE_SELECTIVE_SCAN
    return SELECTIVE_SCAN.get(architecture(device), _DEFAULT_SELECTIVE_SCAN)


class ConvConfigs(NamedTuple):
    """The LaunchConfigs of short_conv's kernels."""

    forward: LaunchConfig
    backward: LaunchConfig


def _conv_config(ROWS: int, C: int, warps: int, channels: int, registers: int | None = None) -> LaunchConfig:
    """Return a configuration in which each thread owns `channels` channels."""
    return LaunchConfig({"ROWS": ROWS, "C": C, "BD": 32 * warps * channels}, warps, 1, registers)


SHORT_CONV: dict[int, ConvConfigs] = {
    # compute capability major
    9: ConvConfigs(_conv_config(8, 256, 1, 4), _conv_config(4, 512, 1, 4, 128)),
}
_DEFAULT_SHORT_CONV = ConvConfigs(_conv_config(4, 256, 1, 4), _conv_config(4, 256, 1, 4))


def conv_config(device: torch.device) -> ConvConfigs:
    """Return the configurations of short_conv's kernels."""
    return SHORT_CONV.get(architecture(device), _DEFAULT_SHORT_CONV)


class SSDConfigs(NamedTuple):
    """The chunk length in tokens, and one LaunchConfig for every kernel of chunk_ssd."""

    chunk: int
    scan_forward: LaunchConfig
    scan_states: LaunchConfig  # recomputes the states alone, and finds those that segments start from
    scan_backward: LaunchConfig
    gradients: LaunchConfig


SSD: dict[tuple[int, int, int], SSDConfigs] = {
    # (compute capability major, K, V), bfloat16 operands
    (9, 128, 64): SSDConfigs(
        chunk=64,
        scan_forward=LaunchConfig({"BV": 64}, warps=4, stages=2),
        scan_states=LaunchConfig({"BV": 64}, warps=4, stages=2, registers=128),
        scan_backward=LaunchConfig({"BV": 64}, warps=4, stages=2),
        gradients=LaunchConfig({"BK": 64, "BV": 64}, 4, 3),
    ),
}


def ssd_config(device: torch.device, KP: int, VP: int, bits: int) -> SSDConfigs:
    """Return the configurations for padded head sizes KP and VP and operands of `bits` bits."""
    key = architecture(device), KP, VP
    if bits == 16 and key in SSD:
        return SSD[key]
    if bits == 16 and min(KP, VP) >= 64:
        scan = LaunchConfig({"BV": 64 if KP <= 128 else 32}, warps=4, stages=1)
        gradients = LaunchConfig({"BK": 64, "BV": 64}, 4, 1)
        return SSDConfigs(64, scan_forward=scan, scan_states=scan, scan_backward=scan, gradients=gradients)
    # As in gla_config, narrow tiles and float32 operands must not be wgmma's: no tile has 64 rows.
    scan = LaunchConfig({"BV": max(16, min(32, VP, 2048 // KP))}, warps=4, stages=1)
    gradients = LaunchConfig({"BK": 16, "BV": 16}, 4, 1)
    return SSDConfigs(32, scan_forward=scan, scan_states=scan, scan_backward=scan, gradients=gradients)


def padded_head_size(n: int) -> int:
    """Return a head size rounded up to a power of two of at least 16, as the kernels' tiles need it."""
    return max(16, triton.next_power_of_2(n))


# Every call of an operator asks for these two, and each takes microseconds, so they are cached.
@functools.cache
def architecture(device: torch.device) -> int:
    """Return the major compute capability, 9 for Hopper; also 9 on a CPU, where the interpreter runs the kernels."""
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
