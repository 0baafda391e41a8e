"""The files of a run that evaluators write and that plots and reports read."""

import json
from pathlib import Path

from glalm.data import files


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all. Raises ValueError at a number that is not finite: JSON has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content, indent=1, allow_nan=False)


def read_json(path: Path) -> dict | None:
    """The content of a JSON file, or None when there is no such file. ValueError, naming it, when it is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, oldest first, less a last line that a kill cut short; [] when there is no file.

    ValueError, naming it, when it is damaged.
    """
    try:
        return files.read_jsonl(path) if path.is_file() else []
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def tokens_of(rows: list[dict]) -> list[int]:
    """Tokens trained on at each row. A row of a validation alone has its step only, so its tokens are inferred."""
    per_step = next((row["tokens"] / row["step"] for row in rows if "tokens" in row), 0)
    return [round(row["step"] * per_step) for row in rows]
