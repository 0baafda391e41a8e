"""The JSON files that evaluators write and that figures and reports read, and what reports derive from them."""

import hashlib
import json
import math
import os
import re
from bisect import bisect
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from statistics import median

from glalm.config.strict import ConfigError, require
from glalm.data import files
from glalm.data.checksums import combine_weights
from glalm.data.shards import split_sha256
from glalm.evals.identity import TEXT_FILE, ResultIdentity, group_comparable, is_of_average, text_name

# Numbers beside a task's scores in glalm.evals.harness's results.
NO_SCORES = ("samples", "num_fewshot", "version", "chance")


def write_json(path: Path, content: dict) -> None:
    """Write a file atomically, in a folder that may be new.

    Raises:
        ValueError: A number is not finite, which JSON cannot hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content, indent=1, allow_nan=False)


def require_writable(folder: Path) -> None:
    """Raise ConfigError if no results can be written into `folder`, which may be new."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be a folder of results ({error}). Move it away.") from error
    require(os.access(folder, os.W_OK | os.X_OK), f"{folder} cannot be written to. Change its permissions.")


def read_json(path: Path) -> dict | None:
    """Return the content of a JSON file. None: there is no such file.

    Raises:
        DamagedFile: It cannot be read, or does not hold an object; the message names it.
    """
    try:
        return files.read_json(path)
    except FileNotFoundError:
        return None


def load_results(folder: Path, skip_damaged: bool = False) -> dict[Path, dict]:
    """Return the results in FOLDER/eval, {file: record}. Other JSON is skipped, and so are unfinished evaluations.

    Raises:
        DamagedFile: A file is damaged, and not `skip_damaged`; the message names it.
    """
    results = {}
    for path in filter(Path.is_file, sorted(folder.glob("eval/[!.]*.json"))):
        try:
            record = files.read_json(path, object)
        except files.DamagedFile:
            if not skip_damaged:
                raise
            continue
        if isinstance(record, dict) and "results" in record:
            defaults = {"evaluator": path.stem, "checkpoint": None, "checksum": "", "settings": {}, "metrics": {}}
            results[path] = defaults | record
    return results


def find_result(folder: Path, identity: ResultIdentity) -> dict | None:
    """Return the record in FOLDER/eval of this identity, whatever the name of its file."""
    records = load_results(folder, skip_damaged=True).values()
    return next((record for record in records if record.get("identity") == identity.digest), None)


def save_result(folder: Path, record: dict, name: str) -> Path:
    """Write a result as FOLDER/eval/NAME.json without replacing one of another identity, and return its path.

    NAME.json is the newest result of that name, but results on other text do not take the place of one on the text that
    the run was trained on, and results on a file (text=FILE) never do. All others are named by their text and their
    identity. What is no result, such as a damaged file, is renamed to NAME.json.replaced.
    """
    main_path = folder / "eval" / f"{name}.json"
    path_beside = _path_beside(main_path, record)
    if record["settings"].get("split") == TEXT_FILE:
        write_json(path_beside, record)
        return path_beside
    holder = load_results(folder, skip_damaged=True).get(main_path)
    if holder is None and main_path.exists():
        main_path.rename(main_path.with_name(f"{main_path.name}.replaced"))
    elif holder is not None and holder.get("identity") != record["identity"]:
        if is_own_text(holder) and not is_own_text(record):
            write_json(path_beside, record)
            return path_beside
        main_path.rename(_path_beside(main_path, holder))
    write_json(main_path, record)
    path_beside.unlink(missing_ok=True)
    return main_path


def is_own_text(record: dict) -> bool:
    """Return whether a result is on text of the set that the run was trained on, or on no set at all."""
    return record.get("own_text") is not False


def _path_beside(main_path: Path, record: dict) -> Path:
    """Return where a result is kept that is not its evaluator's main one."""
    text = re.sub(r"[^\w.]+", "_", text_name(record))[:40]
    identity = record.get("identity") or hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return main_path.with_name("-".join(filter(None, (main_path.stem, text, identity[:12]))) + ".json")


def current_results(folder: Path) -> list[dict]:
    """Return the results in a folder that speak of what is there now.

    Of results that measured the same, these are those of the highest step. A result of a checkpoint that was replaced
    by another of the same name is left out.

    Raises:
        DamagedFile: A file is damaged; the message names it.
    """
    results = [
        record | {"file": f"eval/{path.name}"}
        for path, record in load_results(folder).items()
        if not is_superseded(folder, record)
    ]
    newest = []
    for evaluator in dict.fromkeys(record["evaluator"] for record in results):
        for group in group_comparable(record for record in results if record["evaluator"] == evaluator):
            last = max(map(step_of, group))
            newest += [record for record in group if step_of(record) == last]
    return newest


def select_result(results: Iterable[dict], evaluator: str) -> dict | None:
    """Return the evaluator's main result: on the run's own text if there is one, of the highest step, in NAME.json.

    Results of the weights precede those of their moving average.
    """
    found = [record for record in results if record["evaluator"] == evaluator]
    main_file = f"eval/{evaluator}.json"

    def rank(record: dict) -> tuple:
        return is_own_text(record), not is_of_average(record), step_of(record), record["file"] == main_file

    return max(found, key=rank, default=None)


def step_of(record: dict) -> int:
    """Return the step of the checkpoint that was evaluated. -1: the model is not a checkpoint of a run."""
    found = re.fullmatch(r"step_(\d+)", record.get("checkpoint") or "")
    return int(found[1]) if found else -1


def is_superseded(folder: Path, record: dict) -> bool:
    """Return whether the checkpoint of that name in the run's folder has other weights than those evaluated."""
    if step_of(record) < 0 or not record["checksum"]:
        return False
    path = folder / "checkpoints" / record["checkpoint"] / "manifest.json"
    try:
        manifest = files.read_json(path, {"files": {str: {"sha256": str}}})
    except (FileNotFoundError, files.DamagedFile):
        return False  # It is not known.
    kind = "average" if is_of_average(record) else "model"
    return combine_weights(manifest["files"], kind) != record["checksum"]


def describe_validation(folder: Path) -> dict:
    """Return what the validation losses of the run in `folder` are of, in the form of a result's record."""
    config = (read_json(folder / "run.json") or {}).get("config", {})
    settings = {}
    with suppress(KeyError, TypeError):
        settings["data_sha256"] = split_sha256(read_json(folder / "data.json") or {}, "validation")
        settings |= {"data_path": config["data"]["path"], "split": "validation"}
        settings |= {name: config["data"][name] for name in ("seq_len", "document_boundaries")}
        settings["eval_sequences"] = config["train"]["eval_sequences"]
    return {"evaluator": "validation", "settings": settings}


def select_scores(metrics: dict) -> dict[str, float]:
    """Return the scores in a task's metrics: without standard errors, counts, versions, and what is None."""
    return {
        name: value
        for name, value in metrics.items()
        if name not in NO_SCORES and not name.endswith("_stderr") and value is not None
    }


def main_context(results: dict) -> str:
    """Return the context whose ratios stand for an extrapolation in tables: stateful, or else the first."""
    return "stateful" if "stateful" in results["contexts"] else next(iter(results["contexts"]))


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


def format_number(x: float | None, digits: int = 2) -> str | None:
    """Return a number for a table, from a million on in four digits: the perplexity of a diverged model has hundreds.

    None: it is None or not finite.
    """
    if x is None or not math.isfinite(x):
        return None
    return f"{x:,.{digits}f}" if abs(x) < 1e6 else f"{x:.4g}"
