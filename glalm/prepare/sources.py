"""Where text comes from: files and folders, the standard library of the running interpreter, Hugging Face data sets.

A source is a name and its inputs, in order; an input is what is read from its beginning: a file, or one file of a
data set that is streamed. What is in a file, glalm.prepare.records reads.
"""

import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from glalm.data import files
from glalm.prepare.records import SUFFIXES, Record, columns_of, read_file, read_rows

# Tests are a third of the library and repeat themselves; packages of the site are not the library.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class File:
    """source: the name of its source. name: its path below `root`."""

    source: str
    root: Path
    name: str

    def __str__(self) -> str:
        return str(self.path)

    @property
    def path(self) -> Path:
        return self.root / self.name

    @cached_property
    def _stat(self) -> os.stat_result:
        return self.path.stat()

    @property
    def size(self) -> int:
        """Bytes, by which progress is measured."""
        return self._stat.st_size

    @property
    def mtime_ns(self) -> int:
        return self._stat.st_mtime_ns

    def has_changed(self) -> bool:
        """Since it was first asked for its size or time."""
        now = self.path.stat()
        return (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns)

    def read(self, fields: list[str]) -> Iterator[tuple[list[Record], int]]:
        """All records in order, some at a time, and the bytes of the file read so far. Tables: only the columns in
        which `fields` are."""
        return read_file(self.path, fields)

    def sha256(self) -> str:
        return files.file_sha256(self.path)


@dataclass(frozen=True)
class HubShard:
    """One of the files of a data set that is streamed through `datasets`."""

    source: str
    address: str  # what comes after hf:
    dataset: Any  # datasets.IterableDataset
    index: int
    mtime_ns = None  # the hub's files are named by a revision

    def __str__(self) -> str:
        return f"{self.source}, {self.name}"

    @property
    def name(self) -> str:
        return f"{self.address}, shard {self.index} of {self.dataset.num_shards}"

    @property
    def size(self) -> int:
        return (self.dataset.info.download_size or 0) // self.dataset.num_shards or 1

    def read(self, fields: list[str]) -> Iterator[tuple[list[Record], int]]:
        dataset = self.dataset
        if dataset.column_names:
            dataset = dataset.select_columns(columns_of(str(self), fields, dataset.column_names))
        return read_rows(dataset.shard(dataset.num_shards, self.index), self.size)

    def has_changed(self) -> bool:
        return False

    def sha256(self) -> None:
        return None


@dataclass(frozen=True)
class Source:
    """left_out: files of its folder that are of no kind that is read."""

    name: str
    inputs: tuple[File | HubShard, ...]
    skipped_files: tuple[Path, ...] = ()


def open_source(spec: str | os.PathLike | Source) -> Source:
    """The source that the command line calls `spec`: [NAME=] one of

    stdlib                                the standard library of the running interpreter
    a file or a folder                    by default named after the folder (the one that a file is in)
    hf:DATASET[:CONFIG[:SPLIT]][@REVISION] a data set of the Hugging Face hub, or a local folder of one, streamed

    Raises FileNotFoundError if there is no such file, ValueError if it holds nothing to read.
    """
    if isinstance(spec, Source):
        return spec
    name, rest = "", os.fspath(spec)
    if not Path(rest).exists() and (match := re.fullmatch(r"([\w.-]+)=(.+)", rest)):
        name, rest = match.groups()
    if rest == "stdlib":
        return stdlib_source(name=name or "stdlib")
    return hub_source(rest[3:], name) if rest.startswith("hf:") else local_source(rest, name)


def stdlib_source(root: str | os.PathLike | None = None, name: str = "stdlib") -> Source:
    """The running interpreter's standard library: its .py files in the order of their paths, without tests.

    Some 700 documents and 12 MB; the longest have hundreds of thousands of characters. Files that were
    generated when the interpreter was built are left out, so that one version of Python gives one corpus.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    found = [
        File(name, root, file)
        for file in _walk(root)
        if file.endswith(".py")
        and NOT_LIBRARY.isdisjoint(parts := file.split("/"))
        and not parts[0].startswith("config-")
        and not parts[-1].startswith("_sysconfigdata")
    ]
    if not found:
        raise ValueError(f"{root}: no .py files of a standard library here; give a folder of text instead")
    return Source(name, tuple(found))


def local_source(path: str | os.PathLike, name: str = "") -> Source:
    """A file, or the files of a folder and its subfolders that end in one of SUFFIXES (or .TXT), less hidden ones.

    Raises FileNotFoundError if `path` does not exist, ValueError if it holds no file of those kinds.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; a source is 'stdlib', a path or hf:DATASET")
    folder = path if path.is_dir() else path.parent
    there = _walk(path) if path.is_dir() else [path.name]
    found = [file for file in there if file.lower().endswith(SUFFIXES)]
    if not found:
        what = "no file here ends in" if path.is_dir() else "cannot read this kind of file; it must end in"
        raise ValueError(f"{path}: {what} one of {', '.join(SUFFIXES)}")
    name = name or folder.resolve().name or "files"
    other = sorted({*there} - {*found})
    return Source(name, tuple(File(name, folder, file) for file in found), tuple(folder / file for file in other))


def hub_source(spec: str, name: str = "") -> Source:
    """A data set streamed through `datasets`: spec is DATASET[:CONFIG[:SPLIT]][@REVISION], the split being train."""
    from datasets import load_dataset  # seconds to import

    address, _, revision = spec.partition("@")
    path, config, split, *_ = [*address.split(":"), "", ""]
    try:
        dataset = load_dataset(path, config or None, split=split or "train", revision=revision or None, streaming=True)
    except Exception as error:  # datasets and its libraries raise many kinds
        raise ValueError(f"hf:{spec}: `datasets` cannot open it: {error}") from error
    name = name or Path(path).name
    return Source(name, tuple(HubShard(name, spec, dataset, i) for i in range(dataset.num_shards)))


def describe_skipped_files(sources: Iterable[Source], less: Path | None = None) -> str:
    """In words, by ending, the files that are not read, but for those in the folder `less`; "" if there are none."""
    paths = [path for s in sources for path in s.skipped_files if less not in path.resolve().parents]
    counts = Counter(path.suffix.lower() or "no ending" for path in paths).most_common()
    said = ", ".join(f"{count:,} {suffix}" for suffix, count in counts)
    return f"files of other kinds than {', '.join(SUFFIXES)} are left out: {said}" if counts else ""


def _walk(folder: Path, above: tuple[str, ...] = ()) -> list[str]:
    """Names below `folder`. Links to folders are followed, but for those that lead back to one `above`."""
    real = os.path.realpath(folder)
    found = []
    for entry in os.scandir(folder) if real not in above else ():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += [f"{entry.name}/{name}" for name in _walk(Path(entry), (*above, real))]
        else:
            found.append(entry.name)
    return sorted(found)
