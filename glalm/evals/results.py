"""The files of a run that evaluators write and that plots and reports read."""

import json
import os
from pathlib import Path


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all. Raises ValueError at a number that is not finite: JSON has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("w") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> dict | None:
    """The content of a JSON file, or None when there is no such file. ValueError, naming it, when it is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, oldest first, less a last line that a kill cut short; [] when there is no file."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines if line]


def tokens_of(rows: list[dict]) -> list[int]:
    """Tokens trained on at each row. A row of a validation alone has its step only, so its tokens are inferred."""
    per_step = next((row["tokens"] / row["step"] for row in rows if "tokens" in row), 0)
    return [round(row["step"] * per_step) for row in rows]
