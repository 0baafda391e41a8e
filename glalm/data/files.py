"""Files that survive crashes: written atomically, flushed to disk, locked, checked when they are read back."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from glalm.config.strict import RunError


class DamagedFile(RunError, ValueError):
    """A file that does not hold what was written to it, or cannot be read. The message names the file."""


class UnreadableFile(DamagedFile):
    """A file that the operating system does not let this process read. It may be undamaged."""


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the block ends, once its content is on disk.

    Raises:
        OSError: It cannot be written; the error names `path`. What was written is removed, and an older file remains.
    """
    try:
        with open(temporary_path(path), "wb") as file:
            yield file
            rename_into_place(file, path)
    except OSError as error:
        with suppress(OSError):
            temporary_path(path).unlink()  # It would fill the disk further.
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: Path, content: Any, **options) -> None:
    """Write `content` to `path` atomically. `options` are those of json.dumps."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, **options).encode())


def read_file(path: Path, last_bytes: int | None = None) -> bytes:
    """Return the content of a regular file, or of one that a link leads to.

    Args:
        last_bytes: At most so many bytes from the file's end; None for all.

    Raises:
        FileNotFoundError: Nothing has this name.
        DamagedFile: It is a folder, a link that leads nowhere, or another kind of file.
        UnreadableFile: The operating system refuses to read it.
    """
    if not os.path.exists(path):
        if os.path.islink(path):
            raise DamagedFile(f"{path} is a link to {os.readlink(path)}, which is not there")
        # `exists` is also false where a folder of the path must not be searched. Then opening the file says so.
    elif not os.path.isfile(path):
        # Opening a pipe would wait for a writer.
        raise DamagedFile(f"{path} is a folder or another kind of file, not a regular one")
    try:
        with Path(path).open("rb") as file:
            if last_bytes is not None:
                file.seek(max(os.fstat(file.fileno()).st_size - last_bytes, 0))
            return file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except OSError as error:
        raise UnreadableFile(f"{path} cannot be read: {error.strerror}") from error


def read_json(path: Path, shape: Any = dict) -> Any:
    """Return the content of a JSON file, after checking that it has a shape.

    Args:
        shape: A type, or a tuple of types. {"key": shape, ...}: an object with these keys, and perhaps others.
            {str: shape}: an object in which every value has the shape. [shape]: an array of which every item has it.
            {"a", "b"}: one of these values.

    Raises:
        FileNotFoundError: Nothing has this name.
        DamagedFile: It cannot be read, is not JSON, or has another shape.
    """
    content = read_file(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:  # Of a file that nests too deeply, json raises the latter.
        reason = f"it is not JSON ({error})" if content else "it is empty"
        raise DamagedFile(f"{path} is damaged: {reason}") from error
    if mismatch := find_mismatch(value, shape):
        raise DamagedFile(f"{path} is damaged: {mismatch}")
    return value


def find_mismatch(value: Any, shape: Any, where: str = "") -> str | None:
    """Return how `value` differs from `shape`, which is one of those of `read_json`, or None if it does not.

    Args:
        where: The keys that lead to the value: "splits.train.tokens".
    """
    name = where or "its content"
    parts = []
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is not a list"
        parts = [(f"{where}[{i}]", item, shape[0]) for i, item in enumerate(value)]
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{name} is not an object"
        shapes = dict.fromkeys(value, shape[str]) if str in shape else shape
        if missing := [key for key in shapes if key not in value]:
            return f"{name} has no {missing[0]!r}"
        parts = [(f"{where}.{key}".lstrip("."), value[key], item) for key, item in shapes.items()]
    elif isinstance(shape, set):
        if not (isinstance(value, str) and value in shape):
            return f"{name} is none of {', '.join(sorted(shape))}"
    elif not isinstance(value, shape) or (isinstance(value, bool) and shape is int):
        return f"{name} is of the wrong type, {type(value).__name__}"
    mismatches = (find_mismatch(part, item, part_where) for part_where, part, item in parts)
    return next(filter(None, mismatches), None)


def read_jsonl(path: Path, size: int | None = None) -> list[Any]:
    """Return the rows in the first `size` bytes of a JSON Lines file, or in all of it.

    A last line without its newline was cut short by a kill, and is skipped.

    Raises:
        FileNotFoundError: Nothing has this name.
        DamagedFile: It cannot be read, or another line is not JSON.
    """
    rows = []
    for number, line in enumerate(read_file(path)[:size].split(b"\n")[:-1], 1):
        try:
            if line:
                rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DamagedFile(f"{path} is damaged in line {number} ({error})") from error
    return rows


def encode_row(row: Any) -> bytes:
    """Return a line of JSON Lines, with its newline."""
    # A file's name may hold bytes that are not Unicode. Their backslash escapes are valid JSON.
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def printable(name: str | os.PathLike) -> str:
    """Return a name from a path as text for figures and pages: bytes are read as UTF-8 in every locale.

    What is not UTF-8, and control characters, become U+FFFD.
    """
    text = os.fspath(name).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


@contextmanager
def open_utf8_name(path: str | Path) -> Iterator[str]:
    """Give a file or folder a name in UTF-8 while the block runs, for libraries that accept no other names."""
    # Bytes that are not UTF-8 are lone surrogates in a str, which have no encoding.
    if os.fsencode(path) == str(path).encode(errors="replace"):
        yield str(path)
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        yield f"/dev/fd/{handle}"
    finally:
        os.close(handle)


def temporary_path(path: Path) -> Path:
    """Return the hidden name beside `path` under which its content is written before it is complete."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Make an empty folder under the `temporary_path` of `path`. The caller renames it, or it is removed at the end.

    What a killed process left under that name is removed first.

    Raises:
        BlockingIOError: Another process has the folder in use.
    """
    folder = temporary_path(path)
    with suppress(FileExistsError):  # Opening the lock says if it is a file.
        folder.parent.mkdir(parents=True)
    with hold_lock(folder.with_suffix(".lock")) as is_held:
        if not is_held:
            raise BlockingIOError(f"Another process is writing {folder}. Wait until it ends, or choose another name.")
        remove_entry(folder)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


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


def remove_entry(path: Path) -> None:
    """Remove what has this name, if anything: a folder with its content, a file, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def is_named(file: IO, path: Path) -> bool:
    """Return whether `path` still leads to an open file. A filesystem that does not answer is trusted.

    A lock is on the file, not on its name: if the name is removed, another process can lock a new file of that name.
    """
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError as error:
        return not isinstance(error, (FileNotFoundError, NotADirectoryError))


def try_lock(file: IO) -> bool:
    """Lock an open file against other processes. Return False if another process holds the lock.

    The kernel releases the lock when `file` is closed or the process ends, however it ends, so no stale lock remains.
    On NFS (Linux, version 3 with lockd, or version 4) the lock holds across machines if the file is open for writing,
    unless the mount has `nolock` or `local_lock=flock`. The lock of a folder would hold on this machine only.

    Raises:
        OSError: The filesystem does not support locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def hold_lock(path: Path) -> Iterator[bool]:
    """Lock `path`, a file that exists for this purpose, while the block runs. Yield False if another process holds it.

    Raises:
        OSError: The file cannot be created, or the filesystem does not support locks.
    """
    while True:
        with open(path, "a+") as file:
            is_held = try_lock(file)
            if is_held and not is_named(file, path):
                continue  # Its last holder has removed it.
            try:
                yield is_held
            finally:
                if is_held and is_named(file, path):
                    path.unlink(missing_ok=True)
            return
