"""What an evaluator is to `python eval.py`: a Job, made by a function(subject, config), that runs with Work."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glalm.config.strict import RunError
from glalm.evals.result_files import read_json, write_json


class Work:
    """The processes that share an evaluator's work, the bar, and what an earlier start of it left.

    rank, world: this process of how many. Whatever one process does with `gather`, `first` or `part`, all do, in the
    same order. `advance(n)` moves the bar by n units done by this process.
    """

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world
        self.advance: Callable[[int], object] = int
        self._parts: dict[str, Any] = {}
        self._path: Path | None = None
        self._over = False

    def mine(self, items: Iterable) -> list:
        """Every `world`th of the items: this process's share."""
        return list(items)[self.rank :: self.world]

    def gather(self, mine: list) -> list:
        """The inverse of `mine`: the results of all processes' shares, in the order of the items, on every process."""
        shares = self._exchange(mine)
        gathered: list[Any] = [None] * sum(map(len, shares))
        for rank, share in enumerate(shares):
            gathered[rank :: self.world] = share
        return gathered

    def first(self, make: Callable[[], Any]) -> Any:
        """make() of the first process, on every process."""
        return self._exchange(make() if self.rank == 0 else None)[0]

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """make(), JSON, which is written down: when the evaluator is killed and started again, it is not made again."""
        if name not in self._parts:
            self._parts[name] = make()
            if self._path and self.rank == 0:
                write_json(self._path, self._parts)
        return self._parts[name]

    def keep_parts(self, path: Path, of: dict) -> None:
        """From here on `part` writes into `path`, beginning with what it holds, if that is of the same `of`."""

        def left() -> dict:
            parts = read_json(path) or {}
            return parts if parts.get("of") == of else {"of": of}

        self._path, self._parts = path, self.first(left)

    def agree(self) -> None:
        """Called at the end. Raises RunError if another process failed."""
        self._exchange(None)

    def fail(self, error: Exception) -> None:
        """Tells the other processes, at their next exchange, lest they wait for this one."""
        if not self._over:
            self._exchange(None, f"{type(error).__name__}: {error}")

    def _exchange(self, mine: Any, error: str | None = None) -> list:
        """What each process has, in order of rank."""
        if self.world == 1:
            return [mine]
        heard: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(heard, (mine, error))
        if failed := {rank: text for rank, (_, text) in enumerate(heard) if text}:
            self._over = True
            if error is None:
                raise RunError("; ".join(f"process {rank}: {text}" for rank, text in failed.items()))
        return [content for content, _ in heard]


@dataclass
class Job:
    """An evaluator with its inputs, opened and checked: what is left is to run the model."""

    # JSON: all that the results depend on but the model; with equal ones a finished job is not run again.
    settings: dict
    run: Callable[[Work], dict | list]  # JSON: the results; all processes call it, the first one's are kept
    total: int  # units of work of all processes together, for the bar
    summary: Callable[[Any], list[str]]  # of the results: lines for the console
    unit: str = "tokens"
    # Of what eval/NAME.json holds, and a folder to draw into: the paths of the figures.
    plots: Callable[[dict, Path], list[Path]] = lambda record, folder: []
    # Of the results: the few numbers that a run's metrics (see in_training.py) and an export's card have.
    metrics: Callable[[Any], dict[str, float | None]] = lambda results: {}


def lacking(results: Any) -> dict[str, str]:
    """What an evaluator could not do although it did the rest, and why."""
    return results.get("missing", {}) if isinstance(results, dict) else {}
