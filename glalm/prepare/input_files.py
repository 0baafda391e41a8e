"""Read inputs in batches of records: local files, files at URLs, and files of streamed data sets.

`read_part` reads a part of an input; what is inside of a file is the subject of glalm.prepare.records.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from glalm.data.files import file_sha256
from glalm.prepare.records import (
    DAMAGED_FILE,
    BadRecord,
    Chunks,
    Record,
    count_lines,
    estimate_bytes,
    find_cuts,
    read_file,
    read_rows,
    select_columns,
)
from glalm.prepare.remote import RemoteFile, open_url

BATCH_BYTES = 2**20  # of records that are encoded at once


@dataclass(frozen=True)
class Input:
    """One file of a source.

    Attributes:
        source: The name of its source.
        name: A local file's path below the folder of its source, or else the address of the file.
        size: Its size in bytes, estimated for a file of a streamed data set. Progress is measured by it.
        mtime_ns: The time of the file's last change, or None for a streamed data set that is not local.
    """

    source: str
    name: str
    size: int
    mtime_ns: int | None

    def __str__(self) -> str:
        return f"{self.source}, {self.name}"

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the input within a set."""
        return self.source, self.name

    @property
    def expected_bytes(self) -> float:
        """About how many bytes there are to read, or infinity if that is unknown."""
        return self.size

    def find_cuts(self, start: int, part_bytes: int) -> list[int]:
        """Return where to cut the input after `start`, as `records.find_cuts` does; [] if it is read as a whole."""
        return []

    def for_another_process(self) -> "Input":
        """Return an input with the same records that is cheap to pickle."""
        return self

    def has_changed(self) -> bool:
        """Return whether the input has changed since its size and time were read."""
        return False

    def is_recorded_as(self, row: dict[str, Any]) -> bool:
        """Return whether a row of inputs.jsonl with this input's key shows that the set has its content."""
        return (row["bytes"], row.get("mtime_ns")) == (self.size, self.mtime_ns)

    def compute_sha256(self) -> str | None:
        """Return the SHA-256 of the content, or None if the file is not local."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return what the plan and inputs.jsonl record of an input."""
        return {"source": self.source, "name": self.name, "bytes": self.size, "mtime_ns": self.mtime_ns}


@dataclass(frozen=True)
class PathInput(Input):
    """A file that can be read from any place in it."""

    path: Path | RemoteFile

    def __str__(self) -> str:
        return str(self.path)

    def read_records(self, fields: list[str], start: int = 0, stop: int | None = None) -> Chunks:
        """Yield the records of a part in order. From a table, only the columns that hold `fields` are read."""
        return read_file(self.path, fields, start, stop)

    def find_cuts(self, start: int, part_bytes: int) -> list[int]:
        # Most files are small. These are not opened.
        return find_cuts(self.path, start, part_bytes) if self.size > part_bytes else []


@dataclass(frozen=True)
class FileInput(PathInput):
    """A local file."""

    path: Path
    identity: tuple[int, int]  # device and inode, which are the same for all links to one file

    def has_changed(self) -> bool:
        status = self.path.stat()
        return (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns)

    def compute_sha256(self) -> str | None:
        return file_sha256(self.path)


@dataclass(frozen=True)
class RemoteInput(PathInput):
    """A file at a URL. Its SHA-256 is not computed, because the file would have to be downloaded twice."""

    path: RemoteFile

    def has_changed(self) -> bool:
        return self.path.stat(from_cache=False) != (self.size, self.mtime_ns)


@dataclass(frozen=True)
class HubInput(Input):
    """One of the files of a data set that `datasets` finds, and streams unless it is Parquet.

    Attributes:
        index: Its index in `dataset`.
        address: The address of its file, or "" if that is unknown. On the hub, it includes the commit.
        version: What changes with the content of the data set: the address, or else a hash that `datasets` computes.
    """

    dataset: Any  # datasets.IterableDataset
    index: int
    address: str = ""
    version: str = ""

    @property
    def expected_bytes(self) -> float:
        if self.address:
            with suppress(Exception):  # Filesystems raise many kinds, and reading the file will show the reason.
                filesystem, path = open_url(self.address)
                return filesystem.size(path) or math.inf
        return math.inf

    @property
    def parquet(self) -> Path | RemoteFile | None:
        """The file if it is Parquet. `datasets` reads ahead of damage, and by chance loses rows before it."""
        if not self.address.lower().endswith(".parquet"):
            return None
        return RemoteFile(self.address) if self.is_remote else Path(self.address)

    def find_cuts(self, start: int, part_bytes: int) -> list[int]:
        if self.parquet is None or self.expected_bytes <= part_bytes:
            return []
        with self._explain_errors():
            return find_cuts(self.parquet, start, part_bytes)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"version": self.version}

    @property
    def is_remote(self) -> bool:
        """Whether it is on the hub, and not in a local folder."""
        return self.mtime_ns is None

    def has_changed(self) -> bool:
        return not self.is_remote and Path(self.address).stat().st_mtime_ns != self.mtime_ns

    def is_recorded_as(self, row: dict[str, Any]) -> bool:
        # The size is an estimate, which changes as a data set of the hub grows.
        return self.is_remote or super().is_recorded_as(row)

    def compute_sha256(self) -> str | None:
        return None if self.is_remote else file_sha256(Path(self.address))

    def for_another_process(self) -> "HubInput":
        # The data set may have 100,000 files, and this is one of them.
        return replace(self, dataset=self.dataset.shard(self.dataset.num_shards, self.index), index=0)

    def read_records(self, fields: list[str], start: int = 0, stop: int | None = None) -> Chunks:
        """Yield the records of a part in order, of the columns that hold `fields`."""
        dataset = self.dataset
        if dataset.column_names:
            dataset = dataset.select_columns(select_columns(str(self), fields, dataset.column_names))
        with self._explain_errors():
            if self.parquet is None:
                yield from read_rows(dataset.shard(dataset.num_shards, self.index), self.size)
            else:
                for records, position in read_file(self.parquet, fields, start, stop):
                    yield records, min(position, self.size)

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Raise ValueError that says how to go on where the file cannot be read."""
        try:
            yield
        except MemoryError:
            raise  # `read_part` says what to do.
        except Exception as error:  # `datasets` and filesystems raise many kinds.
            problem = f"{self} cannot be read ({type(error).__name__}: {error})"
            advice = "To continue from here, run the same command again. If it fails again, download the files and "
            raise ValueError(f"{problem}. {advice}name their folder without hf:.") from error


@dataclass(frozen=True)
class Position:
    """A place in a list of inputs. All records before it are written.

    Attributes:
        input: The index of an input.
        start: Where a part of it starts, as `records.find_cuts` returns it.
        records: The number of the part's records that are written.
        before: The number of the input's records that precede the part.
    """

    input: int = 0
    start: int = 0
    records: int = 0
    before: int = 0

    def after(self, batch: "RecordBatch") -> "Position":
        """Return the position behind a batch that begins here."""
        if not batch.is_last:
            return replace(self, records=batch.end)
        if batch.next_start is None:
            return Position(self.input + 1)
        return Position(self.input, batch.next_start, before=self.before + batch.end)


@dataclass(frozen=True)
class Part:
    """A part of an input, which is read without what precedes it.

    Attributes:
        input_index: Which of the inputs it belongs to.
        start, stop: Where it begins and ends, as `records.find_cuts` returns it; None is the end of the input.
        skip: The number of its first records that are passed over.
    """

    input_index: int
    source_input: Input
    start: int = 0
    stop: int | None = None
    skip: int = 0


class RecordBatch(NamedTuple):
    """Neighbouring records of one part of an input, which are encoded at once.

    Attributes:
        input_index: Which of the inputs they belong to.
        source: The name of the input's source.
        first, end: The number of the part's records that precede the first and that end with the last of them. A record
            that stands for several lines counts as that many.
        size: About how many bytes they take in memory.
        bytes_read: The position in the input, in bytes, where they end.
        is_last: Whether they end the part.
        next_start: Where the next part of the input starts, or None if none follows.
    """

    input_index: int
    source: str
    first: int
    end: int
    records: list[Record]
    size: int
    bytes_read: int
    is_last: bool
    next_start: int | None


def read_part(part: Part, fields: list[str], batch_bytes: int | None = None) -> Iterator[RecordBatch]:
    """Yield the records of a part in batches of about `batch_bytes` bytes. The last batch may be empty.

    Args:
        fields: The columns to read from a table; see `records.select_columns`.
    """
    batch_bytes = batch_bytes or BATCH_BYTES
    index = part.input_index
    source = part.source_input.source
    read = 0
    first = part.skip
    records: list[Record] = []
    size = 0
    next_start = part.stop
    position = 0
    try:
        for chunk, position in part.source_input.read_records(fields, part.start, part.stop):
            for record in chunk:
                if isinstance(record, BadRecord) and record.args[0] == DAMAGED_FILE:
                    next_start = None  # The rest of the file cannot be read.
                count = count_lines(record)
                read += count
                if read <= part.skip:
                    continue
                first = first if records else read - count
                records.append(record)
                size += estimate_bytes(record)
                if size >= batch_bytes:
                    yield RecordBatch(index, source, first, read, records, size, position, False, next_start)
                    first = read
                    records = []
                    size = 0
    except MemoryError as error:
        raise out_of_memory_error(part.source_input) from error
    position = part.source_input.size if next_start is None else position
    yield RecordBatch(index, source, first, read, records, size, position, True, next_start)


def read_batches(inputs: list[Input], fields: list[str], batch_bytes: int | None = None) -> Iterator[RecordBatch]:
    """Yield all records of `inputs` in batches; see `read_part`."""
    for index, source_input in enumerate(inputs):
        yield from read_part(Part(index, source_input), fields, batch_bytes)


def out_of_memory_error(source_input: Input) -> ValueError:
    """Return the error for an input with a record that is too large for this machine's memory."""
    problem = f"{source_input}: memory ran out. A document takes many times its size while it is tokenized"
    advice = "Split or remove the longest documents of this file. If several processes run, fewer need less memory"
    return ValueError(f"{problem}. {advice} (--workers, or with Ray the CPUs of a node: ray start --num-cpus).")
