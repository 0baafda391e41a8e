"""The share of a GPU's peak that training was measured to reach, for the dry run's estimate of time."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Measurement(NamedTuple):
    """A training step of a preset of configs/model in bfloat16, compiled, on one H200."""

    parameters: float  # in millions
    length: int  # tokens of a sequence
    mfu: float


GPU = r"\bH200\b"
# By `benchmarks/bench_lengths.py --mfu` on two hosts (docs/performance.md). GLA at 42M and ReGLA are of earlier calls.
MEASURED = {
    "attention": [
        Measurement(374, 2048, 0.512),
        Measurement(374, 8192, 0.592),
        Measurement(374, 32768, 0.684),
        Measurement(1364, 2048, 0.564),
        Measurement(1364, 32768, 0.675),
    ],
    "deltanet": [Measurement(374, 2048, 0.426)],
    "gated_deltanet": [
        Measurement(373, 2048, 0.397),
        Measurement(373, 32768, 0.338),
        Measurement(1359, 2048, 0.424),
    ],
    "gla": [
        Measurement(42, 2048, 0.314),
        Measurement(374, 2048, 0.434),
        Measurement(374, 32768, 0.428),
        Measurement(1366, 2048, 0.509),
        Measurement(1366, 32768, 0.507),
    ],
    "kda": [Measurement(375, 2048, 0.367), Measurement(375, 32768, 0.297)],
    "mamba": [
        Measurement(372, 2048, 0.232),
        Measurement(372, 8192, 0.178),
        Measurement(372, 32768, 0.177),
        Measurement(1374, 2048, 0.340),
    ],
    "mamba2": [Measurement(376, 2048, 0.337), Measurement(376, 32768, 0.319), Measurement(1372, 2048, 0.420)],
    "regla": [Measurement(375, 2048, 0.396)],
    "retention": [Measurement(375, 2048, 0.410), Measurement(375, 32768, 0.397), Measurement(1371, 2048, 0.494)],
}
FARTHEST = 4  # Without a measurement within this factor in size and in length, the MFU is unknown.


def expected_mfu(mixers: Sequence[str], parameters: int, length: int, gpu: str) -> float | None:
    """Return the MFU between the measurements, or None if a mixer has none that is near enough.

    Args:
        mixers: Of all layers. Each layer is taken to cost as many operations as the others.
        parameters: Of the model.
        length: Tokens of a sequence.
        gpu: The device's name.
    """
    if not re.search(GPU, gpu):
        return None
    times = []  # relative to that at the peak
    for mixer in mixers:
        measurements = MEASURED.get(mixer, [])
        if not any(is_near(each, parameters / 1e6, length) for each in measurements):
            return None
        times.append(1 / interpolate_mfu(measurements, parameters / 1e6, length))
    return len(times) / sum(times)


def is_near(measurement: Measurement, parameters: float, length: int) -> bool:
    steps = math.log(parameters / measurement.parameters), math.log(length / measurement.length)
    return max(map(abs, steps)) <= math.log(FARTHEST)


def interpolate_mfu(measurements: Sequence[Measurement], parameters: float, length: int) -> float:
    """Interpolate between the lengths measured at each size, and then between the sizes, linearly in their logarithms.

    Beyond the smallest and the largest length or size, the MFU is that at this length or size.
    """
    sizes = sorted({each.parameters for each in measurements})
    at_sizes = []
    for size in sizes:
        rows = sorted(each for each in measurements if each.parameters == size)
        lengths = [math.log(each.length) for each in rows]
        at_sizes.append(np.interp(math.log(length), lengths, [each.mfu for each in rows]))
    return float(np.interp(math.log(parameters), [math.log(size) for size in sizes], at_sizes))
