"""Write a set so that an interrupted preparation resumes from its last commit, and leaves no trace in the result.

Unfinished files have temporary names and only grow. A commit records how long each of them is, together with the
position in the inputs, in one small journal that is replaced atomically. The next process truncates the files to these
lengths, so what a killed process wrote after its last commit is discarded and written again, and no
document is lost or duplicated.
"""

import hashlib
import os
import re
import resource
import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np

from glalm.data.checksums import block_sums
from glalm.data.files import (
    atomic_write,
    encode_row,
    flush_to_disk,
    rename_into_place,
    reopen_truncated,
    temporary_path,
    write_json,
)
from glalm.data.shards import FORMAT, MANIFEST, SPLITS, VERSION, count_leftover_tokens
from glalm.prepare.encode import EncodedBatch
from glalm.prepare.input_files import Input, Position, RecordBatch
from glalm.prepare.plan import Plan, count_written
from glalm.prepare.set_folder import JOURNAL, LOGS, describe_file, last_commit

# The journal's keys, which are part of the format on disk, stand for these attributes of SetWriter: "cursor" for
# `position`, "books" for `counts` (the documents of each source, as in the manifest), "current" for `_input_counts`.
# "logs" has the sizes of the logs, and "splits" the states of the shard writers.
EMPTY_STATE = {"cursor": asdict(Position()), "books": {}, "current": {}, "logs": {}, "splits": {}}
NO_DOCUMENTS = {"read": 0, "written": 0}
COUNTS = ("documents", "tokens", "text_bytes")
HEADER_BYTES = 128  # numpy pads the header of a one-dimensional array to this size, whatever its length.
MAX_SOURCES = 256
MAX_FOLDER_NAME = 200  # bytes; file systems limit them to 255
MAX_OPEN_FILES = 2 * len(SPLITS) * MAX_SOURCES + 512  # 512 are for everything that is not a shard.
MIN_HELD_OUT_SHARD = 2**16  # tokens
LEFTOVER_LENGTHS = tuple(2**i for i in range(8, 16))  # window lengths for which the manifest counts leftover tokens


class GrowingArray:
    """A one-dimensional .npy file that grows under a temporary name until it is finished.

    Args:
        path: The name of the finished file.
        length: The number of elements that were committed, to resume after them.

    Raises:
        ValueError: The file has fewer elements than were committed.
    """

    def __init__(self, path: Path, dtype: np.dtype, length: int = 0):
        self.path = path
        self.dtype = dtype
        self.length = length
        self._file = _reopen_or_advise(temporary_path(path), HEADER_BYTES + length * dtype.itemsize if length else 0)
        if not length:
            self._write_header()

    def append(self, values: np.ndarray | list[int]) -> None:
        """Append `values`, which are on disk after the next `flush`."""
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype))
        self.length += len(values)

    def flush(self) -> None:
        """Flush all elements to disk. The header still has an earlier length."""
        flush_to_disk(self._file)

    def finish(self) -> None:
        """Write the final length into the header, and give the file its name."""
        self._file.seek(0)
        self._write_header()
        rename_into_place(self._file, self.path)

    def _write_header(self) -> None:
        """Write the .npy header of an array of the current length at the current position in the file."""
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class ShardWriter:
    """Write the documents of one source and split into the shards `folder`/00000.npy, 00001.npy, ...

    A shard ends before it would exceed `shard_tokens`. A longer document has a shard to itself.

    Args:
        root: The folder of the set, to which the paths in the state are relative.
        state: What `commit` returned for this folder, to resume from it. Other files in the folder are removed.
    """

    def __init__(self, folder: Path, root: Path, dtype: str, shard_tokens: int, state: dict | None = None):
        self.folder = folder
        self.root = root
        self.dtype = np.dtype(dtype)
        self.shard_tokens = shard_tokens
        state = state or {"shards": [], "open": None}
        self.shards: list[dict] = list(state["shards"])
        self._counts: dict[str, int] | None = state["open"] and dict(state["open"])  # of the unfinished shard
        folder.mkdir(parents=True, exist_ok=True)
        committed = set()
        for shard in self.shards:
            committed |= {root / file["file"] for file in shard["files"].values()}
        for path in self._shard_paths() if self._counts else ():
            committed.add(temporary_path(path))
            if path.exists():  # The shard was finished after the commit.
                path.rename(temporary_path(path))
        for path in set(folder.iterdir()) - committed:
            path.unlink()
        if self._counts:
            self._open_arrays(self._counts["tokens"], self._counts["documents"] + 1)

    def add_document(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append a document of the token ids `ids`, whose text has `text_bytes` bytes."""
        if self._counts and self._counts["tokens"] + len(ids) > self.shard_tokens:
            self.finish_shard()
        if not self._counts:
            self._counts = dict.fromkeys(COUNTS, 0)
            self._open_arrays(0, 0)
            self._borders.append([0])
        self._counts["documents"] += 1
        self._counts["tokens"] += len(ids)
        self._counts["text_bytes"] += text_bytes
        self._tokens.append(ids)
        self._borders.append([self._counts["tokens"]])

    def commit(self) -> dict:
        """Flush everything to disk, and return the state from which another ShardWriter resumes."""
        if self._counts:
            self._tokens.flush()
            self._borders.flush()
        return {"shards": list(self.shards), "open": self._counts and dict(self._counts)}

    def finish_shard(self) -> None:
        """Complete the unfinished shard, if there is one, and add it to `shards`."""
        if not self._counts:
            return
        self._tokens.finish()
        self._borders.finish()
        tokens_path, borders_path = self._shard_paths()
        sums_path = tokens_path.with_suffix(".crc32")
        with atomic_write(sums_path) as file:
            file.write(np.concatenate([block_sums(tokens_path), block_sums(borders_path)]).tobytes())
        paths = {"tokens": tokens_path, "documents": borders_path, "checksums": sums_path}
        files = {name: describe_file(path, self.root) for name, path in paths.items()}
        self.shards.append({**self._counts, "files": files})
        self._counts = None

    def _shard_paths(self) -> tuple[Path, Path]:
        """Return the final names of the unfinished shard's tokens and document borders."""
        number = f"{len(self.shards):05d}"
        return self.folder / f"{number}.npy", self.folder / f"{number}.docs.npy"

    def _open_arrays(self, tokens: int, borders: int) -> None:
        """Open the unfinished shard's arrays after their first `tokens` and `borders` elements."""
        tokens_path, borders_path = self._shard_paths()
        self._tokens = GrowingArray(tokens_path, self.dtype, tokens)
        self._borders = GrowingArray(borders_path, np.dtype("int64"), borders)


class SetWriter:
    """Write all files of a set but its tokenizer, from the last commit on, or from the set that `plan` adds to.

    Attributes:
        position: Up to where the inputs are written.
        counts: For each source, the documents read, written, and skipped by reason.
        has_added: Whether this plan's preparation has written a document, now or before it was interrupted.
    """

    def __init__(self, out: Path, plan: Plan):
        self.out = out
        self._folder = os.stat(out)
        self.plan = plan
        state = last_commit(out) or plan.base or EMPTY_STATE
        self.position = Position(**state["cursor"])
        self.counts: dict[str, dict] = dict(state["books"])
        self._base_documents = count_written(plan.base["books"]) if plan.base else 0
        self._input_counts: dict[str, int] = state["current"] or dict(NO_DOCUMENTS)
        self._logs = {name: _reopen_or_advise(out / name, state["logs"].get(name, 0)) for name in LOGS}
        self._writers: dict[tuple[str, str], ShardWriter] = {}
        # The limit on open files is often 1,024.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < MAX_OPEN_FILES:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(MAX_OPEN_FILES, hard), hard))
        for split in SPLITS:
            sources = state["splits"].get(split, {})
            committed = set(map(folder_name, sources))
            self.out.joinpath(split).mkdir(exist_ok=True)
            for folder in self.out.joinpath(split).iterdir():
                if folder.name not in committed:
                    shutil.rmtree(folder)
            for source, shard_state in sources.items():
                self._open_writer(split, source, shard_state)

    @property
    def has_added(self) -> bool:
        return count_written(self.counts) > self._base_documents

    def add_batch(self, batch: RecordBatch, encoded: EncodedBatch, source_input: Input) -> None:
        """Append the documents of a batch, count them, and log the skipped records.

        Raises:
            ValueError: The batch is the last of an input that has changed since the plan was made.
        """
        start = 0
        for document in encoded.documents:
            stop = start + document.tokens
            writer = self._writers.get((document.split, document.source))
            writer = writer or self._open_writer(document.split, document.source)
            writer.add_document(encoded.ids[start:stop], document.text_bytes)
            start = stop
        counts = self.counts.setdefault(source_input.source, {"read": 0, "written": 0, "skipped": {}})
        skipped = counts["skipped"]
        for record in encoded.skipped:
            row = {"source": source_input.source, "name": source_input.name, "record": record.number}
            row |= {"reason": record.reason, "detail": record.detail[:200]}
            self._logs["skipped.jsonl"].write(encode_row(row))
            skipped[record.reason] = skipped.get(record.reason, 0) + 1
        for entry in (counts, self._input_counts):
            entry["read"] += len(encoded.documents) + len(encoded.skipped)
            entry["written"] += len(encoded.documents)
        self.position = self.position.after(batch)
        if self.position.input > batch.input_index:
            self._finish_input(source_input)

    def commit(self) -> None:
        """Flush all files to disk, and record their lengths in the journal, from which a later process resumes.

        Then update the manifest, which is still marked as incomplete. An addition that has written nothing leaves the
        manifest of the complete set.

        Raises:
            ValueError: The folder was removed or replaced, and another process may be preparing a set in the new one.
        """
        if not (self.out.exists() and os.path.samestat(self._folder, os.stat(self.out))):
            raise ValueError(f"{self.out} was removed while the set was being prepared. Run the same command again.")
        splits: dict[str, dict] = {split: {} for split in SPLITS}
        for (split, source), writer in self._writers.items():
            splits[split][source] = writer.commit()
        state = {
            "cursor": asdict(self.position),
            "books": self.counts,
            "current": self._input_counts,
            "logs": {name: flush_to_disk(file) for name, file in self._logs.items()},
            "splits": splits,
        }
        write_json(self.out / JOURNAL, state)
        if self.has_added or not self.plan.base:
            self.write_manifest(complete=False)

    def finish(self) -> None:
        """Finish the last shards, and write the final manifest."""
        for writer in self._writers.values():
            writer.finish_shard()
        self.commit()
        self.write_manifest(complete=True)

    def write_manifest(self, complete: bool) -> None:
        """Write the manifest of the finished shards.

        Args:
            complete: Whether these are all shards of the set. Only then are the hashes of the logs included.
        """
        logs = {name: describe_file(self.out / name, self.out) for name in LOGS} if complete else {}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "complete": complete,
            "fingerprint": self.plan.fingerprint,
            "settings": self.plan.settings,
            "tokenizer": self.plan.tokenizer,
            "dtype": self.plan.dtype,
            "books": self.counts,
            "splits": {split: self._describe_split(split) for split in SPLITS},
            "logs": logs,
        }
        write_json(self.out / MANIFEST, manifest, indent=1)

    def _describe_split(self, split: str) -> dict:
        """Return what the manifest lists of a split."""
        sources = {}
        for (other, source), writer in sorted(self._writers.items()):
            if other == split and writer.shards:
                sources[source] = {**_sum_counts(writer.shards), "shards": writer.shards}
        tokens = [entry["tokens"] for entry in sources.values()]
        leftover = {str(T): sum(count_leftover_tokens(count, T) for count in tokens) for T in LEFTOVER_LENGTHS}
        return {**_sum_counts(sources.values()), "sources": sources, "left_over": leftover}

    def _finish_input(self, source_input: Input) -> None:
        """Log an input that was read completely."""
        sha256 = source_input.compute_sha256()
        if source_input.has_changed():
            advice = "Wait until nothing writes to it, and run the same command again"
            raise ValueError(f"{source_input} changed while it was read. {advice}.")
        row = source_input.describe() | {"sha256": sha256, **self._input_counts}
        self._logs["inputs.jsonl"].write(encode_row(row))
        self._input_counts = dict(NO_DOCUMENTS)

    def _open_writer(self, split: str, source: str, state: dict | None = None) -> ShardWriter:
        """Return a new writer for the documents of one source in one split, which resumes from `state`."""
        if len({source, *(name for _, name in self._writers)}) > MAX_SOURCES:
            problem = f"There are more than {MAX_SOURCES} sources, among them {source!r}."
            raise ValueError(f"{problem} Check that --source-field names a field with few values.")
        shard_tokens = self.plan.settings["shard_tokens"]
        if split != "train":
            # Smaller shards for held-out text, so that the first shards of all splits are complete at about one time.
            share = self.plan.settings["held_out"][split]
            shard_tokens = min(shard_tokens, max(MIN_HELD_OUT_SHARD, int(shard_tokens * share)))
        writer = ShardWriter(self.out / split / folder_name(source), self.out, self.plan.dtype, shard_tokens, state)
        self._writers[split, source] = writer
        return writer


def format_counts(counts: dict[str, dict]) -> list[str]:
    """Return a line for each source of `SetWriter.counts`, or of a manifest's "books"."""
    lines = []
    for source, entry in counts.items():
        skipped = "".join(f" + {count:,} skipped ({reason})" for reason, count in sorted(entry["skipped"].items()))
        lines.append(f"{source}: {entry['read']:,} documents read = {entry['written']:,} written{skipped}")
    return lines


def _reopen_or_advise(path: Path, size: int) -> IO[bytes]:
    """Call `reopen_truncated`, and name the command to run in its error."""
    try:
        return reopen_truncated(path, size)
    except ValueError as error:
        raise ValueError(f"{error}. To prepare the set again from its sources, use --overwrite.") from error


def folder_name(source: str) -> str:
    """Return the name of a source's folders: the source itself if it can be one, or else its beginning and its hash.

    Different sources have different folders.
    """
    is_hashed = re.search(r"~[0-9a-f]{16}$", source)
    if re.fullmatch(r"\w[\w.-]*", source) and len(source.encode()) <= MAX_FOLDER_NAME and not is_hashed:
        return source
    start = re.sub(r"[^\w.-]+", "_", source)[:32].lstrip(".")
    digest = hashlib.sha256(source.encode(errors="surrogateescape")).hexdigest()
    return f"{start}~{digest[:16]}"


def _sum_counts(entries: Collection[dict]) -> dict[str, int]:
    """Return the sums of COUNTS over shards, or over sources."""
    return {key: sum(entry[key] for entry in entries) for key in COUNTS}
