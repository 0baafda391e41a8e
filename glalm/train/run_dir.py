"""The directory of a run: lock it, check whose run it holds, find the checkpoint to resume from, and record the run.

runs/NAME/
    .lock           held by the process that trains
    run.json        id, config, identity (what decides the result), versions
    data.json       manifest of the data as it was when the run began
    metrics.jsonl
    checkpoints/step_N/
"""

import dataclasses
import itertools
import json
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from glalm.config.run import DATA_RECORD, RunConfig, describe_differences, run_identity
from glalm.config.strict import ConfigError, describe_unknown_key, require
from glalm.data.files import fsync_path, try_lock, write_json
from glalm.data.loader import Windows
from glalm.data.order import check_weights
from glalm.data.shards import TokenSet, select_manifest
from glalm.train.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_train_state,
    read_metadata,
    verify_checkpoint,
)
from glalm.train.collectives import gather_or_raise, rank_and_world_size, run_on_rank_0
from glalm.train.environment import describe_environment
from glalm.train.metrics import read_metrics
from glalm.train.state import TrainState

LOCK = ".lock"
RUN_RECORD = "run.json"
DATA_TOKENS = "data tokens"  # an entry of the identity: a dataset keeps its fingerprint when tokens are added

# ------------------------------------------------------------------------------------------------------------ Opening


@contextmanager
def open_run_dir(folder: Path) -> Iterator[None]:
    """Create `folder` if needed and reserve it for this run until the context ends. Rank 0 holds the lock for all.

    Raises:
        ConfigError: Another run uses `folder`, or its filesystem cannot hold checkpoints. Other ranks get a RunError.
    """

    def claim_folder() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_run_dir(folder))
        except OSError as error:
            advice = "Free some space, or choose another runs_dir=..."
            raise ConfigError(f"{folder} cannot be written to ({error}). {advice}") from error
        check_filesystem(folder)

    def check_shared() -> None:
        if not (folder / LOCK).exists():
            raise ConfigError(f"{folder} is not the same directory on all machines. Choose a shared runs_dir=...")

    with ExitStack() as stack:
        run_on_rank_0(claim_folder)
        gather_or_raise(check_shared)
        yield


@contextmanager
def lock_run_dir(folder: Path) -> Iterator[None]:
    """Lock `folder`, which exists, against other runs.

    The kernel releases the lock when the process ends, however it ends, so no stale lock remains. On NFS (Linux,
    version 4, or version 3 with lockd) it holds across machines; with the mount option `nolock` or `local_lock=flock`,
    only within one.

    Raises:
        ConfigError: Another run holds the lock, or the filesystem has no locks.
        OSError: `folder` cannot be written to.
    """
    with open(folder / LOCK, "a+") as file:
        try:
            is_locked = try_lock(file)
        except OSError as error:
            message = f"The filesystem of {folder} does not support file locks ({error}). Choose another runs_dir=..."
            raise ConfigError(message) from error
        if not is_locked:
            file.seek(0)
            raise ConfigError(
                f"{folder} is in use by another run: {file.read()}. Wait for it, stop it, or choose another name=..."
            )
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def check_filesystem(folder: Path) -> None:
    """Raise ConfigError if directories in `folder` cannot be synced and renamed, which every checkpoint needs."""
    try:
        with TemporaryDirectory(dir=folder, prefix=".probe", ignore_cleanup_errors=True) as name:
            probe = Path(name) / "probe"
            renamed = Path(name) / "renamed"
            probe.mkdir()
            (probe / "file").write_bytes(b"content")
            fsync_path(probe)
            probe.rename(renamed)
            if probe.exists() or (renamed / "file").read_bytes() != b"content":
                raise OSError("the renamed directory has other files than before")
    except OSError as error:
        raise ConfigError(
            f"The filesystem of {folder} cannot sync and rename a directory ({error}), so no checkpoint can be "
            "completed there. Choose a runs_dir=... on a local disk, NFS or Lustre."
        ) from error


# --------------------------------------------------------------------------------------------------------------- Data


def open_data(config: RunConfig) -> tuple[Windows, Windows]:
    """Return the training and validation windows of config.data.

    If the dataset has grown since the run began, the windows are those of the data as it was then.

    Raises:
        ConfigError: The data is missing or damaged, or does not fit config.data.weights or the model's vocabulary.
    """
    reset = config.data.document_boundaries == "reset_state"
    try:
        # Rank 0 reads the manifest for all ranks, because the dataset may grow between two reads.
        manifest = run_on_rank_0(lambda: _choose_manifest(config))
        training, validation = (
            Windows(TokenSet(config.data.path, split, manifest), config.data.seq_len, reset)
            for split in ("train", "validation")
        )
        if config.data.weights is not None:
            check_weights(config.data.weights, training.source_windows)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"data.path={config.data.path}: {error}") from error
    vocabulary = training.tokens.vocab_size
    require(
        vocabulary <= config.model.vocab_size,
        f"The vocabulary of {config.data.path} has {vocabulary} tokens, more than model.vocab_size="
        f"{config.model.vocab_size}. Write model.vocab_size={vocabulary}.",
    )
    return training, validation


def _choose_manifest(config: RunConfig) -> dict:
    """Return the data manifest that this run recorded, or that the run which it forks recorded, or the current one."""
    if config.data_record.exists() and has_started(config.folder):
        return json.loads(config.data_record.read_text())
    recorded = None
    origin = resolve_resume_path(config)
    if origin and DATA_TOKENS not in config.train.allow_changes:
        record = Path(origin).parent.parent / DATA_RECORD
        recorded = json.loads(record.read_text()) if record.exists() else None
    return select_manifest(Path(config.data.path), recorded)


# ----------------------------------------------------------------------------------------------- Identity and records


def prepare_run_record(config: RunConfig, data: TokenSet) -> dict:
    """Return the content of run.json, the same on all ranks, and remove what interrupted saves left.

    The run keeps the id that it got at its first start. Call `write_run_record` once nothing can refuse the run.

    Raises:
        ConfigError: The directory holds a run of another identity, and that run has started.
    """

    def prepare_on_rank_0() -> dict:
        identity = run_identity(config)
        identity |= {"data fingerprint": data.fingerprint, DATA_TOKENS: data.num_tokens}
        run_id = uuid.uuid4().hex[:12]
        record = config.folder / RUN_RECORD
        if record.exists():
            saved = json.loads(record.read_text())
            run_id = saved["id"]
            if has_started(config.folder):
                check_identity(config, saved["identity"], identity, config.folder)
        remove_leftovers(config.folder / "checkpoints")
        versions = describe_environment(config.train.float8)
        return {"id": run_id, "config": dataclasses.asdict(config), "identity": identity, **versions}

    return run_on_rank_0(prepare_on_rank_0)


def has_started(folder: Path) -> bool:
    """Return whether the run in `folder` has a checkpoint, or metrics of a step.

    If not, its records are of a start that failed at step 0, and the user may still correct the config.
    """
    rows, _ = read_metrics(folder / "metrics.jsonl")
    return any(folder.glob("checkpoints/step_*")) or any(row["step"] for row in rows)


def check_identity(config: RunConfig, saved: Mapping, current: Mapping, where: Path) -> None:
    """Compare the identity `saved` in `where` with the current one, except for what train.allow_changes names.

    Raises:
        ConfigError: They differ. The message lists the differences.
    """
    keys = saved.keys() | current.keys()
    allowed = set()
    for name in config.train.allow_changes:
        # "data.weights" names the weights of all sources.
        named = {key for key in keys if key == name or key.startswith(f"{name}.")}
        require(bool(named), f"train.allow_changes: {describe_unknown_key(name, current)}")
        allowed |= named
    changes = describe_differences(
        {key: value for key, value in saved.items() if key not in allowed},
        {key: value for key, value in current.items() if key not in allowed},
    )
    if changes:
        changed_keys = ",".join(change.partition(":")[0] for change in changes)
        differences = "\n  ".join(changes)
        raise ConfigError(
            f"{where} holds a run with another config:\n  {differences}\n"
            "To resume that run, write the old values. To start a new run, choose another name=... To resume with the "
            f"new values all the same, write 'train.allow_changes=[{changed_keys}]'."
        )


def write_run_record(config: RunConfig, record: Mapping, data: TokenSet) -> None:
    """Write run.json and data.json, which fix the run's config and the shards that it reads."""

    def write_files() -> None:
        write_json(config.folder / RUN_RECORD, record, indent=1)
        write_json(config.data_record, data.manifest)

    run_on_rank_0(write_files)


def read_run_record(checkpoint: Path) -> dict | None:
    """Return run.json of the run that wrote a checkpoint, or None if the checkpoint was copied to another place."""
    file = checkpoint.resolve().parent.parent / RUN_RECORD
    record = json.loads(file.read_text()) if file.is_file() else None
    return record if record is not None and record["id"] == read_metadata(checkpoint)["run"] else None


# ---------------------------------------------------------------------------------------------------------- Resuming


def find_resume_checkpoint(config: RunConfig, record: Mapping) -> Path | None:
    """Return the verified checkpoint to resume from, or None to start from scratch.

    That is the newest valid checkpoint of the run, or train.resume_from. The latter applies once: the checkpoints after
    it record where they come from, so the same command resumes from them. Newer ones that do not come from it are set
    aside.

    Args:
        record: The content of run.json.

    Raises:
        ConfigError: The checkpoint is of another config or beyond the last step, or train.resume_from does not exist or
            would replace another run.
    """
    path = newest_valid_checkpoint(config.folder / "checkpoints")
    requested = resolve_resume_path(config)
    applies = requested is not None and (path is None or read_metadata(path).get("resumed_from") != requested)
    if applies:
        is_own = Path(requested).parent == (config.folder / "checkpoints").resolve()
        require(
            is_own or path is None,
            f"{config.folder} holds a run that does not come from train.resume_from={requested}. To start another run "
            "from there, choose another name=... To resume the run, remove train.resume_from.",
        )
        path = _find_requested_checkpoint(Path(requested))
    if path is None:
        return None
    metadata = read_metadata(path)
    # run.json was compared already, with what was allowed to change since. A copied checkpoint may be of any run.
    if applies or metadata.get("run") != record["id"]:
        check_identity(config, metadata.get("identity", {}), record["identity"], path)
    require(
        metadata["step"] <= config.steps,
        f"{path} is beyond the run's last step, {config.steps}. Choose a larger train.steps.",
    )
    if applies:
        run_on_rank_0(lambda: _set_newer_aside(config.folder, metadata["step"], is_own))
    return path


def _find_requested_checkpoint(requested: Path) -> Path:
    """Return the checkpoint that train.resume_from names, verified by all ranks together."""
    try:
        path = find_checkpoint(requested.parent, requested.name)
    except CheckpointError as error:
        raise ConfigError(f"train.resume_from={requested}: {error}") from error
    gather_or_raise(lambda: verify_checkpoint(path, *rank_and_world_size()))
    return path


def _set_newer_aside(folder: Path, step: int, is_own: bool) -> None:
    """Set the checkpoints after `step` aside, and if the run starts from another run's checkpoint, drop old metrics."""
    for newer, path in list_checkpoints(folder / "checkpoints").items():
        if newer > step:
            _print_warning(f"{path} is set aside as {set_aside(path, 'superseded').name}.")
    if not is_own:
        # These rows are of an earlier start, which saved no checkpoint.
        (folder / "metrics.jsonl").unlink(missing_ok=True)


def resolve_resume_path(config: RunConfig) -> str | None:
    """Return train.resume_from as an absolute path without links, so that all spellings of it are equal."""
    return config.train.resume_from and os.path.realpath(config.train.resume_from)


def resume_run(checkpoint: Path, state: TrainState, seed: int, run_id: str) -> list[dict]:
    """Load a verified checkpoint into `state`.

    Returns:
        The rows that metrics.jsonl lacked when the checkpoint was saved; none if another run than `run_id` saved it.
    """
    metadata = load_train_state(checkpoint, state, seed)
    return metadata["unwritten"] if metadata["run"] == run_id else []


def find_checkpoint(folder: Path, name: str) -> Path:
    """Return the checkpoint called `name`: "latest", or the name of a folder in `folder`.

    Raises:
        CheckpointError: It does not exist. The message lists those that do.
    """
    path = latest_checkpoint(folder) if name == "latest" else folder / name
    leads_elsewhere = Path(name).name != name or not name.strip(".")
    if path is None or leads_elsewhere or not path.is_dir():
        existing = ", ".join(path.name for path in list_checkpoints(folder).values()) or "none"
        raise CheckpointError(f"There is no checkpoint {name} in {folder}. Existing checkpoints: {existing}.")
    return path


def newest_valid_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint without damage, the same on all ranks, or None.

    Each rank verifies a part of the files. Damaged checkpoints are set aside, with a warning.
    """
    rank, world_size = rank_and_world_size()
    names = run_on_rank_0(lambda: [str(path) for path in reversed(list_checkpoints(folder).values())])
    for path in map(Path, names):
        damage = [found for found in gather_or_raise(partial(_find_damage, path, rank, world_size)) if found]
        if not damage:
            return path
        if rank == 0:
            aside = set_aside(path, "damaged")
            _print_warning(f"{'; '.join(damage)}. It is set aside as {aside.name}, and the previous one is tried.")
    return None


def _find_damage(path: Path, part: int, parts: int) -> str | None:
    """Return what `verify_checkpoint` finds. An OSError is not caught: a file that cannot be read may be undamaged."""
    try:
        verify_checkpoint(path, part, parts)
    except CheckpointError as error:
        return str(error)
    return None


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves and removals left in checkpoints/."""
    for leftover in folder.glob(".step_*.tmp"):
        shutil.rmtree(leftover)


def set_aside(path: Path, reason: str) -> Path:
    """Rename a checkpoint to step_N.REASON, or step_N.REASON2 and so on, which no search finds. Return that path."""
    suffixes = itertools.chain([""], itertools.count(2))
    candidates = (path.with_name(f"{path.name}.{reason}{suffix}") for suffix in suffixes)
    return path.rename(next(candidate for candidate in candidates if not candidate.exists()))


def _print_warning(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
