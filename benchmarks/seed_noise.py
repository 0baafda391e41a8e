"""Print how much the last metrics of runs vary with the seed, so that a smaller difference is not taken for a gain.

The runs must be equal but for their seeds, as those of one sweep are:

    glalm train --multirun experiment=ladder_small name=noise seed=1,2,3,4 optim.lr=1e-3 \
        'train_evals.evals=[perplexity,paper_zero_shot]' train_evals.every=1000000
    python benchmarks/seed_noise.py runs/noise-seed-*
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from glalm.data.files import read_json
from glalm.train.metrics import read_metrics

TIMES = (
    "tokens",
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "mfu",
    "peak_memory_gib",
    "data_wait_seconds",
    "lr",
)


class Noise(NamedTuple):
    """Statistics of one metric over runs that differ in their seeds.

    Attributes:
        mean: Over the runs.
        deviation: The standard deviation of one run.
        difference: Two runs that differ by more than this differ by two standard errors of a difference.
    """

    mean: float
    deviation: float
    difference: float


def measure_noise(runs: Sequence[Path]) -> dict[str, Noise]:
    """Return the noise of every metric that the last rows of all runs have.

    Raises:
        ValueError: There are fewer than two runs, one has no metrics, two have one seed, they differ in more than their
            seeds, or they ended at different steps.
    """
    if len(runs) < 2:
        raise ValueError("Noise is measured over two runs or more. Name several folders of runs.")
    first, *others = runs
    for run in others:
        if changed := differing_keys(first, run) - {"seed"}:
            raise ValueError(f"{first} and {run} differ in {', '.join(sorted(changed))}, not in their seeds alone.")
    by_seed: dict[int, Path] = {}
    for run in runs:
        seed = read_identity(run)["seed"]
        if seed in by_seed:
            raise ValueError(f"{by_seed[seed]} and {run} have one seed, {seed}. Name one of them.")
        by_seed[seed] = run
    rows = [last_row(run) for run in runs]
    for run, row in zip(others, rows[1:], strict=True):
        if row["step"] != rows[0]["step"]:
            raise ValueError(
                f"{first} ended at step {rows[0]['step']} and {run} at step {row['step']}. To resume the shorter run: "
                "glalm train resume=FOLDER"
            )
    names = [name for name in rows[0] if name != "step" and name not in TIMES and all(name in row for row in rows)]
    noise = {}
    for name in names:
        values = [row[name] for row in rows]
        deviation = stdev(values)
        noise[name] = Noise(fmean(values), deviation, 2 * math.sqrt(2) * deviation)
    return noise


def differing_keys(one: Path, other: Path) -> set[str]:
    """Return the keys that decide what is learned in which two runs differ."""
    saved, current = read_identity(one), read_identity(other)
    return {key for key in saved | current if saved.get(key) != current.get(key)}


def read_identity(run: Path) -> dict:
    """Return the identity in a run's run.json: what decides what is learned, with the seed."""
    return read_json(run / "run.json", {"identity": {"seed": int}})["identity"]


def last_row(run: Path) -> dict[str, float]:
    """Return the metrics of the last row, without those that are null."""
    rows, _ = read_metrics(run / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{run} has no metrics.")
    return {name: value for name, value in rows[-1].items() if value is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run")
    try:
        noise = measure_noise(parser.parse_args().runs)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print("| metric | mean | standard deviation | smallest difference of two runs |\n|-|-|-|-|")
    for name, values in noise.items():
        print(f"| {name} | {values.mean:.5g} | {values.deviation:.2g} | {values.difference:.2g} |")


if __name__ == "__main__":
    main()
