"""What a run reports: metrics.jsonl is the record; the progress bar and Weights & Biases are views of it."""

import dataclasses
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from glalm.config.run import RunConfig
from glalm.data.files import atomic_write, flush_to_disk, reopen_truncated

MOST_UNWRITTEN = 10_000  # rows, some megabytes


class Metrics:
    """Writes one JSON row a reported step, in order, to folder/metrics.jsonl, and shows it.

    Rows after `start_step` are dropped first: a run killed after its last checkpoint makes those steps again. Used
    as a context manager; with `active` false (processes other than the first) nothing is written or shown.

    A file that cannot be written, because the disk is full, stops no run: rows wait in `unwritten`, the last
    MOST_UNWRITTEN of them, and go with the next one that can be. A checkpoint made meanwhile keeps them, for the
    `unwritten` of the run that is resumed from it.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        run_id: str,
        start_step: int,
        active: bool,
        unwritten: Iterable[dict] = (),
    ):
        self.active, self.steps, self.failures = active, config.steps, 0
        self.unwritten: deque[dict] = deque(maxlen=MOST_UNWRITTEN)
        if not active:
            return
        self._path = folder / "metrics.jsonl"
        # A run that starts anew makes its row of step 0 again, too.
        before = rows(self._path) if start_step else []
        kept = {row["step"]: row for row in (*unwritten, *before) if row["step"] <= start_step}
        with atomic_write(self._path) as file:
            self._size = file.write(_lines(kept[step] for step in sorted(kept)))
        self._wandb = _start_wandb(folder, config, run_id)
        # Without markup: what stands in brackets in an error's text is not for the console.
        self._console = Console(file=Unfailing(sys.stderr), markup=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=self.steps, completed=start_step, shown="")

    def __enter__(self) -> "Metrics":
        if self.active:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if not self.active:
            return
        self._bar.stop()
        if self.unwritten:
            self._write()
        if self.unwritten:
            lacking = f"{len(self.unwritten)} rows of metrics.jsonl could not be written"
            self.say(f"warning: {lacking}; the newest checkpoint has those before it, and the same command writes them")
        self._track(lambda run: run.finish())

    def advance(self, step: int) -> None:
        if self.active:
            self._bar.update(self._task, completed=step)

    def log(self, row: dict, durable: bool = False) -> None:
        """row: {"step": int, name: number}; written at once, so that a killed run keeps its record. durable: and on the
        disk, so that a machine without power does, before a checkpoint is there after which it is not made again."""
        if not self.active:
            return
        self.unwritten.append(row)
        self._write(durable)
        shown = "  ".join(form.format(row[name]) for name, form in SHOWN.items() if row.get(name) is not None)
        self._bar.update(self._task, completed=row["step"], shown=shown)
        if self._bar.disable or "val_loss" in row:
            self._bar.console.print(f"step {row['step']}/{self.steps}  {shown}", highlight=False, soft_wrap=True)
        values = {k: v for k, v in row.items() if k != "step" and v is not None}
        self._track(lambda run: run.log(values, step=row["step"]))

    def row(self) -> dict[str, int]:
        """For the metrics themselves: nothing while all is well."""
        return {"failed_writes": self.failures} if self.failures else {}

    def _write(self, durable: bool = True) -> None:
        lines = _lines(self.unwritten)
        try:
            # What a write that failed has left in the file is cut off; a file that someone has moved away begins anew.
            size = min(self._size, self._path.stat().st_size if self._path.exists() else 0)
            with reopen_truncated(self._path, size) as file:
                file.write(lines)
                if durable:
                    flush_to_disk(file)
        except OSError as error:
            self.failures += 1
            if len(self.unwritten) == 1:  # the first of a row of failures
                self.say(f"warning: a row of metrics.jsonl is not written: {error}; it is kept for the next try")
            return
        self._size = size + len(lines)
        if len(self.unwritten) > 1:
            self.say(f"metrics.jsonl is written again, with the {len(self.unwritten)} rows that were kept")
        self.unwritten.clear()

    def _track(self, call: Callable) -> None:
        """A tracker never stops a run: metrics.jsonl has everything."""
        if self._wandb is not None:
            try:
                call(self._wandb)
            except Exception as error:
                self._wandb = None
                self.say(f"Weights & Biases is given up: {error}; metrics.jsonl has every metric")

    def say(self, message: str) -> None:
        if self.active:
            self._bar.console.print(message, highlight=False, soft_wrap=True)


class Unfailing:
    """A stream without its OSErrors. What a log on a full disk, or a terminal that is gone, does not take is dropped:
    the console is a view."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def rows(path: Path) -> Iterator[dict]:
    """The rows of a file, if it is there, less those that a crash of the machine has cut short or left as zeros."""
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with suppress(ValueError):
            yield json.loads(line)


def _lines(rows: Iterable[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


SHOWN = {
    "loss": "loss {:.3f}",
    "val_loss": "val loss {:.3f}",
    "val_perplexity": "val perplexity {:.3f}",
    "lr": "lr {:.2e}",
    "grad_norm": "grad norm {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "peak_memory_gib": "{:.1f} GiB",
}


def _start_wandb(folder: Path, config: RunConfig, run_id: str):
    """A Weights & Biases run with the same id after every resume, or None when it is off or not to be had."""
    if config.track.wandb == "off":
        return None
    try:
        import wandb

        # Without a login wandb would ask on the terminal: the run is recorded offline instead, to be synced later.
        online = config.track.wandb == "online" and wandb.login(prompt=False)
        return wandb.init(
            project=config.track.project,
            name=config.name,
            id=run_id,
            resume="allow",
            dir=folder,
            mode="online" if online else "offline",
            config=dataclasses.asdict(config),
        )
    except Exception as error:
        print(f"Weights & Biases is not used: {error}; metrics.jsonl has every metric", file=sys.stderr)
        return None
