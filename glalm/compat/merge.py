"""Average the weights of several checkpoints (Izmailov et al., arXiv 1803.05407)."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from glalm.compat.export import export_checkpoints, require_new_folder
from glalm.config.run import DATA_RECORD, RUN_RECORD, Weights, describe_differences
from glalm.config.strict import RunError, flatten_tree
from glalm.data.files import read_json
from glalm.data.shards import MANIFEST_SHAPE
from glalm.train.checkpoint import read_metadata
from glalm.train.run_dir import find_checkpoint


def merge_checkpoints(
    runs: Sequence[Path],
    names: Sequence[str],
    out: Path,
    shares: Sequence[float] | None = None,
    mixers: Iterable[str] = (),
    weights: Weights = "current",
) -> None:
    """Write the average of checkpoints to the new folder `out`, as `glalm export` writes one checkpoint.

    Sums are in float32, and one tensor of one checkpoint is read at a time.

    Args:
        runs: The folders of the runs.
        names: The checkpoints of each run: latest or step_N.
        shares: Positive, one for each checkpoint, run by run. They are divided by their sum. None: all are equal.
        mixers, weights: As of `export_checkpoints`.

    Raises:
        RunError: A checkpoint does not exist, is damaged, or is named twice; only one is named; the runs have different
            models or tokenizers, or were trained independently; or the shares do not fit.
    """
    require_new_folder(out)
    paths = [find_checkpoint(run.resolve() / "checkpoints", name) for run in runs for name in names]
    if len(paths) < 2 or len(set(map(Path.resolve, paths))) < len(paths):
        listed = ", ".join(map(str, paths))
        raise RunError(f"A merge needs two different checkpoints or more, but these are named: {listed}. Add --steps")
    shares = [1.0] * len(paths) if shares is None else shares
    if len(shares) != len(paths):
        raise RunError(f"--shares has {len(shares)} numbers for {len(paths)} checkpoints. Write one for each")
    if not all(0 < share < math.inf for share in shares):
        raise RunError(f"--shares {' '.join(map(str, shares))}: every share must be positive")
    first, *others = dict.fromkeys(path.parents[1] for path in paths)
    expected = describe_model(first)
    for run in others:
        if differences := describe_differences(expected, describe_model(run)):
            lines = "\n  ".join(differences)
            raise RunError(f"{first} and {run} have different models, which cannot be averaged:\n  {lines}")
    refuse_independent_runs(paths)
    parts = [share / max(shares) for share in shares]  # The sum of large numbers would overflow.
    normalized = {path: part / sum(parts) for path, part in zip(paths, parts, strict=True)}
    export_checkpoints(normalized, out, mixers, weights)


def describe_model(run: Path) -> dict:
    """Return the config of a run's model, and the fingerprint of its tokenizer, by dotted key."""
    config = read_json(run / RUN_RECORD, {"config": {"model": dict}})["config"]
    tokenizer = read_json(run / DATA_RECORD, MANIFEST_SHAPE)["tokenizer"]["fingerprint"]
    return flatten_tree({"model": config["model"]}) | {"tokenizer": tokenizer}


def refuse_independent_runs(checkpoints: Iterable[Path]) -> None:
    """Raise RunError if several runs began with random weights. Even of one seed, their average is worse than each."""
    runs: dict[str, Path] = {}
    for path in checkpoints:
        run = path.parents[1]
        config = read_json(run / RUN_RECORD, {"config": {"train": dict}})["config"]
        metadata = read_metadata(path)
        if config["train"]["init_from"] is None and metadata["resumed_from"] is None:
            runs.setdefault(metadata["run"], run)
    if len(runs) > 1:
        raise RunError(
            "These runs were trained independently, so the average of their checkpoints is useless: "
            f"{', '.join(map(str, runs.values()))}. Merge checkpoints of one run, or of runs that continue from one "
            "checkpoint (train.resume_from or train.init_from)"
        )
