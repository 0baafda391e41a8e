"""What makes two runs the same: the part of a config that decides what is learnt."""

import dataclasses
import json
from typing import Any

from glalm.config.run import RunConfig
from glalm.config.strict import join

# What a resumed run may change: where things lie, how often it reports, how the work is split over the hardware.
MAY_CHANGE = (
    "name",
    "runs_dir",
    "data.path",
    "data.workers",
    "track",
    "parallel",
    "train.micro_batch_size",
    "train.precision",
    "train.float8",
    "train.compile",
    "train.activation_checkpointing",
    "train.eval_every",
    "train.eval_sequences",
    "train.checkpoint",
    "train.guard.bad_steps",
    "train.guard.hang_seconds",
    "train.resume_from",
    "train.allow_changes",
    "train.log_every",
    "train.profile_steps",
    "train.memory_snapshot",
    "train.dry_run",
    "train.assumed_mfu",
    "train.assumed_gpus",
)


def flatten(tree: dict, where: str = "") -> dict[str, Any]:
    """A nested dict as {"a.b": value}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, join(where, key)) if isinstance(value, dict) else {join(where, key): value}
    return flat


def identity(config: RunConfig) -> dict[str, Any]:
    """The flat part of a config that decides what is learnt: resuming with another value would be another run.

    Fields that a subclass of RunConfig adds, such as evaluators, decide nothing of it.
    """
    tree = {field.name: dataclasses.asdict(config)[field.name] for field in dataclasses.fields(RunConfig)}
    flat = flatten(json.loads(json.dumps(tree)))
    return {k: v for k, v in flat.items() if not any(k == m or k.startswith(m + ".") for m in MAY_CHANGE)}


def compare(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences between two identities, a line each; empty when a run may be resumed."""
    return [f"{k}: {saved.get(k)!r} -> {now.get(k)!r}" for k in sorted(saved | now) if saved.get(k) != now.get(k)]
