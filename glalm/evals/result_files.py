"""The files of a run that evaluators write and that plots and reports read."""

import json
from bisect import bisect
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from glalm.data import files

NO_SCORES = ("samples", "num_fewshot", "version")  # numbers that glalm.evals.harness.metrics has beside a task's scores


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all. Raises ValueError at a number that is not finite: JSON has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content, indent=1, allow_nan=False)


def read_json(path: Path) -> dict | None:
    """The content of a JSON file, or None when there is no such file. ValueError, naming it, when it is damaged."""
    return _read(path, lambda path: json.loads(path.read_text()))


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, oldest first, less a last line that a kill cut short; [] when there is no file.

    ValueError, naming it, when it is damaged.
    """
    return _read(path, files.read_jsonl) or []


def _read(path: Path, parse: Callable[[Path], Any]) -> Any:
    try:
        return parse(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def scores(metrics: dict) -> dict[str, float]:
    """What one of the harness's tasks measures, of all that is on record of it: less errors, counts and versions."""
    measured = {k: value for k, value in metrics.items() if k not in NO_SCORES and not k.endswith("_stderr")}
    return {k: value for k, value in measured.items() if value is not None}


def training_speed(rows: Iterable[dict]) -> float | None:
    """The median tokens a second of training's rows, None where there are none."""
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return median(speeds) if speeds else None


def tokens_of(rows: list[dict]) -> list[int]:
    """Tokens trained on at each row. A row of a validation alone has its step only: its tokens are inferred from the
    rows around it, or the last two, as the batch may change in a run."""
    known = sorted(({0: 0} | {row["step"]: row["tokens"] for row in rows if "tokens" in row}).items())

    def inferred(step: int) -> int:
        if len(known) == 1:
            return 0
        after = bisect(known, step, 1, len(known) - 1, key=lambda point: point[0])
        (step_0, tokens_0), (step_1, tokens_1) = known[after - 1], known[after]
        return round(tokens_0 + (step - step_0) * (tokens_1 - tokens_0) / (step_1 - step_0))

    return [row["tokens"] if "tokens" in row else inferred(row["step"]) for row in rows]
