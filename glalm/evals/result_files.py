"""The JSON files that evaluators write and that figures and reports read, and what reports derive from them."""

import json
from bisect import bisect
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from glalm.data import files

NO_SCORES = ("samples", "num_fewshot", "version")  # numbers beside a task's scores in glalm.evals.harness's results


def write_json(path: Path, content: dict) -> None:
    """Write a file atomically, in a folder that may be new.

    Raises:
        ValueError: A number is not finite, which JSON cannot hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content, indent=1, allow_nan=False)


def read_json(path: Path) -> dict | None:
    """Return the content of a JSON file. None: there is no such file.

    Raises:
        ValueError: It is damaged; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def select_scores(metrics: dict) -> dict[str, float]:
    """Return the scores in a task's metrics: without standard errors, counts, versions, and what is None."""
    return {
        name: value
        for name, value in metrics.items()
        if name not in NO_SCORES and not name.endswith("_stderr") and value is not None
    }


def median_training_speed(rows: Iterable[dict]) -> float | None:
    """Return the median tokens a second of rows of metrics.jsonl. None: no row has it."""
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return median(speeds) if speeds else None


def infer_tokens(rows: list[dict]) -> list[int]:
    """Return the tokens trained on at each row of metrics.jsonl.

    A row of a validation alone has its step only: its tokens are interpolated between the rows around it, because the
    batch size may change during a run, or extrapolated from the last two.
    """
    known = sorted(({0: 0} | {row["step"]: row["tokens"] for row in rows if "tokens" in row}).items())

    def interpolate(step: int) -> int:
        if len(known) == 1:
            return 0
        after = bisect(known, step, 1, len(known) - 1, key=lambda point: point[0])
        step_0, tokens_0 = known[after - 1]
        step_1, tokens_1 = known[after]
        return round(tokens_0 + (step - step_0) * (tokens_1 - tokens_0) / (step_1 - step_0))

    return [row["tokens"] if "tokens" in row else interpolate(row["step"]) for row in rows]
