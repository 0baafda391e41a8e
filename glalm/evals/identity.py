"""What the numbers of a result depend on. By this, results are recognized, kept apart and compared."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glalm.data.files import printable

# Where the text lies, not what it says: results on a set that was moved or copied are the same.
LOCATION = "data_path"
TEXT_FILE = "file"  # the split of a text that was read as it lies, from a file that is no prepared set
# Settings that belong to the model. Numbers of models that differ in them compare.
MODEL_SETTINGS = ("precision", "tokenizer", "document_prefix", "weights", "code")
# Settings that only decide at which lengths an evaluator measures. The lengths are an axis of its figures.
LENGTH_SETTINGS = {
    "extrapolation": ("train_length", "max_length", "bucket"),
    "decode_speed": ("lengths", "steps", "repeats", "seed"),
}


@dataclass(frozen=True)
class ResultIdentity:
    """Everything that a result depends on. Results with equal digests are the same result.

    Attributes:
        evaluator: Its name in EVALUATORS.
        checkpoint: step_N, if the model is a checkpoint of a run.
        checksum: SHA-256 of the model's weights.
        settings: What else decides the numbers, as JSON: options, the text's SHA-256, precision, tokenizer.
    """

    evaluator: str
    checkpoint: str | None
    checksum: str
    settings: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the identity, wherever the text lies."""
        settings = {name: value for name, value in self.settings.items() if name != LOCATION}
        return _canonical_sha256([self.evaluator, self.checkpoint, self.checksum, settings])

    def to_record(self) -> dict[str, Any]:
        """Return the part of a result's JSON that says what it depends on."""
        return {
            "evaluator": self.evaluator,
            "checksum": self.checksum,
            "settings": self.settings,
            "identity": self.digest,
        }


def measurement(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in which two results must agree so that their numbers compare.

    Of an extrapolation's contexts this is the first, which figures draw and compare.
    """
    lengths = LENGTH_SETTINGS.get(record.get("evaluator", ""), ())
    excluded = {LOCATION, *MODEL_SETTINGS, *lengths}
    settings = {name: value for name, value in record.get("settings", {}).items() if name not in excluded}
    if "contexts" in settings:
        settings["contexts"] = settings["contexts"][0]
    return settings


def group_comparable(records: Iterable[dict]) -> list[list[dict]]:
    """Return the records in groups whose numbers compare, in the order of their first records."""
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(_canonical_sha256(measurement(record)), []).append(record)
    return list(groups.values())


def differing_settings(records: Sequence[dict]) -> list[str]:
    """Return the settings in which these records must agree, and do not."""
    found = [measurement(record) for record in records]
    keys = dict.fromkeys(key for settings in found for key in settings)
    return [key for key in keys if len({_canonical_sha256(settings.get(key)) for settings in found}) > 1]


def describe_differences(records: Sequence[dict]) -> list[str]:
    """Return why the numbers of these records do not compare: "data: mine / other", "text: documents / stream", ..."""
    found = [measurement(record) for record in records]
    differences = []
    for key in differing_settings(records):
        values = [format_setting(settings.get(key)) for settings in found]
        if key == "data_sha256":
            names = [text_name(record) for record in records]
            is_clear = len(set(names)) == len(set(values))
            values = names if is_clear else [f"{name} ({value[:8]})" for name, value in zip(names, values, strict=True)]
        differences.append(f"{'data' if key == 'data_sha256' else key}: {' / '.join(dict.fromkeys(values))}")
    return differences


def require_comparable(records: Sequence[dict]) -> None:
    """Raise ValueError, naming what differs, where the numbers of these records do not compare."""
    if differences := describe_differences(records):
        raise ValueError(
            f"these results do not compare: {'; '.join(differences)}. Evaluate the models with equal settings, or "
            "choose results that agree"
        )


def describe_conditions(record: Mapping[str, Any]) -> str:
    """Return what a result was measured on, for a reader who sees its numbers alone. Empty: nothing is known of it."""
    settings = record.get("settings", {})
    parts = []
    if LOCATION in settings:
        split = settings.get("split", "")
        name = text_name(record)
        parts.append(name if split == TEXT_FILE else f"{split} split of {name}".strip())
    if "seq_len" in settings:
        parts.append(f"windows of {settings['seq_len']:,} tokens")
    if "contexts" in settings:
        texts = "documents" if settings["text"] == "documents" else "blocks of the stream"
        parts.append(f"at most {settings['documents']} {texts}" if settings["documents"] else f"all {texts}")
    if settings.get("limit"):
        parts.append(f"only the first {settings['limit']:,} questions of each task")
    if settings.get("num_fewshot") is not None:
        parts.append(f"{settings['num_fewshot']} examples before each question")
    if settings.get("stateful"):
        parts.append("harness.stateful=true")
    if is_of_average(record):
        parts.append("moving average of the weights")
    return ", ".join(parts)


def is_of_average(record: Mapping[str, Any]) -> bool:
    """Return whether a result is of the moving average of a checkpoint's weights."""
    return record.get("settings", {}).get("weights") == "average"


def text_name(record: Mapping[str, Any]) -> str:
    """Return the name of the text that was read: that of its folder or file. Empty: it is not known."""
    return printable(Path(record.get("settings", {}).get(LOCATION, "")).name)


def format_setting(value: Any) -> str:
    """Return a setting in a few words: what is nested, such as the checksums of many files, as a checksum."""
    return _canonical_sha256(value)[:8] if isinstance(value, dict) else str(value)


def _canonical_sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
