"""Files that survive crashes: written atomically, flushed to disk, locked, and truncated back to a known size."""

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
    """Open a temporary file that replaces `path` when the block ends, once its content is on disk."""
    with open(temporary_path(path), "wb") as file:
        yield file
        rename_into_place(file, path)


def write_json(path: Path, content: Any, **options) -> None:
    """Write `content` to `path` atomically. `options` are those of json.dumps."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, **options).encode())


def read_jsonl(path: Path, size: int | None = None) -> list[Any]:
    """Return the rows in the first `size` bytes of a JSON Lines file, or in all of it.

    A last line without its newline was cut short by a kill, and is skipped.
    """
    return [json.loads(line) for line in path.read_bytes()[:size].split(b"\n")[:-1] if line]


def printable(name: str | os.PathLike) -> str:
    """Return a name from a path as text for figures and pages: bytes are read as UTF-8 in every locale.

    What is not UTF-8, and control characters, become U+FFFD.
    """
    text = os.fspath(name).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def temporary_path(path: Path) -> Path:
    """Return the hidden name beside `path` under which its content is written before it is complete."""
    return path.with_name(f".{path.name}.tmp")


def rename_into_place(file: IO[bytes], path: Path) -> None:
    """Close `file` and rename it to `path`. Its content reaches the disk before its name does."""
    flush_to_disk(file)
    file.close()
    os.replace(file.name, path)
    fsync_path(path.parent)


def flush_to_disk(file: IO[bytes]) -> int:
    """Flush `file` to disk, and return the position in it, which is its size in bytes after appending."""
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


def fsync_path(path: Path) -> None:
    """Flush the content of a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reopen_truncated(path: Path, size: int) -> IO[bytes]:
    """Open `path` to append after its first `size` bytes, and discard what follows them. Create it if `size` is 0.

    Raises:
        ValueError: The file is shorter than `size`, so bytes that were flushed to disk are lost.
    """
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise ValueError(f"{path} has {found} bytes, but {size} were flushed to it: the file is damaged or incomplete")
    file = open(path, "r+b" if size else "wb")  # noqa: SIM115 (the caller closes it)
    file.truncate(size)
    file.seek(size)
    return file


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as a hexadecimal string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def try_lock(file: IO | int) -> bool:
    """Lock an open file or folder against other processes. Return False if another process holds the lock.

    The kernel releases the lock when `file` is closed or the process ends, however it ends, so no stale lock remains.
    On NFS (Linux, version 3 with lockd, or version 4) the lock holds across machines, unless the mount has `nolock` or
    `local_lock=flock`.

    Raises:
        OSError: The filesystem does not support locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
