"""The share of a GPU's peak that training was measured to reach, for the dry run's estimate of time."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple


class Measurement(NamedTuple):
    """A training step of a preset of configs/model in bfloat16, compiled, on one H200."""

    parameters: float  # in millions
    length: int  # tokens of a sequence
    mfu: float


GPU = r"\bH200\b"
# By `benchmarks/bench_lengths.py --mfu`, and from the tables of docs/mixers.md and docs/performance.md.
MEASURED = {
    "attention": [Measurement(374, 2048, 0.466)],
    "deltanet": [Measurement(374, 2048, 0.430)],
    "gated_deltanet": [Measurement(373, 2048, 0.400)],
    "gla": [
        Measurement(42, 2048, 0.314),
        Measurement(374, 2048, 0.444),
        Measurement(374, 32768, 0.439),
        Measurement(1366, 2048, 0.490),
    ],
    "kda": [Measurement(375, 2048, 0.370)],
    "mamba": [Measurement(375, 2048, 0.230)],
    "mamba2": [Measurement(376, 2048, 0.337)],
    "regla": [Measurement(375, 2048, 0.396)],
    "retention": [Measurement(375, 2048, 0.423)],
}
FARTHEST = 4  # A measurement says nothing of a size or length that differs by more than this factor.


def expected_mfu(mixers: Sequence[str], parameters: int, length: int, gpu: str) -> float | None:
    """Return the MFU of the nearest measurements, or None if there are none near enough for each mixer.

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
        nearest: list[tuple[float, float]] = []
        for measurement in MEASURED.get(mixer, []):
            steps = [math.log(parameters / 1e6 / measurement.parameters), math.log(length / measurement.length)]
            if max(map(abs, steps)) <= math.log(FARTHEST):
                nearest.append((math.hypot(*steps), measurement.mfu))
        if not nearest:
            return None
        times.append(1 / min(nearest)[1])
    return len(times) / sum(times)
