"""Record a run's metrics in metrics.jsonl, show them on the console and in a tracker, and read them back."""

import json
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from glalm.data.files import atomic_write, find_mismatch, flush_to_disk, read_file, reopen_truncated
from glalm.progress import ProgressBar
from glalm.train.trackers import RunTracker

if TYPE_CHECKING:  # Reports read metrics without the seconds that importing torch takes.
    from glalm.config.run import RunConfig

MAX_UNWRITTEN_ROWS = 10_000  # A few megabytes.
LAST_BYTES = 65_536  # More than a row has.
NUMBERS = {str: (int, float, type(None))}

# The metrics on the console, in this order.
CONSOLE_FORMATS = {
    "loss": "loss {:.3f}",
    "val_loss": "val loss {:.3f}",
    "val_perplexity": "val perplexity {:.5g}",
    "val_bits_per_byte": "{:.4f} bits per byte",
    "lr": "lr {:.2e}",
    "grad_norm": "grad norm {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "peak_memory_gib": "{:.1f} GiB",
}


def read_metrics(path: Path, last_bytes: int | None = None) -> tuple[list[dict], list[bytes]]:
    """Read a metrics.jsonl.

    Args:
        last_bytes: How much of the file's end is read; None for all. The line that it cuts is no row.

    Returns:
        The rows, oldest first, and the lines that are not rows, because a kill cut them short, a crash of the machine
        left zeros, or somebody edited them. A file that does not exist has neither.

    Raises:
        DamagedFile: It is not a regular file, or it cannot be read.
    """
    try:
        content = read_file(path, last_bytes)
    except FileNotFoundError:
        return [], []
    rows = []
    damaged = []
    for line in filter(None, content.split(b"\n")):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if find_mismatch(row, {"step": int}) or find_mismatch(row, NUMBERS):
            damaged.append(line)
        else:
            rows.append(row)
    return rows, damaged


def read_last_row(path: Path) -> dict | None:
    """Return the newest row of a metrics.jsonl, or None if it has none. All of it is read only if its end has no row.

    Raises:
        DamagedFile: It is not a regular file, or it cannot be read.
    """
    for last_bytes in (LAST_BYTES, None):
        rows, _ = read_metrics(path, last_bytes)
        if rows:
            return rows[-1]
    return None


class MetricsWriter:
    """Append rows to a run's metrics.jsonl and show them. Use it as a context manager.

    metrics.jsonl is the record. The progress bar, the console and the tracker are views of it, whose errors never stop
    a run.

    At the start, rows after `start_step` move to metrics.superseded.jsonl: a run that was killed after its last
    checkpoint repeats those steps. A row that cannot be written, because the disk is full, waits in `unwritten` and is
    written with the next. Checkpoints save `unwritten`, so that a run that is resumed from one can still write these
    rows.

    Args:
        folder: The run's folder.
        config: The run's config.
        run_id: The id of the tracker's run, so that it continues when the run is resumed.
        start_step: The last step that is not repeated.
        is_main_process: Other processes write and show nothing.
        unwritten: The rows that the checkpoint saved.
    """

    def __init__(
        self,
        folder: Path,
        config: "RunConfig",
        run_id: str,
        start_step: int,
        is_main_process: bool,
        unwritten: Iterable[dict] = (),
    ):
        self.is_main_process = is_main_process
        self.total_steps = config.steps
        self.failures = 0
        self.unwritten: deque[dict] = deque(maxlen=MAX_UNWRITTEN_ROWS)
        self._lost = 0  # rows that were too many to wait
        self._bar = ProgressBar(quiet=not is_main_process)
        self.log_message = self._bar.log  # It prints above the progress bar.
        self._bar.start_task("training", total=self.total_steps, completed=start_step)
        self._path = folder / "metrics.jsonl"
        self.tracker = RunTracker(folder, config, run_id, start_step, self.log_message, enabled=is_main_process)
        if not is_main_process:
            return
        rows, damaged = read_metrics(self._path)
        if damaged:
            aside = folder / "metrics.damaged.jsonl"
            with open(aside, "ab") as file:
                file.write(b"".join(line + b"\n" for line in damaged))
            self.log_message(f"warning: {self._path}: skipped {len(damaged)} unreadable lines. {aside} keeps them.")
        if superseded := [row for row in rows if row["step"] > start_step]:
            with open(folder / "metrics.superseded.jsonl", "ab") as file:
                file.write(_encode_rows(superseded))
        # A run from scratch repeats step 0.
        kept = {row["step"]: row for row in (*unwritten, *rows) if row["step"] <= start_step and start_step}
        with atomic_write(self._path) as file:
            self._size = file.write(_encode_rows(kept[step] for step in sorted(kept)))

    def __enter__(self) -> "MetricsWriter":
        self._bar.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self._bar.__exit__()
        if self.unwritten:
            self._write_unwritten(durable=True)
        if self.unwritten:
            self.log_message(
                f"warning: {len(self.unwritten)} rows of metrics.jsonl could not be written. The newest checkpoint has "
                "saved those before it; run the same command again to write them."
            )
        self.tracker.finish()

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._bar.update(completed=step)

    def write_row(self, row: dict, durable: bool = False) -> None:
        """Append a row to metrics.jsonl and show it.

        Args:
            row: {"step": step, name: number, ...}.
            durable: Flush the row to disk, not only to the operating system. Needed for rows before a checkpoint,
                because a resumed run does not repeat their steps.
        """
        if not self.is_main_process:
            return
        self._lost += len(self.unwritten) == MAX_UNWRITTEN_ROWS
        self.unwritten.append(row)
        self._write_unwritten(durable)
        shown = [form.format(row[name]) for name, form in CONSOLE_FORMATS.items() if row.get(name) is not None]
        status = "  ".join([f"step {row['step']}/{self.total_steps}", *shown])
        self._bar.update(completed=row["step"], status=status)
        if not self._bar.is_drawn or "val_loss" in row:
            self.log_message(status)
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        self.tracker.log_metrics(values, row["step"])

    def _write_unwritten(self, durable: bool) -> None:
        lines = _encode_rows(self.unwritten)
        try:
            # A failed write may have left something behind the rows.
            size = self._size
            found = self._path.stat().st_size if self._path.exists() else 0
            if found < size:
                self.log_message(
                    f"warning: {self._path} was removed or cut during the run, which continues it with new rows."
                )
                size = self._path.read_bytes().rfind(b"\n") + 1 if found else 0
            with reopen_truncated(self._path, size) as file:
                file.write(lines)
                if durable:
                    flush_to_disk(file)
        except OSError as error:
            self.failures += 1
            if len(self.unwritten) == 1:  # Only the first of consecutive failures is logged.
                self.log_message(f"warning: a row of metrics.jsonl could not be written: {error}. It will be retried.")
            return
        self._size = size + len(lines)
        if len(self.unwritten) > 1:
            state = f"lacks {self._lost} rows but continues" if self._lost else "is complete again"
            self.log_message(f"metrics.jsonl {state}, with the {len(self.unwritten)} rows that had to wait.")
        self.unwritten.clear()


def _encode_rows(rows: Iterable[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
