"""What a run reports: metrics.jsonl is the record; the progress bar and Weights & Biases are views of it."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from glalm.config import RunConfig
from glalm.data.files import read_jsonl, replacing


class Metrics:
    """Writes one JSON row a reported step, in order, to folder/metrics.jsonl, and shows it.

    Rows after `start_step` are dropped first: a run killed after its last checkpoint makes those steps again. Used
    as a context manager; with `active` false (processes other than the first) nothing is written or shown.
    """

    def __init__(self, folder: Path, config: RunConfig, run_id: str, start_step: int, active: bool):
        self.active, self.steps, self.start_step = active, config.steps, start_step
        if not active:
            return
        path = folder / "metrics.jsonl"
        # A run that starts anew makes its row of step 0 again, too.
        kept = [row for row in read_jsonl(path) if row["step"] <= start_step] if start_step and path.exists() else []
        with replacing(path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = path.open("a")
        self._wandb = _start_wandb(folder, config, run_id)
        self._console = Console(file=sys.stderr)
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
        self._file.close()
        self._track(lambda run: run.finish())

    def advance(self, step: int) -> None:
        if self.active:
            self._bar.update(self._task, completed=step)

    def log(self, row: dict) -> None:
        """row: {"step": int, name: number}; flushed at once, so that a killed run keeps its record."""
        if not self.active:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        shown = "  ".join(form.format(row[name]) for name, form in SHOWN.items() if row.get(name) is not None)
        self._bar.update(self._task, completed=row["step"], shown=shown)
        if self._bar.disable or "val_loss" in row:
            self._bar.console.print(f"step {row['step']}/{self.steps}  {shown}", highlight=False, soft_wrap=True)
        values = {k: v for k, v in row.items() if k != "step" and v is not None}
        self._track(lambda run: run.log(values, step=row["step"]))

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
