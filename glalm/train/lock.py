"""A run's directory: that no other run writes to it, and that its filesystem can hold checkpoints."""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from glalm.config.strict import ConfigError
from glalm.data.files import fsync_path
from glalm.train.collectives import gather_or_raise, rank_and_world_size

LOCK = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Makes `folder` this run's alone while entered: the first of its processes holds it for all.

    Raises ConfigError, on that process, when another run has it or its filesystem cannot hold checkpoints; on the
    others a RunError.
    """

    def claim() -> None:
        if rank_and_world_size()[0] == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(sole_run(folder))
            except OSError as error:
                raise ConfigError(
                    f"{folder} cannot be written to ({error}); make room, or choose another runs_dir=..."
                ) from error
            check_filesystem(folder)

    with ExitStack() as stack:
        gather_or_raise(claim)
        gather_or_raise(lambda: check_shared(folder))
        yield


def check_shared(folder: Path) -> None:
    if not (folder / LOCK).exists():
        raise ConfigError(f"{folder} is not the same directory on all machines; choose a shared runs_dir=...")


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Holds `folder`, an existing directory, against other runs; ConfigError, naming the one that has it; OSError
    where it cannot be written to.

    The kernel lets go when the process ends, however it ends: no stale lock is left. On NFS (Linux, version 3 with
    lockd or 4) it holds across machines; a mount with `nolock` or `local_lock=flock` only within one.
    """
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"{folder} is in use by {_spell(file.read())}; wait for it, stop it, or choose another name=..."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{folder}: its filesystem has no locks ({error}); choose another runs_dir=..."
            ) from error
        file.truncate(0)
        os.write(file.fileno(), json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        yield


def check_filesystem(folder: Path) -> None:
    """ConfigError when `folder` is where a checkpoint could not be completed: its folder must be synced and renamed."""
    probe, renamed = folder / ".probe.tmp", folder / ".probe"
    for leftover in (probe, renamed):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        probe.mkdir()
        (probe / "file").write_bytes(b"whole")
        fsync_path(probe)
        probe.rename(renamed)
        if probe.exists() or (renamed / "file").read_bytes() != b"whole":
            raise OSError("a renamed directory is not what it was")
    except OSError as error:
        raise ConfigError(
            f"{folder}: its filesystem cannot sync and rename a directory ({error}), so no checkpoint could be "
            "completed there; choose a runs_dir=... on a local disk, NFS or Lustre"
        ) from error
    finally:
        for leftover in (probe, renamed):
            shutil.rmtree(leftover, ignore_errors=True)


def _spell(content: str) -> str:
    try:
        holder = json.loads(content)
        return f"another run: process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another run"
