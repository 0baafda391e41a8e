"""Compare the speed and the memory of two checkouts of the project on one machine.

    python benchmarks/compare_trees.py OLD_TREE NEW_TREE --out comparison.json
    python benchmarks/compare_trees.py OLD_TREE NEW_TREE --only kernels loader     some of the measurements
    python benchmarks/compare_trees.py OLD_TREE NEW_TREE --smoke                   tiny sizes, to test this on a CPU

Every measurement runs in fresh processes, first in the old tree, then in the new one, then in the old one again. The
old value of the table is the mean of the two old ones, so a steady drift of the machine cancels. The column old/old is
the second old value over the first: a difference between the trees that is no larger is noise. The measurements are
the trees' own commands, because modules move and commands stay.

On one H200 all measurements take about 8 minutes; those that would end after --limit seconds
are skipped. The exit code is 1 where a measurement failed.
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

MIB = 2**20


class MeasurementError(Exception):
    """A command failed or printed something unexpected. The message is for the reader of the table."""


@dataclass(frozen=True)
class Result:
    """What a command printed, how long it took, and the largest memory of one of its processes."""

    output: str
    seconds: float
    peak_mib: float


@dataclass
class Visit:
    """One turn of measuring a tree. `folder` is its scratch space; `deadline` is a time of `time.monotonic()`."""

    tree: Path
    folder: Path
    smoke: bool
    deadline: float

    def script(self, name: str) -> Path:
        """Find a script of the tree, which may lie in any of the folders that have held scripts."""
        candidates = [self.tree / folder / name for folder in ("benchmarks", "scripts", ".")]
        for candidate in candidates:
            if candidate.exists():
                return candidate
        raise MeasurementError(f"{self.tree} has no {name}")

    def run(self, script: Path, *arguments: object, caches: Path | None = None) -> Result:
        """Run a Python script with the tree's package.

        Args:
            script: the file to run.
            *arguments: its command line.
            caches: a folder for the kernels that Triton and torch.compile build. The visits share one by default; a
                measurement that compilation is a part of names an empty one.
        """
        caches = caches or self.folder.parent / "caches"
        inherited = os.environ.get("PYTHONPATH")
        environment = os.environ | {
            "PYTHONPATH": f"{self.tree}{os.pathsep}{inherited}" if inherited else str(self.tree),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "TMPDIR": str(self.folder),
        }
        command = [sys.executable, str(script), *map(str, arguments)]
        return run_command(command, environment, self.tree, self.deadline - time.monotonic())


def run_command(command: list[str], environment: dict[str, str], folder: Path, timeout: float) -> Result:
    """Run a command in `folder`; raise MeasurementError if it fails or takes longer than `timeout` seconds."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=errors, start_new_session=True
        )
        timer = threading.Timer(max(timeout, 1.0), os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        # Popen.wait() drops the resource usage, so the process is reaped here, and Popen is told its exit code.
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            lines = errors.read().strip().splitlines() or ["no message"]
            raise MeasurementError(f"{Path(command[1]).name} ended with {process.returncode}: {lines[-1]}")
        return Result(output.read(), seconds, usage.ru_maxrss * 1024 / MIB)


def find_numbers(pattern: str, output: str) -> list[float]:
    """Return the numbers that the pattern's one group matches; raise MeasurementError if there is none."""
    numbers = [float(text.replace(",", "")) for text in re.findall(pattern, output)]
    if not numbers:
        raise MeasurementError(f"the output has no match of {pattern!r}: {output[-300:]!r}")
    return numbers


# ------------------------------------------------------------------------------------------------ the measurements
# Each takes a visit and returns the values of its rows. A row's name ends with its unit.


def measure_kernels(visit: Visit) -> dict[str, float]:
    script = Path(__file__).with_name("time_chunk_gla.py")  # It calls the public operator alone, so it fits both trees.
    result = visit.run(script, "--smoke") if visit.smoke else visit.run(script)
    return json.loads(result.output.splitlines()[-1])


def measure_training(visit: Visit, size: str) -> dict[str, float]:
    """Train on random tokens. The caches begin empty, so the first step compiles everything."""
    record = visit.folder / f"training_{size}.json"
    caches = visit.folder / f"caches_{size}"
    sizes = ["--tiny", "--steps", 2] if visit.smoke else ["--rows", size, "--steps", 10]
    visit.run(visit.script("bench_training.py"), "--models", "glalm", *sizes, "--json", record, caches=caches)
    [row] = json.loads(record.read_text())["results"]
    if "error" in row:
        raise MeasurementError(f"bench_training.py: {row['error']}")
    values = {
        f"training {size}, tokens/s": row["tokens_per_second"],
        f"training {size}, first step, s": row["first_step_seconds"],
    }
    if row["peak_memory_gib"] is not None:
        values[f"training {size}, peak GPU memory, MiB"] = row["peak_memory_gib"] * 1024
    return values


def measure_run(visit: Visit) -> dict[str, float]:
    """Train a 340M model by train.py, with steps so small that the host, not the GPU, sets their pace."""
    corpus, data = visit.folder / "corpus.jsonl", visit.folder / "data"
    write_corpus(corpus, documents=200 if visit.smoke else 2000)
    visit.run(visit.script("prepare_data.py"), "--out", data, "--vocab-size", 512, "--workers", 2, corpus)
    model, steps, log_every = ("gla_tiny", 4, 1) if visit.smoke else ("gla_340m", 120, 10)
    with memory_folder() as runs:
        result = visit.run(
            visit.script("train.py"),
            *(f"model={model}", "optim=adamw", f"optim.warmup_steps={steps // 4}", "train=default"),
            *("name=comparison", f"runs_dir={runs}", f"data.path={data}", "data.seq_len=128"),
            *(f"train.steps={steps}", "train.batch_size=1", f"train.log_every={log_every}", "train.eval_sequences=1"),
            caches=visit.folder / "caches_run",
        )
        rows = [json.loads(line) for line in Path(runs, "comparison", "metrics.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    steady = speeds[len(speeds) // 4 :]  # The first rows contain the compilation.
    return {
        "train.py, the host's time a step, ms": 1e3 * 128 / statistics.median(steady),
        "train.py, whole run, s": result.seconds,
        "train.py, peak host memory, MiB": result.peak_mib,
    }


def memory_folder() -> tempfile.TemporaryDirectory:
    """Return a temporary folder in memory, so that what is written there does not depend on a disk."""
    return tempfile.TemporaryDirectory(dir="/dev/shm")


def write_corpus(path: Path, documents: int) -> None:
    """Write documents of made-up words, the same ones for every visit, one JSON object a line."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 8))) for _ in range(5000)]
    with path.open("w") as file:
        for _ in range(documents):
            file.write(json.dumps({"text": " ".join(generator.choices(words, k=200))}) + "\n")


def measure_checkpoint(visit: Visit) -> dict[str, float]:
    sizes = ["--model", "gla_tiny", "--batch", 1, 64] if visit.smoke else ["--model", "gla_340m"]
    with memory_folder() as folder:
        output = visit.run(visit.script("bench_checkpoint.py"), *sizes, "--saves", 3, "--folder", folder).output
    background = "\n".join(line for line in output.splitlines() if line.startswith("asynchronous"))
    return {
        "checkpoint, training waits, s": statistics.median(find_numbers(r"stall\s+([\d.]+) s", background)),
        "checkpoint, complete after, s": statistics.median(find_numbers(r"complete after\s+([\d.]+) s", background)),
    }


def measure_decoding(visit: Visit) -> dict[str, float]:
    sizes = ["--size", "1b3", "--batches", 1, 64, "--prompts", 2048, "--new", 128]
    if visit.smoke:
        sizes = ["--size", "tiny", "--device", "cpu", "--batches", 1, "--prompts", 16, "--new", 4]
    visit.run(visit.script("bench_decoding.py"), "--models", "glalm", *sizes, "--out", visit.folder)
    rows = json.loads((visit.folder / "decoding.json").read_text())["rows"]
    failures = [row["failed"] for row in rows if "failed" in row]
    if failures:
        raise MeasurementError(f"bench_decoding.py: {failures[0]}")
    return {f"decoding, batch {row['batch']}, tokens/s": row["tokens_per_second"] for row in rows}


def measure_loader(visit: Visit) -> dict[str, float]:
    sizes = ["--tokens", 2**27, "--seconds", 3]
    if visit.smoke:
        sizes = ["--tokens", 2**17, "--seconds", 0.2, "--seq-len", 64, "--batch-size", 8]
    output = visit.run(visit.script("bench_data.py"), "load", "--workers", 2, *sizes).output
    speeds = find_numbers(r"boundaries=\w+\s+workers=2\s+([\d.]+)M tokens/s", output)
    return {"loader, 2 workers, tokens/s": 1e6 * speeds[0]}


@dataclass(frozen=True)
class Measurement:
    measure: Callable[[Visit], dict[str, float]]
    seconds: int  # About what one visit takes on one H200.


MEASUREMENTS = {  # the most important first, because the last ones may be skipped
    "kernels": Measurement(measure_kernels, 30),
    "training_340m": Measurement(partial(measure_training, size="340m"), 45),
    "run": Measurement(measure_run, 45),
    "checkpoint": Measurement(measure_checkpoint, 30),
    "decoding": Measurement(measure_decoding, 25),
    "loader": Measurement(measure_loader, 10),
    "training_1b3": Measurement(partial(measure_training, size="1b3"), 50),
}


# ---------------------------------------------------------------------------------------------------- the comparison


@dataclass
class Row:
    """The values of one row. `new` and `again` are None where the command failed or reported no such row."""

    name: str
    first: float
    new: float | None
    again: float | None

    @property
    def old(self) -> float:
        return self.first if self.again is None else (self.first + self.again) / 2

    @property
    def change(self) -> float | None:
        """Return new/old."""
        return None if self.new is None or not self.old else self.new / self.old

    @property
    def noise(self) -> float | None:
        """Return old/old, the second old value over the first."""
        return None if self.again is None or not self.first else self.again / self.first

    def is_worse(self) -> bool:
        """Tell whether the new tree is worse by more than 1 % and by more than the two old values differ."""
        if self.change is None or self.noise is None:
            return False
        loss = 1 - self.change if self.name.endswith("tokens/s") else self.change - 1
        return loss > max(0.01, abs(self.noise - 1))


@dataclass
class Comparison:
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def compare(visits: dict[str, Visit], names: list[str]) -> Comparison:
    """Run the measurements that end before the visits' deadline. `visits` has the keys old, new and again, in order."""
    comparison = Comparison()
    for name in names:
        measurement = MEASUREMENTS[name]
        left = visits["old"].deadline - time.monotonic()
        if not visits["old"].smoke and left < len(visits) * measurement.seconds:
            comparison.skipped.append(name)
            continue
        values: dict[str, dict[str, float]] = {}
        for label, visit in visits.items():
            start = time.perf_counter()
            try:
                values[label] = measurement.measure(visit)
            except (MeasurementError, OSError, ValueError, KeyError) as error:
                values[label] = {}
                comparison.failures.append(f"{name}, {label}: {type(error).__name__}: {error}")
            print(f"{name}, {label}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        for row, first in values["old"].items():
            comparison.rows.append(Row(row, first, values["new"].get(row), values["again"].get(row)))
            if row not in values["new"]:
                comparison.failures.append(f"{name}: the new tree has no value of {row!r}")
    return comparison


def print_table(comparison: Comparison) -> None:
    print("| row | old | new | new/old | old/old |\n|-|-|-|-|-|")
    for row in comparison.rows:
        cells = [row.name, format_value(row.old), format_value(row.new), format_ratio(row.change)]
        print(f"| {' | '.join(cells)} | {format_ratio(row.noise)} |")
    worse = [row.name for row in comparison.rows if row.is_worse()]
    print(f"Worse by more than 1 % and more than the noise: {'; '.join(worse) or 'no row'}.")
    if comparison.skipped:
        print(f"Skipped for lack of time: {', '.join(comparison.skipped)}.")
    for failure in comparison.failures:
        print(f"FAILED: {failure}")


def format_value(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_record(path: Path, comparison: Comparison, environment: dict[str, dict[str, str]], smoke: bool) -> None:
    rows = [
        {"row": row.name, "old": row.first, "new": row.new, "old_again": row.again, "worse": row.is_worse()}
        for row in comparison.rows
    ]
    record = {
        "environment": environment,
        "smoke": smoke,
        "rows": rows,
        "failures": comparison.failures,
        "skipped": comparison.skipped,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


PROBE = """
import json, platform, torch, triton, glalm
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
print(json.dumps({"package": glalm.__file__, "device": device, **versions}))
"""


def probe_environment(visit: Visit) -> dict[str, str]:
    """Return the device and the versions that the tree is measured with.

    Raises MeasurementError if Python would import the package from elsewhere, an installed copy for example.
    """
    script = visit.folder / "probe.py"
    script.write_text(PROBE)
    environment = json.loads(visit.run(script).output)
    package = Path(environment["package"])
    if not package.resolve().is_relative_to(visit.tree):
        raise MeasurementError(f"{visit.tree}: Python imports {package} instead")
    return environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old_tree", type=Path)
    parser.add_argument("new_tree", type=Path)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=[*MEASUREMENTS], help="all by default")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write every value, as JSON")
    parser.add_argument("--limit", type=float, default=540, metavar="SECONDS", help="for everything (540)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.limit
    trees = {"old": arguments.old_tree, "new": arguments.new_tree, "again": arguments.old_tree}
    with tempfile.TemporaryDirectory() as scratch:
        visits = {}
        for label, tree in trees.items():
            folder = Path(scratch).resolve() / label
            folder.mkdir()
            visits[label] = Visit(tree.resolve(), folder, arguments.smoke, deadline)
        environment = {label: probe_environment(visits[label]) for label in ("old", "new")}
        comparison = compare(visits, arguments.only)
    print_table(comparison)
    if arguments.out:
        write_record(arguments.out, comparison, environment, arguments.smoke)
    return 1 if comparison.failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MeasurementError as error:
        sys.exit(f"error: {error}")
