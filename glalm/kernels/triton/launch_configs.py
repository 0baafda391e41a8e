"""Tile sizes, warps and pipeline stages of every kernel, by architecture and padded head sizes. No search at run time.

`benchmarks/bench_kernels.py --tune` measures candidates and prints entries for TABLE.
"""

import functools
from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """Tile sizes (what they cut is in the kernel's own signature) and whether to PREFETCH what is wanted later, warps
    and software-pipeline stages."""

    tile: dict[str, int]
    warps: int
    stages: int
    registers: int | None = None  # a thread's limit: more programs to a multiprocessor

    @property
    def options(self) -> dict[str, int | None]:
        """How to launch, as Triton takes it."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


class Config(NamedTuple):
    prepare: Launch
    prepare_exact: Launch  # the same for the chunks that need the exact path
    forward: Launch  # the scan that makes o
    states: Launch  # the scan that makes states only
    starts: Launch  # the scan that finds the states which a long sequence's segments start from
    reverse: Launch  # the scan that makes dv and the states' gradients
    gradients: Launch
    gradients_fixed: Launch  # the same where no gate has a gradient: its loads take more shared memory, so fewer stages
    gradients_exact: Launch


def _prepare(BK: int, warps: int, stages: int, registers: int | None = None) -> Launch:
    return Launch({"BK": BK}, warps, stages, registers)


def _scan(BV: int, PARTS: int, warps: int, stages: int, registers: int | None = None, PREFETCH: bool = False) -> Launch:
    return Launch({"BV": BV, "PARTS": PARTS, "PREFETCH": PREFETCH}, warps, stages, registers)


def _gradients(BK: int, BV: int, warps: int, stages: int, PREFETCH: bool = False) -> Launch:
    return Launch({"BK": BK, "BV": BV, "PREFETCH": PREFETCH}, warps, stages)


TABLE: dict[tuple[int, int, int], Config] = {
    # (compute capability major, K, V), bfloat16 operands
    (9, 256, 512): Config(
        prepare=_prepare(64, 4, 2, 168),
        prepare_exact=_prepare(64, 4, 1),
        forward=_scan(128, 1, 8, 2),
        states=_scan(64, 1, 4, 1, PREFETCH=True),
        starts=_scan(64, 1, 4, 2, 168),
        reverse=_scan(128, 4, 8, 2, PREFETCH=True),
        gradients=_gradients(64, 64, 4, 4),
        gradients_fixed=_gradients(64, 64, 4, 3),
        gradients_exact=_gradients(64, 64, 4, 1),
    ),
    (9, 128, 256): Config(
        prepare=_prepare(64, 4, 2, 168),
        prepare_exact=_prepare(64, 4, 1),
        forward=_scan(64, 1, 4, 2),
        states=_scan(64, 1, 4, 1, PREFETCH=True),
        starts=_scan(64, 1, 4, 2),
        reverse=_scan(256, 4, 8, 2, PREFETCH=True),
        gradients=_gradients(64, 64, 4, 4),
        gradients_fixed=_gradients(64, 64, 4, 3),
        gradients_exact=_gradients(64, 64, 4, 1),
    ),
    (9, 64, 64): Config(
        prepare=_prepare(64, 4, 1, 128),
        prepare_exact=_prepare(64, 4, 1),
        forward=_scan(64, 1, 4, 1),
        states=_scan(64, 1, 4, 2),
        starts=_scan(64, 1, 4, 3),
        reverse=_scan(64, 1, 4, 1, 128),  # four programs to a multiprocessor: with three, 512 heads take two turns
        gradients=_gradients(64, 64, 4, 1, PREFETCH=True),
        gradients_fixed=_gradients(64, 64, 4, 1, PREFETCH=True),
        gradients_exact=_gradients(64, 64, 4, 1),
    ),
}


def rule(KP: int, VP: int, bits: int) -> Config:
    """What is not in the table: correct everywhere, fast where bfloat16 tiles of 64 fit."""
    if bits == 16 and min(KP, VP) >= 64:
        wide = KP <= 256
        scan = _scan(64 if wide else 32, max(1, KP // 64) if wide else 1, 4, 2 if KP <= 128 else 1)
        prepare = _prepare(64, 4, 2, 168) if KP > 64 else _prepare(64, 4, 1, 128)
        gradients = _gradients(64, 64, 4, 3 if VP > 64 else 1, PREFETCH=VP == 64)
        return _alike(prepare, _prepare(64, 4, 1), scan, gradients, _gradients(64, 64, 4, 1))
    # wgmma (tiles of 64 rows and four warps or more) reads past a program's shared memory in Triton 3.6 when the
    # tiles are narrower than 64: stay below one or the other.
    scan = _scan(max(16, min(32, VP, 8192 // KP)), 1, 4, 1)
    prepare, gradients = _prepare(min(KP, 32), 2, 1), _gradients(16, 16, 2, 1)
    return _alike(prepare, prepare, scan, gradients, gradients)


def _alike(prepare: Launch, prepare_exact: Launch, scan: Launch, gradients: Launch, gradients_exact: Launch) -> Config:
    return Config(
        prepare=prepare,
        prepare_exact=prepare_exact,
        forward=scan,
        states=scan,
        starts=scan,
        reverse=scan,
        gradients=gradients,
        gradients_fixed=gradients,
        gradients_exact=gradients_exact,
    )


def config_for(device: torch.device, KP: int, VP: int, bits: int) -> Config:
    """KP, VP: head sizes rounded up to powers of two; bits: of the matmuls' operands."""
    major = architecture(device)
    if bits == 16 and (major, KP, VP) in TABLE:
        return TABLE[major, KP, VP]
    return rule(KP, VP, bits)


@functools.cache  # every call of the operator asks
def architecture(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
