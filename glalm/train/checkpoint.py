"""Save checkpoints in the background, verify them, and load them into any number of processes.

    checkpoints/step_N/
        config.json           configuration of the model, as transformers writes it
        model.safetensors     parameters
        average.safetensors   with train.ema_decay, their moving average: "average.<parameter>"
        training.safetensors  "optim.<key>.<parameter>", "guard.<name>", "rng.<rank>.<generator>"
        state.json            step, tokens, number of processes, and the run's metadata (see CheckpointSaver.save)
        manifest.json         size and SHA-256 of each file above

If several processes save, each writes one part of the tensors: model-00002-of-00004.safetensors and so on.

A folder named step_N is complete. An interrupted save leaves .step_N.tmp, which the next start removes. A checkpoint
that is found damaged is renamed to step_N.damaged. No file is a pickle.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from pathlib import Path
from shlex import quote

import torch
from torch import distributed, nn
from torch.distributed import ProcessGroup

from glalm.config.run import CheckpointConfig, Weights
from glalm.data.checksums import combine_weights
from glalm.data.files import (
    DamagedFile,
    UnreadableFile,
    file_sha256,
    flush_to_disk,
    fsync_path,
    read_json,
    remove_entry,
)
from glalm.hf import GLALMConfig
from glalm.train import random_states, staging
from glalm.train.collectives import gather_or_raise, rank_and_world_size, run_on_rank_0
from glalm.train.staging import CheckpointError, SlicesByFile
from glalm.train.state import TrainState

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
Content = Iterable[bytes | memoryview]  # of a file, in chunks
WEIGHT_FILES: dict[Weights, str] = {"current": "model", "average": "average"}  # the kinds of files with weights
MAX_CONSECUTIVE_FAILURES = 3
SAVE_TIMEOUT = timedelta(hours=2)


class UnreadableCheckpoint(CheckpointError):
    """The operating system refuses to read a file of a checkpoint, which may be undamaged."""

    def __init__(self, checkpoint: Path, reason: str):
        super().__init__(
            f"{reason}. {checkpoint} may be undamaged, so make the file readable. To use an older checkpoint instead, "
            f"run: mv {quote(str(checkpoint))} {quote(f'{checkpoint}.damaged')}"
        )


def collect_tensors(state: TrainState) -> SlicesByFile:
    """Return the slices that this rank writes, by file. They are the live tensors, not copies."""
    rank, world_size = rank_and_world_size()
    live = state.state_dict()
    training = staging.slices_to_save(live["training"], rank, world_size)
    for name, tensor in live["random_states"].items():
        training[f"rng.{rank}.{name}"] = staging.local_slice(tensor)
    kinds = {"model": staging.slices_to_save(live["model"], rank, world_size), "training": training}
    if live["average"]:
        kinds["average"] = staging.slices_to_save(live["average"], rank, world_size)
    return {_part_names(kind, world_size)[rank]: slices for kind, slices in kinds.items()}


class CheckpointWriter:
    """Write and remove checkpoint folders.

    A test injects faults of the disk by a subclass, which it hands to CheckpointSaver.
    """

    def write_checkpoint(
        self, folder: Path, step: int, files: Mapping[str, Content], group: ProcessGroup | None
    ) -> None:
        """Write folder/step_N together with all other ranks.

        Every file is read back and compared before the folder gets its name. A failure on one rank raises on all ranks
        and leaves nothing behind.

        Args:
            files: The content of each file that this rank writes, in chunks.
            group: All ranks, over gloo.
        """
        target = folder / f"step_{step}"
        temporary = folder / f".step_{step}.tmp"

        def create_folder() -> None:
            remove_entry(temporary)
            temporary.mkdir(parents=True)

        def write_files() -> dict[str, dict]:
            entries = {name: self.write_file(temporary / name, chunks) for name, chunks in files.items()}
            for name, entry in entries.items():
                _compare_file(temporary / name, entry, "what was written to it")
            return entries

        def complete_folder() -> None:
            files: dict[str, dict] = {}
            for entries in entries_by_rank:
                files |= entries
            manifest = json.dumps({"format": 2, "files": dict(sorted(files.items()))}, indent=1)
            self.write_file(temporary / MANIFEST, [manifest.encode()])
            fsync_path(temporary)
            self.rename_folder(temporary, target)
            fsync_path(folder)
            fsync_path(folder.parent)  # `folder` itself may be new.

        try:
            run_on_rank_0(create_folder, group)
            entries_by_rank = gather_or_raise(write_files, group)
            run_on_rank_0(complete_folder, group)
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def write_file(self, path: Path, chunks: Content) -> dict:
        """Write a file to the disk and return its manifest entry: {"bytes": size, "sha256": checksum}.

        The checksum is that of `chunks`, not of the file, so reading the file back finds what the disk changed.
        """
        digest = hashlib.sha256()
        with open(path, "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            size = flush_to_disk(file)
            # Advise the kernel to drop the cached pages, so that reading back reads the disk.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return {"bytes": size, "sha256": digest.hexdigest()}

    def rename_folder(self, source: Path, target: Path) -> None:
        source.rename(target)

    def remove_folder(self, path: Path) -> None:
        """Remove a checkpoint. Rename it first: a kill between two files must not leave an incomplete step_N."""
        doomed = path.with_name(f".{path.name}.tmp")
        remove_entry(doomed)
        self.rename_folder(path, doomed)
        remove_entry(doomed)

    def prune_checkpoints(self, folder: Path, config: CheckpointConfig, stage_ends: Collection[int] = ()) -> None:
        """Remove all checkpoints except those that keep_last, keep_every and keep_best retain, or that end a stage."""
        checkpoints = list_checkpoints(folder)
        kept = {*list(checkpoints)[-config.keep_last :], *stage_ends}
        if config.keep_every:
            kept.update(step for step in checkpoints if step % config.keep_every == 0)
        losses = {}
        for step, path in checkpoints.items() if config.keep_best else ():
            with suppress(CheckpointError):  # A damaged checkpoint is reported when the run resumes.
                loss = read_metadata(path).get("val_loss")
                if loss is not None and math.isfinite(loss):
                    losses[step] = loss
        kept.update(sorted(losses, key=losses.__getitem__)[: config.keep_best])
        for step in checkpoints.keys() - kept:
            self.remove_folder(checkpoints[step])


class CheckpointSaver(AbstractContextManager):
    """Save training state to `folder` without blocking the training loop.

    `save` copies this rank's tensors to pinned host memory on the current CUDA stream, so the copy runs between two
    optimizer steps, and a background thread writes them. Only one save runs at a time: a second `save` waits for the
    first. Without host memory for the copy, the training waits until the checkpoint is written.

    A failed save is logged, removed from the disk, and counted in `failures`. After MAX_CONSECUTIVE_FAILURES in a row,
    the next call raises CheckpointError on every rank.

    All ranks must call every method in the same order. Leaving the context waits for the save in flight.

    Args:
        folder: The run's checkpoints/.
        config: How often to save, and what to keep.
        log: Receives warnings, on rank 0.
        on_heartbeat: Called every second while a method waits for a save, at most for SAVE_TIMEOUT.
        writer: The disk operations. Tests inject faults here.
        on_saved: Called on rank 0 with the step of each checkpoint that is complete, by the thread that writes it.
        stage_ends: The last steps of the run's stages, whose checkpoints are never removed.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        log: Callable[[str], None] = print,
        on_heartbeat: Callable[[], object] = lambda: None,
        writer: CheckpointWriter | None = None,
        on_saved: Callable[[int], object] = lambda step: None,
        stage_ends: Collection[int] = (),
    ):
        self.folder = folder
        self.config = config
        self.log = log
        self.on_heartbeat = on_heartbeat
        self.writer = writer or CheckpointWriter()
        self.on_saved = on_saved
        self.stage_ends = stage_ends
        self.failures = 0
        self._consecutive_errors: list[str] = []
        self._buffers = staging.HostBuffers()
        self._rank, self._world_size = rank_and_world_size()
        # The thread needs its own process group: its collectives must not interleave with those of the training step.
        self._group = distributed.new_group(backend="gloo", timeout=SAVE_TIMEOUT) if self._world_size > 1 else None
        # A new thread uses cuda:0, where every rank would open a context. Setting device -1 does nothing.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
        self._executor = ThreadPoolExecutor(1, "glalm-checkpoint", torch.cuda.set_device, (device,))
        # Start the thread now. A later save may find no memory for it.
        self._pending: Future = self._executor.submit(int)

    def __exit__(self, *_) -> None:
        self._wait_for_save()
        self._executor.shutdown()

    @property
    def in_flight(self) -> bool:
        """Whether a save is being written."""
        return not self._pending.done()

    def warm_up(self, state: TrainState) -> None:
        """Allocate the host memory in the background. Call this after the first step, when all tensors exist.

        Without it, the first save blocks the training for a second or more.
        """
        if self.config.asynchronous:
            self._pending = self._executor.submit(self._buffers.allocate, collect_tensors(state))

    def save(self, state: TrainState, metadata: Mapping) -> None:
        """Start to save `state` as step_N, where N is state.step.

        Args:
            state: What to save. Training may change it as soon as this method returns.
            metadata: JSON values for state.json, such as the run's id and the validation loss, `val_loss`.

        Raises:
            CheckpointError: The last MAX_CONSECUTIVE_FAILURES saves failed.
        """
        self._wait_for_save(tolerated_failures=MAX_CONSECUTIVE_FAILURES - 1)
        tensors = collect_tensors(state)
        staged = self._stage_to_host(tensors, state.step) if self.config.asynchronous else None
        files: dict[str, Content] = {}
        for name, slices in (staged or tensors).items():
            files[name] = staging.encode_safetensors(slices)
        if self._rank == 0:
            content = {"step": state.step, "processes": self._world_size, "tokens": state.tokens, **metadata}
            files["config.json"] = [GLALMConfig.from_model_config(state.model.config).to_json_string().encode()]
            files["state.json"] = [json.dumps(content, indent=1).encode()]
        self._pending = self._executor.submit(self._write_checkpoint, state.step, files)
        if staged is None:
            self._wait_for_save()

    def finish(self) -> Path | None:
        """Wait for the save in flight and return the newest checkpoint.

        Raises:
            CheckpointError: The last save failed.
        """
        self._wait_for_save(tolerated_failures=0)
        self._prune_checkpoints()  # A killed process may have left what its last save should have removed.
        return latest_checkpoint(self.folder)

    def _wait_for_save(self, tolerated_failures: int | None = None) -> None:
        """Wait for the save in flight. Raise CheckpointError if too many failed in a row; None tolerates all."""
        # Seconds are counted, because time in which this process is stopped is not time that the save takes.
        seconds = 0
        while wait([self._pending], timeout=1.0).not_done:
            seconds += 1
            if seconds < SAVE_TIMEOUT.total_seconds():
                self.on_heartbeat()
        failed = len(self._consecutive_errors)
        if tolerated_failures is not None and failed > tolerated_failures:
            raise CheckpointError(
                f"The last checkpoint could not be saved ({failed} failed in a row); the newest complete one is "
                f"{latest_checkpoint(self.folder) or 'none'}. Error: {self._consecutive_errors[-1]}"
            )

    def _stage_to_host(self, tensors: SlicesByFile, step: int) -> SlicesByFile | None:
        """Queue a copy of the tensors to host memory. Return None if there is not enough of it."""
        try:
            return self._buffers.stage(tensors)
        except RuntimeError as error:  # PyTorch raises this when an allocation fails.
            self._buffers = staging.HostBuffers()  # Free the incomplete copy: the host needs the memory.
            reason = str(error).partition("\n")[0]  # The other lines are debugging hints.
            # self.log prints on rank 0 only.
            logger.warning(
                "rank %d has no host memory to copy step %d: %s; training waits until it is saved",
                self._rank,
                step,
                reason,
            )
            return None

    def _write_checkpoint(self, step: int, files: Mapping[str, Content]) -> None:
        try:
            self._buffers.synchronize()
            self.writer.write_checkpoint(self.folder, step, files, self._group)
            if self._rank == 0:
                self.on_saved(step)
            self._prune_checkpoints()
            self._consecutive_errors.clear()
        except Exception as error:  # An exception in the thread would reach no caller.
            self.failures += 1
            self._consecutive_errors.append(str(error))
            if self._rank == 0:
                self.log(f"warning: step {step} was not saved; earlier checkpoints are unaffected. Error: {error}")

    def _prune_checkpoints(self) -> None:
        try:
            if self._rank == 0:
                self.writer.prune_checkpoints(self.folder, self.config, self.stage_ends)
        except (OSError, CheckpointError) as error:  # This does not make the new checkpoint invalid.
            self.log(f"warning: an old checkpoint cannot be removed: {error}")


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints in `folder` by step, in ascending order. A folder that does not exist has none.

    Raises:
        CheckpointError: The folder cannot be listed, so its checkpoints are unknown.
    """
    try:
        paths = [path for path in folder.iterdir() if re.fullmatch(r"step_(0|[1-9][0-9]*)", path.name)]
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not folder.is_symlink():
            return {}
        raise CheckpointError(f"The checkpoints in {folder} cannot be listed: {error.strerror}") from error
    return dict(sorted((int(path.name.removeprefix("step_")), path) for path in paths))


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the highest step, unverified, or None."""
    return next(reversed(list_checkpoints(folder).values()), None)


def load_model(path: Path, model: nn.Module, weights: Weights = "current") -> dict:
    """Load the parameters of a verified checkpoint into `model` in place, and return the content of state.json.

    The model may be sharded differently than the one that was saved.

    Raises:
        CheckpointError: The checkpoint holds another model, or no average of its weights.
    """
    parameters = dict(model.named_parameters())
    staging.read_tensors(index_weights(path, parameters, weights), parameters)
    return read_metadata(path)


def index_weights(path: Path, names: Collection[str], weights: Weights) -> dict[str, staging.StoredTensor]:
    """Return the weights that a verified checkpoint stores, by parameter.

    Args:
        names: The names of the parameters.

    Raises:
        CheckpointError: The checkpoint holds another model, or no average of its weights.
    """
    stored = _index_tensors(path, WEIGHT_FILES[weights])
    if weights == "average":
        stored = {name.removeprefix("average."): entry for name, entry in stored.items()}
        if not stored:
            raise CheckpointError(f"{path} has no moving average. Runs with train.ema_decay=0.999, for example, do.")
    missing = sorted(set(names) - stored.keys())
    unexpected = sorted(stored.keys() - set(names))
    if missing or unexpected:
        raise CheckpointError(f"{path} holds another model: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return stored


def load_train_state(path: Path, state: TrainState, seed: int) -> dict:
    """Load a verified checkpoint into `state` in place, random states included, and return the content of state.json.

    Tensors of the guard that the checkpoint lacks, or has in another shape, keep their values. An average that it lacks
    begins with the loaded weights. If the number of ranks has changed, the random generators are seeded from `seed`,
    the step and the rank.

    Raises:
        CheckpointError: The checkpoint holds another model, or optimizer state of a parameter that is not trained now.
    """
    metadata = load_model(path, state.model)
    stored = _index_tensors(path, "training")
    try:
        state.allocate_optimizer_state({name: (entry.shape, entry.dtype) for name, entry in stored.items()})
    except KeyError as error:
        raise CheckpointError(f"{path} has optimizer state of {error.args[0]}, which is not trained now.") from error
    live = state.state_dict()["training"].items()
    fitting = {name: t for name, t in live if name in stored and stored[name].shape == tuple(t.shape)}
    staging.read_tensors(stored, fitting)
    if state.average is not None:
        if stored_average := _index_tensors(path, "average"):
            staging.read_tensors(stored_average, state.state_dict()["average"])
        else:
            state.average.restart()

    loaded = {"step": metadata["step"], "tokens": metadata["tokens"]}
    rank, world_size = rank_and_world_size()
    if metadata["processes"] == world_size:
        prefix = f"rng.{rank}."
        saved = {name: torch.empty(stored[name].shape, dtype=torch.uint8) for name in stored if name.startswith(prefix)}
        staging.read_tensors(stored, saved)
        loaded["random_states"] = {name.removeprefix(prefix): tensor for name, tensor in saved.items()}
    else:
        random_states.seed_random_states(seed, metadata["step"], rank)
    state.load_state_dict(loaded)
    return metadata


def read_metadata(path: Path) -> dict:
    """Return the content of state.json.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        return read_json(path / "state.json", {"step": int, "tokens": int, "processes": int})
    except (FileNotFoundError, DamagedFile) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {error}") from error


def verify_checkpoint(path: Path, part: int = 0, parts: int = 1) -> None:
    """Compare the files of a checkpoint with its manifest: all of them, or every `parts`-th one from number `part`.

    Raises:
        CheckpointError: A file is missing or differs. The message names it.
        UnreadableCheckpoint: A file cannot be read.
    """
    for name, entry in sorted(_read_manifest(path).items())[part::parts]:
        try:
            _compare_file(path / name, entry, f"the checksum in {path / MANIFEST}")
        except OSError as error:
            raise UnreadableCheckpoint(path, f"{path / name} cannot be read: {error.strerror}") from error


def weights_sha256(path: Path, weights: Weights = "current") -> str:
    """Return the checksum that identifies a checkpoint's weights: of their file, or of its parts' checksums."""
    return combine_weights(_read_manifest(path), WEIGHT_FILES[weights])


def _read_manifest(path: Path) -> dict[str, dict]:
    """Return {file name: {"bytes": size, "sha256": checksum}}.

    Raises:
        CheckpointError: The manifest is missing or damaged, or does not list all files of a checkpoint.
    """
    manifest = path / MANIFEST
    try:
        files = read_json(manifest, {"files": {str: {"bytes": int, "sha256": str}}})["files"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{manifest} is missing: {path} is not a complete checkpoint") from error
    except UnreadableFile as error:
        raise UnreadableCheckpoint(path, str(error)) from error
    except DamagedFile as error:
        raise CheckpointError(str(error)) from error
    expected = {"config.json", "state.json"}
    for kind in ("model", "training", "average"):
        parts = len(_select_files(files, kind))
        if parts or kind != "average":
            expected.update(_part_names(kind, parts or 1))
    if not expected <= files.keys():
        raise CheckpointError(f"{manifest} is damaged: it does not list all files of a checkpoint")
    return files


def _part_names(kind: str, parts: int) -> list[str]:
    """Return the names of the "model", "average" or "training" files that `parts` processes save, ordered by rank."""
    if parts == 1:
        return [f"{kind}.safetensors"]
    return [f"{kind}-{part:05d}-of-{parts:05d}.safetensors" for part in range(1, parts + 1)]


def _select_files(names: Iterable[str], kind: str) -> list[str]:
    """Return the names of the "model", "average" or "training" files of a checkpoint."""
    return [name for name in names if re.fullmatch(rf"{kind}(-[0-9]+-of-[0-9]+)?\.safetensors", name)]


def _compare_file(file: Path, entry: Mapping, expected: str) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
        raise CheckpointError(f"{file} is damaged: it differs from {expected}")


def _index_tensors(path: Path, kind: str) -> dict[str, staging.StoredTensor]:
    """Return the tensors in the "model", "average" or "training" files of a checkpoint."""
    return staging.index_safetensors(path / name for name in _select_files(_read_manifest(path), kind))
