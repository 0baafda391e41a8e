"""The lock of a run's folder: two runs must not write to one."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from glalm.config.strict import ConfigError, RunError
from glalm.data.files import is_named, read_file, try_lock

LOCK = ".lock"


@contextmanager
def lock_run_dir(folder: Path, option: str = "name=...") -> Iterator["RunLock"]:
    """Lock `folder`, which exists, against other runs until the context ends. Raises what `RunLock.acquire` raises.

    `option` is what the user may set to choose another folder.
    """
    lock = RunLock(folder, option)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


class RunLock:
    """The lock of a run's folder against other runs.

    The kernel releases it when the process ends, however it ends, so no stale lock remains. On NFS (Linux, version 4,
    or version 3 with lockd) it holds across machines; with the mount option `nolock` or `local_lock=flock`, only within
    one.

    The kernel locks the file, not its name. If the name is removed or leads to another file, other runs can lock that
    one. `renew` notices this, so call it before everything that is written to the folder.
    """

    def __init__(self, folder: Path, option: str = "name=..."):
        self._path = folder / LOCK
        self._option = option
        self._holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}"
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Lock the folder, which exists.

        Raises:
            ConfigError: Another run holds the lock, or the filesystem has no locks.
            DamagedFile: The lock is not a regular file.
            OSError: The folder cannot be written to.
        """
        file = self._lock_file()
        while not is_named(file, self._path):  # Somebody removed the name between opening and locking.
            file.close()
            file = self._lock_file()
        file.truncate(0)
        os.write(file.fileno(), self._holder.encode())
        self._file = file

    def renew(self) -> bool:
        """Return whether the lock's name had been lost since the last call. The folder is then locked again.

        Raises:
            RunError: Another run has used the folder in the meantime, or it cannot be locked again.
        """
        assert self._file is not None  # It was acquired.
        if is_named(self._file, self._path):
            return False
        folder = self._path.parent
        stopped = "This run stops, because two runs must not write to one folder. What it has not saved is lost."
        try:
            folder.mkdir(parents=True, exist_ok=True)
            holder = ""
            with suppress(FileNotFoundError):
                holder = read_file(self._path).decode(errors="replace")
            if holder not in ("", self._holder):
                raise RunError(f"{self._path} was removed, and {folder} was used by another run: {holder}. {stopped}")
            self.acquire()
        except (OSError, ConfigError) as error:
            raise RunError(f"{self._path} was removed and cannot be locked again: {error} {stopped}") from error
        return True

    def release(self) -> None:
        assert self._file is not None  # It was acquired.
        self._file.close()

    def _lock_file(self) -> IO[str]:
        with suppress(FileNotFoundError):
            read_file(self._path)  # This refuses a pipe, which cannot be locked.
        file = open(self._path, "a+", errors="replace")  # noqa: SIM115 (`release` closes it)
        try:
            if try_lock(file):
                return file
        except OSError as error:
            file.close()
            folder = self._path.parent
            message = f"The filesystem of {folder} does not support file locks ({error}). Choose another runs_dir=..."
            raise ConfigError(message) from error
        file.seek(0)
        holder = file.read()
        file.close()
        raise ConfigError(
            f"{self._path.parent} is in use by another run: {holder}. Wait for it, stop it, or choose another "
            f"{self._option}"
        )
