"""Print what changes of a recipe are worth, in bits per byte of held-out text.

    glalm eval name=gla_speedrun-seed-1 data_path=data/heldout 'evals=[perplexity]'        of every run
    python benchmarks/recipe_table.py runs/gla_speedrun-seed-1 runs/gla_speedrun-seed-2 runs/no_conv runs/adamw

The first run named is of the recipe. Runs that differ in nothing but their seeds are one row, by their mean. The noise
is the standard deviation over seeds, pooled over all rows of several seeds; from it follows the standard error of each
difference. A run that was also evaluated with weights=average has a second row. Where runs were evaluated on several
texts, --text heldout chooses one by the name of its folder or file.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from glalm.config.strict import build_dataclass
from glalm.evals.identity import describe_conditions, describe_differences, is_of_average, text_name
from glalm.evals.options import TrainingRun
from glalm.evals.result_files import current_results, median_training_speed, read_json, step_of
from glalm.train.metrics import read_metrics

SHOWN_CHANGES = 3
# Windows of different tokenizers end at different bytes, so a text is known by its bytes only up to this share.
BYTES_TOLERANCE = 0.01


@dataclass(frozen=True)
class Score:
    """What one run reached with its weights or with their moving average."""

    name: str
    seed: int
    settings: dict[str, Any]  # what decides what is learned, without the seed
    record: dict[str, Any]  # of `glalm eval evals=[perplexity]`
    tokens: int
    tokens_per_second: float | None

    @property
    def bits_per_byte(self) -> float:
        return self.record["results"]["bits_per_byte"]


@dataclass(frozen=True)
class Row:
    """The mean over runs that differ only in their seeds."""

    name: str
    changes: str  # in which settings it differs from the recipe
    seeds: int
    bits_per_byte: float
    difference: float  # to the recipe
    error: float | None  # the standard error of `difference`; None: no noise is known
    tokens_per_second: float | None
    minutes: float | None  # of training, at that speed


def read_scores(run: Path, text: str | None = None) -> list[Score]:
    """Return the score of a run, and if there is one, that of the average of its weights.

    Args:
        text: The name of the folder or file that was read, as of `text_name`. None: of any text, if it is one.

    Raises:
        ValueError: The run is not complete, or its last checkpoint has not been evaluated on the text, or several times
            by settings that differ.
    """
    saved = read_json(run / "run.json")
    if saved is None:
        raise ValueError(f"{run} is not the folder of a run, because it has no run.json.")
    config = build_dataclass(TrainingRun, saved["config"])
    rows, _ = read_metrics(run / "metrics.jsonl")
    records = [record for record in current_results(run) if record["evaluator"] == "perplexity"]
    records = [record for record in records if step_of(record) == config.steps and text in (None, text_name(record))]
    if not records:
        on_text = "" if text is None else f" on {text}"
        raise ValueError(
            f"{run} has no perplexity of its last step, {config.steps}{on_text}. To train it to there: glalm train "
            f"resume={run}. To evaluate it: glalm eval runs_dir={run.parent} name={run.name} 'evals=[perplexity]'"
        )
    settings = {key: value for key, value in saved["identity"].items() if key != "seed"}
    speed = median_training_speed(rows)
    scores = []
    for record in records:
        if record["results"]["bits_per_byte"] is None:
            raise ValueError(
                f"{run}/{record['file']} has no bits per byte, because the tokenizer of the run was missing."
            )
        weights = {"weights": "average"} if is_of_average(record) else {}
        if alike := [score.record for score in scores if is_of_average(score.record) == is_of_average(record)]:
            both = ", ".join(f"{found['file']} ({describe_conditions(found)})" for found in (*alike, record))
            raise ValueError(
                f"{run} has several perplexities: {both}. Name the text that is meant, --text NAME, or move those that "
                "are not meant out of the folder."
            )
        name = f"{run.name}, average" if weights else run.name
        scores.append(Score(name, config.seed, settings | weights, record, config.tokens_at(config.steps), speed))
    return sorted(scores, key=lambda score: "weights" in score.settings)


def require_same_text(scores: Sequence[Score]) -> None:
    """Raise ValueError unless all scores are of one text, which several tokenizers may have cut."""
    by_tokenizer: dict[str, dict[str, Any]] = {}
    for score in scores:
        first = by_tokenizer.setdefault(score.record["settings"]["tokenizer"], score.record)
        if differences := describe_differences([first, score.record]):
            raise ValueError(f"{first['run']} and {score.name} do not compare: {'; '.join(differences)}.")
    one, *others = by_tokenizer.values()
    for other in others:
        size, other_size = one["results"]["bytes"], other["results"]["bytes"]
        if abs(size - other_size) > BYTES_TOLERANCE * size:
            raise ValueError(
                f"{one['run']} and {other['run']} were evaluated on different texts, of {size:,} and {other_size:,} "
                "bytes."
            )


def build_rows(scores: Sequence[Score]) -> tuple[list[Row], float | None]:
    """Return the rows in the order of their first runs, and the standard deviation over seeds.

    Raises:
        ValueError: A run was named twice, or the scores do not compare.
    """
    require_same_text(scores)
    groups: list[list[Score]] = []
    for score in scores:
        group = next((group for group in groups if group[0].settings == score.settings), None)
        if group is None:
            groups.append([score])
        elif any(other.seed == score.seed for other in group):
            raise ValueError(f"{group[0].name} and {score.name} differ in nothing. Name one of them.")
        else:
            group.append(score)
    recipe = groups[0]
    base = fmean(score.bits_per_byte for score in recipe)
    noise = pooled_deviation([[score.bits_per_byte for score in group] for group in groups])
    rows = []
    for group in groups:
        mean = fmean(score.bits_per_byte for score in group)
        speeds = [score.tokens_per_second for score in group if score.tokens_per_second is not None]
        speed = fmean(speeds) if speeds else None
        rows.append(
            Row(
                name=group[0].name,
                changes=describe_changes(recipe[0].settings, group[0].settings),
                seeds=len(group),
                bits_per_byte=mean,
                difference=mean - base,
                error=None if noise is None else noise * math.sqrt(1 / len(group) + 1 / len(recipe)),
                tokens_per_second=speed,
                minutes=None if speed is None else group[0].tokens / speed / 60,
            )
        )
    return rows, noise


def pooled_deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the standard deviation within groups, or None if all groups have one value."""
    several = [group for group in groups if len(group) > 1]
    if not several:
        return None
    degrees = sum(len(group) - 1 for group in several)
    return math.sqrt(sum(variance(group) * (len(group) - 1) for group in several) / degrees)


def describe_changes(recipe: dict[str, Any], changed: dict[str, Any]) -> str:
    """Return the settings in which a run differs from the recipe, as "optim.name=adamw, optim.lr=0.001"."""
    keys = [key for key in sorted(recipe | changed) if recipe.get(key) != changed.get(key)]
    parts = [f"{key}={changed.get(key)}" for key in keys if not key.startswith("data ")]
    if len(parts) > SHOWN_CHANGES:
        parts[SHOWN_CHANGES:] = [f"{len(parts) - SHOWN_CHANGES} more"]
    if any(key.startswith("data ") for key in keys):
        parts.insert(0, "other data")
    return ", ".join(parts)


def format_row(row: Row, base: float) -> str:
    error = "" if row.error is None else f" ± {row.error:.4f}"
    difference = f"{row.difference:+.4f}{error} ({row.difference / base:+.1%})" if row.changes else ""
    speed = "" if row.tokens_per_second is None else f"{row.tokens_per_second / 1000:,.0f}k"
    minutes = "" if row.minutes is None else f"{row.minutes:.1f}"
    cells = (row.name, row.changes, str(row.seeds), f"{row.bits_per_byte:.4f}", difference, speed, minutes)
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run; the recipe's first")
    parser.add_argument("--text", metavar="NAME", help="only perplexities of this text, the name of its folder or file")
    args = parser.parse_args()
    try:
        scores = [score for run in args.runs for score in read_scores(run, args.text)]
        rows, noise = build_rows(scores)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print("| run | changed | seeds | bits per byte | difference | tokens/s | minutes |\n|-|-|-|-|-|-|-|")
    for row in rows:
        print(format_row(row, rows[0].bits_per_byte))
    if noise is None:
        print("The noise is not known, because no settings were trained with several seeds.")
    else:
        print(f"One run varies by {noise:.4f} with its seed. ± is one standard error of a difference.")


if __name__ == "__main__":
    main()
