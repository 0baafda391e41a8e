"""A prepared set as it grows: what is on disk can always be cut back to the last commit, and go on from there.

Open files carry names of their own and only grow; a commit writes down how long each of them is, together with the
place in the input, in one small file that is replaced as a whole. What a killed process wrote after its last commit
is cut off when the next one opens the set, so no document is lost or repeated, and the bytes do not tell.
"""

import json
import re
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from glalm.data.checksums import block_sums
from glalm.data.files import (
    atomic_write,
    file_sha256,
    flush_to_disk,
    rename_into_place,
    reopen_truncated,
    temporary_path,
    write_json,
)
from glalm.data.shards import SPLITS

JOURNAL = ".journal.json"
LOGS = ("inputs.jsonl", "skipped.jsonl")
COUNTS = ("documents", "tokens", "text_bytes")
HEADER = 128  # bytes: numpy pads the header of a one-dimensional array to this, whatever its length
MOST_SOURCES = 256
OPEN_FILES = 2 * len(SPLITS) * MOST_SOURCES + 512  # at once, at most; 512 for all that is not a shard


class ShardWriter:
    """Writes the documents of one source and split into the shards `folder`/00000.npy, ...

    A shard ends before it would hold more than `shard_tokens`; a longer document has a shard to itself.
    state: what `commit` returned for the same folder, to go on from there; None begins anew. Files that are not part
    of it are removed. paths in the state are relative to `root`.
    """

    def __init__(self, folder: Path, root: Path, dtype: str, shard_tokens: int, state: dict | None = None):
        self.folder, self.root, self.dtype, self.shard_tokens = folder, root, np.dtype(dtype), shard_tokens
        state = state or {"shards": [], "open": None}
        self.shards: list[dict] = list(state["shards"])
        self.open: dict[str, int] | None = state["open"] and dict(state["open"])
        folder.mkdir(parents=True, exist_ok=True)
        self._cut_back()

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append a document of `ids`, made of `text_bytes` bytes of text."""
        if self.open and self.open["tokens"] + len(ids) > self.shard_tokens:
            self.finish_shard()
        if not self.open:
            self.open = dict.fromkeys(COUNTS, 0)
            self._files = [_reopen(temporary_path(path), 0) for path in self._paths()]
            for file, dtype, length in self._headers():
                _write_header(file, dtype, length)
            self._files[1].write(np.int64(0))
        self.open["documents"] += 1
        self.open["tokens"] += len(ids)
        self.open["text_bytes"] += text_bytes
        self._files[0].write(np.ascontiguousarray(ids, dtype=self.dtype))
        self._files[1].write(np.int64(self.open["tokens"]))

    def commit(self) -> dict:
        """Put on disk what was written, and return the state to go on from."""
        if self.open:
            for file in self._files:
                flush_to_disk(file)
        return {"shards": list(self.shards), "open": self.open and dict(self.open)}

    def finish_shard(self) -> None:
        """Give the open shard, if there is one, its final name and its place in `shards`."""
        if not self.open:
            return
        for (file, dtype, length), path in zip(self._headers(), self._paths(), strict=True):
            file.seek(0)
            _write_header(file, dtype, length)
            rename_into_place(file, path)
        tokens, documents = self._paths()
        checksums = tokens.with_suffix(".crc32")
        with atomic_write(checksums) as file:
            file.write(np.concatenate([block_sums(tokens), block_sums(documents)]).tobytes())
        files = {"tokens": tokens, "documents": documents, "checksums": checksums}
        entries = {name: describe(path, self.root) for name, path in files.items()}
        self.shards.append({**self.open, "files": entries})
        self.open = None

    def _paths(self) -> tuple[Path, Path]:
        number = f"{len(self.shards):05d}"
        return self.folder / f"{number}.npy", self.folder / f"{number}.docs.npy"

    def _headers(self) -> list[tuple]:
        lengths = (self.open["tokens"], self.open["documents"] + 1)
        return list(zip(self._files, (self.dtype, np.dtype("int64")), lengths, strict=True))

    def _cut_back(self) -> None:
        open_paths = self._paths() if self.open else ()
        for path in open_paths:
            if path.exists():  # it was finished after the commit
                path.rename(temporary_path(path))
        kept = {self.root / file["file"] for shard in self.shards for file in shard["files"].values()}
        kept |= {temporary_path(path) for path in open_paths}
        for path in set(self.folder.iterdir()) - kept:
            path.unlink()
        if self.open:
            tokens, documents = self.open["tokens"], self.open["documents"]
            sizes = (HEADER + tokens * self.dtype.itemsize, HEADER + (documents + 1) * 8)
            self._files = [_reopen(temporary_path(p), size) for p, size in zip(open_paths, sizes, strict=True)]


class SetWriter:
    """All files of a set but its tokenizer. state: what the last commit wrote (see `last_commit`), or None.

    shard_tokens: of each split.
    """

    def __init__(self, out: Path, dtype: str, shard_tokens: Mapping[str, int], state: dict | None = None):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < OPEN_FILES:  # often 1,024, of what the process may have
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(OPEN_FILES, hard), hard))
        self.out, self.dtype, self.shard_tokens = out, dtype, shard_tokens
        state = state or {"cursor": [0, 0], "books": {}, "current": {}, "logs": {}, "splits": {}}
        self.cursor: list[int] = state["cursor"]  # the input that is read now, and the records of it that are done
        self.books: dict[str, dict] = state["books"]  # of each source: documents read, written, skipped by reason
        self.current: dict[str, int] = state["current"]  # the same of the input that is read now
        self._logs = {name: _reopen(out / name, state["logs"].get(name, 0)) for name in LOGS}
        self._writers: dict[tuple[str, str], ShardWriter] = {}
        self._folders: dict[str, str] = {}
        for split in SPLITS:
            self.out.joinpath(split).mkdir(exist_ok=True)
            for folder in self.out.joinpath(split).iterdir():  # sources that came up after the commit
                if folder.name not in map(folder_name, state["splits"].get(split, {})):
                    for path in folder.iterdir():
                        path.unlink()
                    folder.rmdir()
            for source, entry in state["splits"].get(split, {}).items():
                self._open(split, source, entry)

    def write(self, split: str, source: str, ids: np.ndarray, text_bytes: int) -> None:
        """Append a document, framed."""
        writer = self._writers.get((split, source)) or self._open(split, source)
        writer.add(ids, text_bytes)

    def count(self, source: str, written: int, skipped: list[str]) -> None:
        """Enter into the books of the source `written` documents, and one for each reason of `skipped`."""
        book = self.books.setdefault(source, {"read": 0, "written": 0, "skipped": {}})
        for counts in (book, self.current):
            counts["read"] = counts.get("read", 0) + written + len(skipped)
            counts["written"] = counts.get("written", 0) + written
        for reason in skipped:
            book["skipped"][reason] = book["skipped"].get(reason, 0) + 1

    def log(self, name: str, line: dict) -> None:
        # A name of a file may hold what is not Unicode; a backslash and its number are JSON too.
        self._logs[name].write(json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")

    def next_input(self) -> None:
        self.cursor, self.current = [self.cursor[0] + 1, 0], {}

    def commit(self) -> None:
        """From here on a process that is killed loses nothing of what was written so far."""
        splits: dict[str, dict] = {split: {} for split in SPLITS}
        for (split, source), writer in self._writers.items():
            splits[split][source] = writer.commit()
        logs = {name: flush_to_disk(file) for name, file in self._logs.items()}
        state = {"cursor": self.cursor, "books": self.books, "current": self.current, "logs": logs, "splits": splits}
        write_json(self.out / JOURNAL, state)

    def finish(self) -> None:
        """Close the open shards. After a commit, the set is what it will be."""
        for writer in self._writers.values():
            writer.finish_shard()

    def splits(self) -> dict[str, dict]:
        """What the manifest says of the splits: finished shards by source, and their sums."""
        splits = {}
        for split in SPLITS:
            shards = {source: w.shards for (s, source), w in self._writers.items() if s == split and w.shards}
            sources = {source: {**_sums(shards[source]), "shards": shards[source]} for source in sorted(shards)}
            splits[split] = {**_sums(sources.values()), "sources": sources}
        return splits

    def _open(self, split: str, source: str, state: dict | None = None) -> ShardWriter:
        folder = folder_name(source)
        if self._folders.setdefault(folder, source) != source:
            raise ValueError(f"sources {source!r} and {self._folders[folder]!r} would share a folder; rename one")
        if len(self._folders) > MOST_SOURCES:
            raise ValueError(f"more than {MOST_SOURCES} sources, {source!r} is one of them; is --source-field right?")
        place = self.out / split / folder
        writer = ShardWriter(place, self.out, self.dtype, self.shard_tokens[split], state)
        self._writers[split, source] = writer
        return writer


def last_commit(out: Path) -> dict | None:
    path = out / JOURNAL
    return json.loads(path.read_bytes()) if path.exists() else None


def state_of(manifest: dict) -> dict:
    """The state to go on from with a complete set, to add to it."""
    splits = {
        split: {source: {"shards": e["shards"], "open": None} for source, e in entry["sources"].items()}
        for split, entry in manifest["splits"].items()
    }
    logs = {name: entry["bytes"] for name, entry in manifest["logs"].items()}
    return {"cursor": [0, 0], "books": manifest["books"], "current": {}, "logs": logs, "splits": splits}


def _reopen(path: Path, size: int) -> IO[bytes]:
    try:
        return reopen_truncated(path, size)
    except ValueError as error:
        raise ValueError(f"{error}. To prepare the set again from its sources, use --overwrite.") from error


def folder_name(source: str) -> str:
    return re.sub(r"[^\w.-]+", "_", source).strip(".") or "_"


def describe(path: Path, root: Path) -> dict[str, Any]:
    return {"file": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _sums(entries) -> dict[str, int]:
    entries = list(entries)
    return {key: sum(entry[key] for entry in entries) for key in COUNTS}


def _write_header(file, dtype: np.dtype, length: int) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": (length,)})
