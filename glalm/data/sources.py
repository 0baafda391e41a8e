"""Where text comes from: the standard library of the running interpreter, or files of one's own."""

import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

TEXT_SUFFIXES = (".txt", ".md", ".py")  # one document a file
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")  # one document a line
SUFFIXES = TEXT_SUFFIXES + JSONL_SUFFIXES

# Tests are a third of the library and repeat themselves; packages of the site are not the library.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """text: as it was found. source: the name of its Source. name: its file, with the line in a .jsonl."""

    text: str
    source: str
    name: str


@dataclass(frozen=True)
class Source:
    """An iterable of Documents, the same at each pass. files: relative to root, in order."""

    name: str
    root: Path
    files: tuple[str, ...]

    def __iter__(self) -> Iterator[Document]:
        for file in self.files:
            yield from self.read(file)

    def file_bytes(self, file: str) -> int:
        return (self.root / file).stat().st_size

    def read(self, file: str) -> Iterator[Document]:
        """Documents of one of `files`. Raises ValueError, with file and line, for what is not valid text."""
        path = self.root / file
        if file.endswith(JSONL_SUFFIXES):
            for number, text in _read_jsonl(path):
                yield Document(text, self.name, f"{file}:{number}")
        else:
            yield Document(_read_text(path), self.name, file)


def source(spec: str | os.PathLike) -> Source:
    """The source that the command line calls `spec`: "stdlib", or the path of a file or folder."""
    return stdlib() if spec == "stdlib" else local(spec)


def stdlib(root: str | os.PathLike | None = None) -> Source:
    """The running interpreter's standard library: its .py files in the order of their paths, without tests.

    Some 700 documents and 12 MB; the longest have hundreds of thousands of characters. Files that were
    generated when the interpreter was built are left out, so that one version of Python gives one corpus.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    files = tuple(
        file
        for file in _walk(root, (".py",))
        if NOT_LIBRARY.isdisjoint(parts := file.split("/"))
        and not parts[0].startswith("config-")
        and not parts[-1].startswith("_sysconfigdata")
    )
    if not files:
        raise ValueError(f"{root}: no .py files of a standard library here; give a folder of text instead")
    return Source("stdlib", root, files)


def local(path: str | os.PathLike) -> Source:
    """A file, or the files of a folder and its subfolders that end in one of SUFFIXES, less hidden ones.

    Raises FileNotFoundError if `path` does not exist, ValueError if it holds no file of those kinds.
    """
    path = Path(path)
    if path.is_dir():
        files = tuple(_walk(path, SUFFIXES))
        if not files:
            raise ValueError(f"{path}: no file here ends in one of {', '.join(SUFFIXES)}")
        return Source(str(path), path, files)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; a source is 'stdlib' or a path")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: cannot read this kind of file; it must end in one of {', '.join(SUFFIXES)}")
    return Source(str(path), path.parent, (path.name,))


def _walk(root: Path, suffixes: tuple[str, ...]) -> list[str]:
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = Path(folder).relative_to(root)
        found += [
            (relative / name).as_posix() for name in files if name.endswith(suffixes) and not name.startswith(".")
        ]
    return sorted(found)


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason}); convert or remove the file") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, str]]:
    number = 1
    try:
        for line in _lines(path):
            if line.strip():
                yield number, _text_of(line)
            number += 1
    except (ValueError, EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{path}:{number}: {error}") from error


def _text_of(line: bytes) -> str:
    record = json.loads(line.decode("utf-8-sig"))
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError('expected an object with a string "text"')
    record["text"].encode()  # JSON can spell lone surrogates, which are no text: this raises a ValueError
    return record["text"]


def _lines(path: Path) -> Iterator[bytes]:
    if path.suffix == ".zst":
        yield from _zstd_lines(path)
    else:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield from file


def _zstd_lines(path: Path) -> Iterator[bytes]:
    # Not zstandard's stream_reader: it takes a file that was cut short for one that ends there.
    rest, frame = b"", None
    with open(path, "rb") as file:
        while data := file.read(2**20):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                *lines, rest = (rest + frame.decompress(data)).split(b"\n")
                yield from lines
                data = frame.unused_data
                if frame.eof:
                    frame = None
    if frame:
        raise EOFError("the compressed file ends too early; copy it again")
    if rest:
        yield rest
