"""Where a run goes on from: its own newest checkpoint, or one that is named."""

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from glalm.config.run import RunConfig, describe_differences
from glalm.config.strict import ConfigError, describe_unknown_key, require
from glalm.train import checkpoint
from glalm.train.checkpoint import CheckpointError
from glalm.train.collectives import gather_or_raise, rank_and_world_size


def check_same(config: RunConfig, saved: Mapping, now: Mapping, where: Path) -> None:
    """ConfigError, with the differences, when the identity `saved` in `where` is not that of `now`.

    What config.train.allow_changes names may differ.
    """
    keys, allowed = saved.keys() | now.keys(), set()
    for name in config.train.allow_changes:  # data.weights: every source's
        named = {key for key in keys if key == name or key.startswith(f"{name}.")}
        require(bool(named), f"train.allow_changes: {describe_unknown_key(name, now)}")
        allowed |= named
    changes = describe_differences(
        *({k: v for k, v in identity.items() if k not in allowed} for identity in (saved, now))
    )
    if changes:
        keys = ",".join(change.partition(":")[0] for change in changes)
        raise ConfigError(
            f"{where} holds a run with another config:\n  "
            + "\n  ".join(changes)
            + "\nTo resume it, write the old values; to train anew, choose another name=...; to go on with the new "
            f"ones all the same, write 'train.allow_changes=[{keys}]'"
        )


def find_origin(config: RunConfig, record: Mapping) -> Path | None:
    """The checkpoint that the run with the content `record` of run.json goes on from, every file of it verified; None
    when it begins anew.

    That is its newest whole one; or train.resume_from, which must be whole. An explicit one is taken once: the
    checkpoints after it say that they come from it, and the same command goes on from them. Newer ones that do not are
    set aside. Raises ConfigError where it is of a step beyond the run's last, or of another run with another identity;
    and where an explicit one lies outside the folder of a run that has checkpoints of its own.
    """
    saves, wanted = config.folder / "checkpoints", named(config)
    path = checkpoint.newest_whole(saves, say=_warn)
    explicit = bool(wanted) and (path is None or provenance(path) != wanted)
    if explicit:
        inside = Path(wanted).parent == saves.resolve()
        require(
            inside or path is None,
            f"{config.folder} holds a run that does not come from train.resume_from={wanted}; to begin another one "
            "there, choose another name=...; to go on with this one, leave out train.resume_from",
        )
        path = Path(wanted)
        try:
            path = checkpoint.find(path.parent, path.name)
        except CheckpointError as error:
            raise ConfigError(f"train.resume_from={wanted}: {error}") from error
        gather_or_raise(lambda: checkpoint.verify(path, *rank_and_world_size()))
    if path is None:
        return None
    state = checkpoint.read_state(path)
    step = state["step"]
    # Of the run's own, run.json has the identity, and what was allowed to change since; a copied one may be any's.
    if explicit or state.get("run") != record["id"]:
        check_same(config, state.get("identity", {}), record["identity"], path)
    require(step <= config.steps, f"{path} is beyond the run's last step, {config.steps}; write a larger train.steps")
    if explicit:
        gather_or_raise(lambda: _supersede(config.folder, step, inside) if rank_and_world_size()[0] == 0 else None)
    return path


def named(config: RunConfig) -> str | None:
    """train.resume_from, the same however it is spelled."""
    return config.train.resume_from and os.path.realpath(config.train.resume_from)


def provenance(path: Path) -> str | None:
    """The train.resume_from, by its real path, that a checkpoint's run began with."""
    return checkpoint.read_state(path).get("resumed_from")


def restore(
    origin: Path | None,
    config: RunConfig,
    run_id: str,
    model: PreTrainedModel,
    optimizers: Iterable[Optimizer],
    extra: Mapping[str, torch.Tensor],
) -> tuple[int, int, list[dict]]:
    """Loads a verified checkpoint, if there is one, into all of these, in place, and this process's generators.

    Returns its step and tokens, or 0, and those metrics of the run `run_id` that were not on the disk when it was made.
    """
    if origin is None:
        return 0, 0, []
    state = checkpoint.load(origin, model, optimizers, extra, verified=True)
    checkpoint.load_generators(origin, config.seed)
    return state["step"], state["tokens"], state["unwritten"] if state["run"] == run_id else []


def _supersede(folder: Path, step: int, own: bool) -> None:
    """Makes room in a run's folder for what comes after `step`, of its own or of another run."""
    for newer in checkpoint.after(folder / "checkpoints", step):
        _warn(f"{newer} is set aside as {checkpoint.set_aside(newer, 'superseded').name}")
    if not own:  # rows before `step` would be of a start that came to no checkpoint
        (folder / "metrics.jsonl").unlink(missing_ok=True)


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
