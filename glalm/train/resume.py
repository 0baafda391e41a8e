"""Where a run goes on from: its own newest checkpoint, or one that is named."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from glalm import config as configs
from glalm.config import RunConfig
from glalm.strict import ConfigError, require, unknown
from glalm.train import checkpoint
from glalm.train.checkpoint import CheckpointError
from glalm.train.together import place, together


def check_same(config: RunConfig, saved: Mapping, now: Mapping, where: Path) -> None:
    """ConfigError, with the differences, when the identity `saved` in `where` is not that of `now`.

    What config.train.allow_changes names may differ.
    """
    keys, allowed = saved.keys() | now.keys(), set()
    for name in config.train.allow_changes:  # data.weights: every source's
        named = {key for key in keys if key == name or key.startswith(f"{name}.")}
        require(bool(named), f"train.allow_changes: {unknown(name, now)}")
        allowed |= named
    changes = configs.compare(*({k: v for k, v in identity.items() if k not in allowed} for identity in (saved, now)))
    if changes:
        keys = ",".join(change.partition(":")[0] for change in changes)
        raise ConfigError(
            f"{where} holds a run with another config:\n  "
            + "\n  ".join(changes)
            + "\nTo resume it, write the old values; to train anew, choose another name=...; to go on with the new "
            f"ones all the same, write 'train.allow_changes=[{keys}]'"
        )


def find_origin(config: RunConfig, identity: Mapping) -> Path | None:
    """The checkpoint that the run goes on from, every file of it verified; None when it begins anew.

    That is its newest whole one; or train.resume_from, which must be whole, and of a run with the same identity. An
    explicit one is taken once: the checkpoints after it say that they come from it, and the same command goes on from
    them. Newer ones that do not are set aside. Raises ConfigError where it is of a step beyond the run's last.
    """
    saves, wanted = config.folder / "checkpoints", config.train.resume_from
    path = checkpoint.newest_whole(saves, say=_warn)
    explicit = bool(wanted) and (path is None or provenance(path) != wanted)
    if explicit:
        path = Path(wanted)
        try:
            checkpoint.find(path.parent, path.name)
        except CheckpointError as error:
            raise ConfigError(f"train.resume_from={wanted}: {error}") from error
        together(lambda: checkpoint.verify(path, *place()))
        check_same(config, checkpoint.read_state(path).get("identity", {}), identity, path)
    if path is None:
        return None
    step = checkpoint.read_state(path)["step"]
    require(step <= config.steps, f"{path} is beyond the run's last step, {config.steps}; write a larger train.steps")
    if explicit:
        together(lambda: _set_newer_aside(saves, step) if place()[0] == 0 else None)
    return path


def provenance(path: Path) -> str | None:
    """The train.resume_from that a checkpoint's run began with."""
    return checkpoint.read_state(path).get("resumed_from")


def restore(
    origin: Path | None,
    config: RunConfig,
    run_id: str,
    model: PreTrainedModel,
    optimizers: Iterable[Optimizer],
    extra: Mapping[str, torch.Tensor],
) -> tuple[int, list[dict]]:
    """Loads a verified checkpoint, if there is one, into all of these, in place, and this process's generators.

    Returns its step, or 0, and those metrics of the run `run_id` that were not on the disk when it was made.
    """
    if origin is None:
        return 0, []
    state = checkpoint.load(origin, model, optimizers, extra, verified=True)
    checkpoint.load_generators(origin, config.seed)
    return state["step"], state["unwritten"] if state["run"] == run_id else []


def _set_newer_aside(saves: Path, step: int) -> None:
    for newer in checkpoint.after(saves, step):
        _warn(f"{newer} is set aside as {checkpoint.set_aside(newer, 'superseded').name}")


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
