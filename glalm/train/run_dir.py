"""The directory of a run: lock it, check whose run it holds, find the checkpoint to resume from, and record the run.

runs/NAME/
    .lock           held by the process that trains
    run.json        id, config, identity (what decides the result), versions, and the newest step that was saved
    data.json       manifest of the data as it was when the run began
    metrics.jsonl
    checkpoints/step_N/

A damaged file is written again from the checkpoints or the data, where they have the same content. A run whose records
show that it saved checkpoints is refused while none of them can be found: they may be on a disk that is not mounted.
"""

import dataclasses
import itertools
import logging
import os
import threading
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from glalm.config.run import DATA_RECORD, RUN_RECORD, STAGE_ORDER, RunConfig, describe_differences, run_identity
from glalm.config.saved_run import describe_missing_run
from glalm.config.strict import ConfigError, describe_unknown_key, require
from glalm.data.files import (
    DamagedFile,
    atomic_write,
    find_mismatch,
    fsync_path,
    read_json,
    remove_entry,
    write_json,
)
from glalm.data.loader import Windows
from glalm.data.shards import MANIFEST_SHAPE, TokenSet, select_manifest
from glalm.train.checkpoint import (
    CheckpointError,
    UnreadableCheckpoint,
    latest_checkpoint,
    list_checkpoints,
    load_train_state,
    read_metadata,
    verify_checkpoint,
)
from glalm.train.collectives import gather_or_raise, rank_and_world_size, run_on_rank_0
from glalm.train.environment import describe_environment
from glalm.train.metrics import read_metrics
from glalm.train.run_lock import LOCK, RunLock, lock_run_dir
from glalm.train.state import TrainState
from glalm.train.training_data import TrainingData

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
RECORD_SHAPE = {"id": str, "identity": dict}
DATA_TOKENS = "data tokens"  # an entry of the identity: a dataset keeps its fingerprint when tokens are added
_RECORD_LOCK = threading.Lock()  # The thread that saves checkpoints also writes run.json.

# ------------------------------------------------------------------------------------------------------------ Opening


@contextmanager
def open_run_dir(folder: Path) -> Iterator[RunLock | None]:
    """Create `folder` if needed and reserve it for this run until the context ends.

    Rank 0 holds the lock for all, and gets it from the context.

    Raises:
        ConfigError: Another run uses `folder`, its checkpoints are missing, or its filesystem cannot hold checkpoints.
            Other ranks get a RunError.
    """
    checkpoints = folder / CHECKPOINTS

    def claim_folder() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            locks.append(stack.enter_context(lock_run_dir(folder)))
        except (OSError, DamagedFile) as error:
            advice = "Free some space, or choose another runs_dir=... or name=..."
            raise ConfigError(f"{folder} cannot be written to ({error}). {advice}") from error
        refuse_missing_checkpoints(folder)
        try:
            checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            advice = "Move it away, or choose another name=..."
            raise ConfigError(f"{checkpoints} cannot be a folder of checkpoints ({error}). {advice}") from error
        check_filesystem(checkpoints)

    locks: list[RunLock] = []
    with ExitStack() as stack:
        run_on_rank_0(claim_folder)
        not_shared = f"{folder} is not the same directory on all machines. Choose a shared runs_dir=..."
        gather_or_raise(lambda: require((folder / LOCK).exists(), not_shared))
        yield locks[0] if locks else None


def refuse_missing_checkpoints(folder: Path) -> None:
    """Raise ConfigError if the run in `folder` has saved checkpoints, or trained, and they cannot be found."""
    checkpoints = folder / CHECKPOINTS
    trained_step = last_trained_step(folder)
    saved = None
    with suppress(FileNotFoundError, DamagedFile):  # `read_saved_record` handles damage.
        saved = read_json(folder / RUN_RECORD).get("saved")
    if checkpoints.is_symlink() and not checkpoints.exists():
        missing = f"{checkpoints} is a link to {os.readlink(checkpoints)}, which is not there"
    elif saved is not None and not (checkpoints.is_dir() and _has_checkpoints(checkpoints)):
        missing = f"{folder / RUN_RECORD} records that step {saved} was saved, but {checkpoints} has no checkpoint"
    elif not checkpoints.exists() and trained_step:
        missing = f"{folder / METRICS} has rows up to step {trained_step}, but {checkpoints} does not exist"
    else:
        return
    raise ConfigError(
        f"{missing}. Perhaps a disk is not mounted, or the checkpoints were moved: bring them back, then run the same "
        f"command. To train from the start instead, choose another name=... or remove {folder}."
    )


def _has_checkpoints(folder: Path) -> bool:
    """Return whether there is a checkpoint, or one that was set aside. Raises ConfigError if that is unknown."""
    try:
        return any(name.startswith("step_") for name in os.listdir(folder))
    except OSError as error:
        raise ConfigError(f"The checkpoints in {folder} cannot be listed: {error.strerror}") from error


def check_filesystem(folder: Path) -> None:
    """Raise ConfigError if directories in `folder` cannot be synced and renamed, which every checkpoint needs."""
    trial = folder / ".probe.tmp"
    probe = trial / "probe"
    renamed = trial / "renamed"
    try:
        remove_entry(trial)
        probe.mkdir(parents=True)
        (probe / "file").write_bytes(b"content")
        fsync_path(probe)
        probe.rename(renamed)
        if probe.exists() or (renamed / "file").read_bytes() != b"content":
            raise OSError("the renamed directory has other files than before")
        remove_entry(trial)
    except OSError as error:
        raise ConfigError(
            f"The filesystem of {folder} cannot sync and rename a directory ({error}), so no checkpoint can be "
            "completed there. Choose a runs_dir=... on a local disk, NFS or Lustre."
        ) from error


# --------------------------------------------------------------------------------------------------------------- Data


def open_data(config: RunConfig) -> tuple[TrainingData, Windows]:
    """Return the training data of all phases, and the validation windows. Set model.vocab_size if it is null.

    If the dataset has grown since the run began, the windows are those of the data as it was then.

    Raises:
        ConfigError: The data is missing or damaged, or does not fit the weights, the lengths of windows or the model's
            vocabulary.
    """
    reset = config.data.document_boundaries == "reset_state"
    # Rank 0 reads the manifests for all ranks, because the dataset may grow between two reads.
    own = run_on_rank_0(lambda: read_data_record(config.data_record) if has_started(config.folder) else None)
    # A run that starts from the checkpoint of another reads what that run read, unless its data may differ.
    resumed_from = None if DATA_TOKENS in config.train.allow_changes else resolve_resume_path(config)
    origin_record = None if resumed_from is None else Path(resumed_from).parent.parent / DATA_RECORD
    origin = run_on_rank_0(lambda: read_data_record(origin_record))
    try:
        manifest = own or run_on_rank_0(lambda: select_manifest(Path(config.data.path), origin))
        training = TrainingData(config, TokenSet(config.data.path, "train", manifest))
        validation = Windows(TokenSet(config.data.path, "validation", manifest), config.data.seq_len, reset)
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.path={config.data.path}: {error}") from error
    vocabulary = training.tokens.vocab_size
    if config.model.vocab_size is None:
        config.model.vocab_size = vocabulary
    require(
        vocabulary <= config.model.vocab_size,
        f"The vocabulary of {config.data.path} has {vocabulary} tokens, more than model.vocab_size="
        f"{config.model.vocab_size}. Write model.vocab_size={vocabulary}, or null for that of the data.",
    )
    return training, validation


def read_data_record(path: Path | None) -> dict | None:
    """Return the data manifest that a run recorded, or None if there is none, or none that is undamaged.

    The current manifest then takes its place. The run's identity shows whether that has other data.
    """
    if path is None:
        return None
    try:
        return read_json(path, MANIFEST_SHAPE)
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        logger.warning(f"{error}. The manifest in the data's folder is used instead.")
        return None


# ----------------------------------------------------------------------------------------------- Identity and records


def prepare_run_record(config: RunConfig, data: TokenSet, device: torch.device) -> dict:
    """Return the content of run.json, the same on all ranks, and remove what interrupted saves left.

    The run keeps the id that it got at its first start. Call `recorded_run` once little can refuse the run.

    Raises:
        ConfigError: The directory holds a run of another identity, and that run has started.
    """

    def prepare_on_rank_0() -> dict:
        identity = identify_run(config, data)
        run_id = uuid.uuid4().hex[:12]
        saved_step = None
        if saved := read_saved_record(config.folder):
            run_id = saved["id"]
            saved_step = saved.get("saved")
            if has_started(config.folder):
                check_identity(config, saved["identity"], identity, config.folder)
        remove_leftovers(config.folder / CHECKPOINTS)
        versions = describe_environment(device, config.train.float8)
        settings = {"config": dataclasses.asdict(config), "identity": identity}
        return {"id": run_id, "saved": saved_step, **settings, **versions}

    return run_on_rank_0(prepare_on_rank_0)


def identify_run(config: RunConfig, data: TokenSet) -> dict:
    """Return what decides the result of a run: its config's identity, and its data."""
    return run_identity(config) | {"data fingerprint": data.fingerprint, DATA_TOKENS: data.num_tokens}


def read_saved_record(folder: Path) -> dict | None:
    """Return the content of run.json, or None for a new run.

    If run.json is damaged, its id and identity are those of the newest checkpoint. None also stands for a damaged file
    of a run that has not started.

    Raises:
        ConfigError: run.json is damaged, and no checkpoint has its content.
    """
    try:
        return read_json(folder / RUN_RECORD, RECORD_SHAPE)
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        if not has_started(folder):
            return None
        for path in reversed(list_checkpoints(folder / CHECKPOINTS).values()):
            with suppress(CheckpointError):
                metadata = read_metadata(path)
                record = {"id": metadata.get("run"), "identity": metadata.get("identity")}
                if find_mismatch(record, RECORD_SHAPE) is None:
                    logger.warning(f"{error}. What it recorded is read from {path}.")
                    return record
        raise ConfigError(
            f"{error}, and no checkpoint in {folder / CHECKPOINTS} has a copy of it. To train from the start, choose "
            f"another name=... or remove {folder}."
        ) from error


def has_started(folder: Path) -> bool:
    """Return whether the run in `folder` has a checkpoint, or metrics of a step.

    If not, its records are of a start that failed at step 0, and the user may still correct the config.
    """
    checkpoints = folder / CHECKPOINTS
    return (checkpoints.is_dir() and _has_checkpoints(checkpoints)) or last_trained_step(folder) > 0


def last_trained_step(folder: Path) -> int:
    """Return the last step in the run's metrics, 0 if there is none.

    Raises:
        ConfigError: The metrics cannot be read.
    """
    try:
        rows, _ = read_metrics(folder / METRICS)
    except DamagedFile as error:
        raise ConfigError(f"{error}. Make it readable, or rename it to start another file.") from error
    return max((row["step"] for row in rows), default=0)


def check_identity(
    config: RunConfig, saved: Mapping, current: Mapping, where: Path, also_allowed: Collection[str] = ()
) -> None:
    """Compare the identity `saved` in `where` with the current one, except for what train.allow_changes names.

    `also_allowed` are further keys that may differ.

    Raises:
        ConfigError: They differ. The message lists the differences.
    """
    if changes := find_changes(config, saved, current, also_allowed):
        changed_keys = ",".join(change.partition(":")[0] for change in changes)
        differences = "\n  ".join(changes)
        raise ConfigError(
            f"{where} is of another config:\n  {differences}\n"
            "To resume that run, write the old values. To start a new run, choose another name=... To resume with the "
            f"new values all the same, write 'train.allow_changes=[{changed_keys}]'."
        )


def find_changes(config: RunConfig, saved: Mapping, current: Mapping, also_allowed: Collection[str] = ()) -> list[str]:
    """Return the lines "key: saved -> current" of what differs, except for what train.allow_changes names.

    Raises:
        ConfigError: train.allow_changes names no key of an identity.
    """
    keys = saved.keys() | current.keys()
    allowed = {*also_allowed}
    for name in config.train.allow_changes:
        # "data.weights" names the weights of all sources.
        named = {key for key in keys if key == name or key.startswith(f"{name}.")}
        if name in ("train", "train.stages"):
            named |= keys & {STAGE_ORDER}
        require(bool(named), f"train.allow_changes: {describe_unknown_key(name, current)}")
        allowed |= named
    return describe_differences(
        {key: value for key, value in saved.items() if key not in allowed},
        {key: value for key, value in current.items() if key not in allowed},
    )


def write_run_record(config: RunConfig, record: dict, data: TokenSet) -> None:
    """Write run.json and data.json, which fix the run's config and the shards that it reads. Call this on rank 0."""
    record["saved"] = max(list_checkpoints(config.folder / CHECKPOINTS), default=None)
    for path, content in ((config.folder / RUN_RECORD, record), (config.data_record, data.manifest)):
        if path.is_dir():  # A file would be replaced, whatever it holds.
            logger.warning(f"{path} is a folder. It is set aside as {set_aside(path, 'damaged').name}.")
        with _RECORD_LOCK:
            write_json(path, content, indent=1 if path.name == RUN_RECORD else None)


@contextmanager
def recorded_run(config: RunConfig, record: dict, data: TokenSet) -> Iterator[None]:
    """Write run.json and data.json on rank 0. If a ConfigError refuses the run before its first step, take them back.

    The next command of this name would otherwise take the refused values from run.json.
    """
    rank, _ = rank_and_world_size()
    paths = (config.folder / RUN_RECORD, config.data_record) if rank == 0 else ()
    previous = {path: path.read_bytes() if path.is_file() else None for path in paths}
    run_on_rank_0(lambda: write_run_record(config, record, data))
    try:
        yield
    except ConfigError:
        if not has_started(config.folder):
            for path, content in previous.items():
                if content is None:
                    path.unlink(missing_ok=True)
                else:
                    with atomic_write(path) as file:
                        file.write(content)
        raise


def record_saved_step(folder: Path, record: dict, step: int) -> None:
    """Write to run.json that the run has a checkpoint, so that the next start notices if it is gone."""
    record["saved"] = step
    with _RECORD_LOCK, suppress(OSError):  # On a full disk, the checkpoint is valid all the same.
        write_json(folder / RUN_RECORD, record, indent=1)


def check_run_dir(lock: RunLock | None, config: RunConfig, record: dict, data: TokenSet) -> bool:
    """Check, before anything is written, that the run's folder is still there and reserved for this run.

    A removed folder is created again, with its records, but not with its earlier metrics and checkpoints.

    Returns:
        Whether the folder had been removed, the same on all ranks. Save a checkpoint then.

    Raises:
        RunError: Another run has used the folder in the meantime.
    """

    def check_on_rank_0() -> bool:
        assert lock is not None  # Rank 0 has it.
        is_renewed = lock.renew()
        is_removed = not os.path.lexists(config.folder / RUN_RECORD)
        if is_removed:
            write_run_record(config, record, data)
            lost = "What it held is gone. The run continues, and saves a checkpoint now."
            logger.warning(f"{config.folder} was removed or emptied while the run was training. {lost}")
        elif is_renewed:
            logger.warning(f"{config.folder / LOCK} was removed while the run was training. It is locked again.")
        return is_removed

    return run_on_rank_0(check_on_rank_0)


def read_run_record(checkpoint: Path) -> dict | None:
    """Return run.json of the run that wrote a checkpoint, or None if the checkpoint was copied to another place.

    Raises:
        DamagedFile: run.json is damaged.
    """
    try:
        record = read_json(checkpoint.resolve().parent.parent / RUN_RECORD, RECORD_SHAPE | {"config": dict})
    except FileNotFoundError:
        return None
    return record if record["id"] == read_metadata(checkpoint).get("run") else None


# ---------------------------------------------------------------------------------------------------------- Resuming


def find_resume_checkpoint(config: RunConfig, record: Mapping) -> Path | None:
    """Return the verified checkpoint to resume from, or None to start from scratch, and tell `config` its tokens.

    That is the newest valid checkpoint of the run, or train.resume_from. The latter applies once: the checkpoints after
    it record where they come from, so the same command resumes from them. Newer ones that do not come from it are set
    aside.

    Args:
        record: The content of run.json.

    Raises:
        ConfigError: The checkpoint is of another config or beyond the last step, or train.resume_from does not exist or
            would replace another run.
    """
    path = newest_valid_checkpoint(config.folder / CHECKPOINTS)
    requested = resolve_resume_path(config)
    applies = requested is not None and (path is None or read_metadata(path).get("resumed_from") != requested)
    if requested is not None and applies:
        path = _find_requested_checkpoint(config.folder, Path(requested), path)
    if path is None:
        config.resume_at(step=0, tokens=0)
        return None
    metadata = read_metadata(path)
    # run.json was compared already, with what was allowed to change since. A copied checkpoint may be of any run.
    if applies or metadata.get("run") != record["id"]:
        saved = metadata.get("identity", {})
        future = find_future_keys(config, saved, record["identity"], metadata["step"])
        check_identity(config, saved, record["identity"], path, future)
    config.resume_at(metadata["step"], metadata["tokens"], metadata["milestones"])
    key = next((name for name in ("steps", "tokens") if getattr(config.train, name) is not None), None)
    advice = f"Choose a larger train.{key}." if key else "Give train.stages more tokens."
    require(metadata["step"] <= config.steps, f"{path} is beyond the run's last step, {config.steps}. {advice}")
    if applies:
        run_on_rank_0(lambda: _set_newer_aside(config.folder, path, metadata["step"]))
    else:
        run_on_rank_0(lambda: _warn_of_missing(path, record["saved"]))
    return path


def find_future_keys(config: RunConfig, saved: Mapping, current: Mapping, step: int) -> set[str]:
    """Return the keys of two identities that matter only after `step`: those of stages that have not begun.

    There are none if optim.schedule goes over the run, because the learning rate before `step` then depends on them.
    """
    begun = [name for name, steps in config.stage_steps.items() if steps.start <= step]
    begins_alike = str(saved.get(STAGE_ORDER)).split(", ")[: len(begun)] == begun
    if not config.has_stage_schedules or not begins_alike:
        return set()
    past = tuple(f"train.stages.{name}." for name in begun)
    keys = {key for key in saved.keys() | current.keys() if key.startswith("train.stages.")}
    return {STAGE_ORDER, *(key for key in keys if not key.startswith(past))}


def _warn_of_missing(path: Path, saved_step: int | None) -> None:
    """Print a warning if the newest checkpoint that run.json records is neither `path` nor set aside."""
    newest = path.with_name(f"step_{saved_step}")
    if newest != path and not any(newest.parent.glob(f"{newest.name}.*")) and saved_step is not None:
        logger.warning(f"{newest} was saved but is not there any more. The run resumes from {path.name}.")


def _find_requested_checkpoint(folder: Path, requested: Path, newest: Path | None) -> Path:
    """Return the checkpoint that train.resume_from names, verified by all ranks together.

    `newest` is the newest checkpoint of the run in `folder`, which does not come from the requested one.
    """
    is_own = requested.parent == (folder / CHECKPOINTS).resolve()
    require(
        is_own or newest is None,
        f"{folder} holds a run that does not come from train.resume_from={requested}. To start another run from there, "
        "choose another name=... To resume the run, remove train.resume_from.",
    )
    try:
        path = find_checkpoint(requested.parent, requested.name)
    except CheckpointError as error:
        raise ConfigError(f"train.resume_from={requested}: {error}") from error
    refuse_run_folder("train.resume_from", path)
    gather_or_raise(lambda: verify_checkpoint(path, *rank_and_world_size()))
    return path


def _set_newer_aside(folder: Path, resumed: Path, step: int) -> None:
    """Set aside what the run in `folder`, which resumes from the checkpoint `resumed` of `step`, has of later steps."""
    checkpoints = folder / CHECKPOINTS
    for newer, path in list_checkpoints(checkpoints).items():
        if newer > step:
            logger.warning(f"{path} is set aside as {set_aside(path, 'superseded').name}.")
    is_own = resumed.parent == checkpoints.resolve()
    if not is_own and os.path.lexists(folder / METRICS):
        # These rows are of an earlier start, which saved no checkpoint.
        set_aside(folder / METRICS, "superseded")


def resolve_resume_path(config: RunConfig) -> str | None:
    """Return train.resume_from as an absolute path without links, so that all spellings of it are equal."""
    return config.train.resume_from and os.path.realpath(config.train.resume_from)


def resume_run(checkpoint: Path, state: TrainState, seed: int, run_id: str) -> list[dict]:
    """Load a verified checkpoint into `state`.

    Returns:
        The rows that metrics.jsonl lacked when the checkpoint was saved; none if another run than `run_id` saved it.
    """
    metadata = load_train_state(checkpoint, state, seed)
    return metadata["unwritten"] if metadata.get("run") == run_id else []


def find_checkpoint(folder: Path, name: str) -> Path:
    """Return the checkpoint called `name`: "latest", or the name of a folder in `folder`.

    Raises:
        CheckpointError: It does not exist. The message lists those that do, or says that the run does not exist.
    """
    if folder.name == CHECKPOINTS and not folder.exists() and not (folder.parent / RUN_RECORD).exists():
        raise CheckpointError(describe_missing_run(folder.parent))
    path = latest_checkpoint(folder) if name == "latest" else folder / name
    leads_elsewhere = Path(name).name != name or not name.strip(".")
    if path is None or leads_elsewhere or not os.path.isdir(path):
        existing = ", ".join(path.name for path in list_checkpoints(folder).values()) or "none"
        raise CheckpointError(f"There is no checkpoint {name} in {folder}. Existing checkpoints: {existing}.")
    return path


def refuse_run_folder(key: str, folder: Path) -> None:
    """Raise ConfigError if the value of a key that names a checkpoint or a model is the folder of a run."""
    if not (folder / RUN_RECORD).is_file():
        return
    newest = latest_checkpoint(folder / CHECKPOINTS)
    advice = f"Write one of its checkpoints, such as {newest}" if newest else "It has no checkpoint yet"
    raise ConfigError(f"{key}={folder} is the folder of a run. {advice}")


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
            logger.warning(f"{'; '.join(damage)}. It is set aside as {aside.name}, and the previous one is tried.")
    return None


def _find_damage(path: Path, part: int, parts: int) -> str | None:
    """Return what `verify_checkpoint` finds. A file that cannot be read may be undamaged, so that error passes on."""
    try:
        verify_checkpoint(path, part, parts)
    except UnreadableCheckpoint:
        raise
    except CheckpointError as error:
        return str(error)
    return None


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves and removals left in checkpoints/."""
    for leftover in folder.glob(".step_*.tmp"):
        try:
            remove_entry(leftover)
        except OSError as error:
            logger.warning(f"{leftover} of an interrupted save cannot be removed: {error}")


def set_aside(path: Path, reason: str) -> Path:
    """Rename a checkpoint or another file to NAME.REASON, or NAME.REASON2 and so on. Return that path.

    No search for checkpoints finds it.
    """
    suffixes = itertools.chain([""], itertools.count(2))
    candidates = (path.with_name(f"{path.name}.{reason}{suffix}") for suffix in suffixes)
    return path.rename(next(candidate for candidate in candidates if not os.path.lexists(candidate)))
