"""The folder of a set in preparation: its lock, its journal, and which of the files in it belong to the set."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glalm.data.files import file_sha256, hold_lock, read_json
from glalm.data.shards import MANIFEST, PLAN, SPLITS
from glalm.prepare.input_files import Position

JOURNAL = ".journal.json"
LOCK = ".lock"
LOGS = ("inputs.jsonl", "skipped.jsonl")
SET_FILES = re.compile(
    rf"manifest\.json|tokenizer\.model|tokenizer/([\w.-]+/)?[\w.-]+|({'|'.join(map(re.escape, LOGS))})|lengths\.png"
    rf"|({'|'.join(SPLITS)})/([^/]+/)?\.?\d+(\.docs\.npy|\.npy|\.crc32)(\.tmp)?"
)


@contextmanager
def create_folder(folder: Path) -> Iterator[None]:
    """Create `folder` if needed. After an error, remove it again if it is new and nothing was written into it."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    created = folder.stat()
    try:
        yield
    except BaseException:
        with suppress(OSError):  # It is not empty, or not there.
            if is_new and os.path.samestat(created, folder.stat()):  # It has not been replaced in the meantime.
                folder.rmdir()
        raise


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to `folder`. Raises ValueError if one already does."""
    # A complete set in a folder that cannot be written to is only read.
    with hold_lock(folder / LOCK) if os.access(folder, os.W_OK) else nullcontext(True) as is_held:
        if not is_held:
            raise ValueError(f"{folder}: another process is working in this folder. Wait until it ends, or stop it.")
        yield


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Say in the error of a full disk that the same command resumes the preparation."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = f"{folder}: the disk is full. Free some space and run the same command again; it resumes from here."
        raise OSError(error.errno, advice) from error


def last_commit(out: Path) -> dict | None:
    """Return what `SetWriter.commit` wrote last, or None. Raises DamagedFile."""
    cursor = dict.fromkeys(asdict(Position()), int)
    shape = {"cursor": cursor, "books": dict, "current": dict, "logs": dict.fromkeys(LOGS, int), "splits": dict}
    try:
        return read_json(out / JOURNAL, shape)
    except FileNotFoundError:
        return None


def describe_file(path: Path, root: Path) -> dict[str, Any]:
    """Return the path below `root`, the size and the SHA-256 of a file, as the manifest lists it."""
    return {"file": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def list_set_files(out: Path) -> list[Path]:
    """Return the files of a set, complete or not, in `out`. Raises ValueError if there are other files."""
    found = []
    for path in out.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            continue
        name = path.relative_to(out).as_posix()
        if SET_FILES.fullmatch(name) or name in (PLAN, JOURNAL) or path.match(".*.tmp"):
            found.append(path)
        elif path.is_file() and not path.name.startswith("."):
            raise ValueError(f"{path} is not part of a prepared set. Choose another folder than {out} with --out.")
    return found


def remove_set(out: Path) -> None:
    """Remove a set, complete or not, from `out`. Raises ValueError, and removes nothing, if there are other files."""
    # The manifest and the plan go first, so that a kill in between leaves nothing that looks like a set.
    first = {MANIFEST: 0, PLAN: 1}
    for path in sorted(list_set_files(out), key=lambda path: first.get(path.name, 2)):
        path.unlink()
    for path in sorted(out.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
