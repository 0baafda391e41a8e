"""Files that are whole or not there, and files that only grow and can be cut back."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when it is complete and on disk."""
    with open(temporary_path(path), "wb") as file:
        yield file
        rename_into_place(file, path)


def write_json(path: Path, content: Any, **options) -> None:
    """Whole or not at all. options: json.dumps'."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, **options).encode())


def read_jsonl(path: Path) -> list[Any]:
    """The rows of a file that is written line by line, less a last one that a kill cut short."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]


def rename_into_place(file: IO[bytes], path: Path) -> None:
    """Close `file`, and give it the name `path`: all of it is on disk, then its name is."""
    flush_to_disk(file)
    file.close()
    os.replace(file.name, path)
    fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Put on disk what is in a file, or which names are in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def reopen_truncated(path: Path, size: int) -> IO[bytes]:
    """The file `path`, cut back to its first `size` bytes, to be written on; new if size is 0.

    ValueError if it has fewer: they were on disk once, and are lost.
    """
    there = path.stat().st_size if path.exists() else 0
    if there < size:
        raise ValueError(
            f"{path}: {there} bytes are there and {size} were committed: a write was lost, or not all of the set was "
            "copied; prepare it anew (overwrite=True, --overwrite)"
        )
    file = open(path, "r+b" if size else "wb")  # noqa: SIM115 (it stays open)
    file.truncate(size)
    file.seek(size)
    return file


def flush_to_disk(file: IO[bytes]) -> int:
    """The size of `file`, all of which is on disk."""
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Holds `folder` against other processes; ValueError if one has it. A process that dies lets go."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"{folder}: another process is preparing this set; wait for it or end it") from None
    finally:
        os.close(handle)


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = f"{folder}: the disk is full; make room and run the same command again, it goes on from here"
        raise OSError(error.errno, advice) from error
