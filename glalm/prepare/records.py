"""What is in a file: records, read in memory that does not grow with the file; and the document in a record.

Reading is done by one process and understanding by many, so a record is what is cheap to pass on: the bytes of a JSON
line or of a text file, or the row of a table. What cannot be read is a record too, a Broken one, so that documents
and failures are counted in one place.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

TEXT = (".txt", ".md", ".py")  # one document a file
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")  # one document a line
TABLES = (".parquet", ".arrow")  # one document a row
SUFFIXES = (*TEXT, *JSONL, *TABLES)
LARGEST = 2**30  # bytes of one record: a bound on memory, and no document is longer
READ = 2**16  # bytes at once of a compressed file: repetitive text can be a thousand times as long
ROWS = 256  # of a table at once
NAME_ONE = "name one (--text-field, --source-field)"


@dataclass(frozen=True)
class Broken:
    """What stands in a file where a record should. reason: by which it is counted."""

    reason: str
    detail: str


class BadDocument(Exception):
    """A record that gives no document; args: a reason, by which it is counted, and a detail."""


@dataclass(frozen=True)
class PlainText:
    data: bytes


Record = bytes | PlainText | dict[str, Any] | Broken


def extract_document(record: Record, text_field: str, source_field: str | None) -> tuple[str, str | None]:
    """The text of a record, and what `source_field` says of its origin (None without one). Raises BadDocument."""
    if isinstance(record, Broken):
        raise BadDocument(record.reason, record.detail)
    if isinstance(record, PlainText):
        return _not_empty(_decoded(record.data)), None
    row = record if isinstance(record, dict) else _json(record)
    return _not_empty(_field(row, text_field)), _field(row, source_field) if source_field else None


def is_blank(record: Record) -> bool:
    """An empty line is no document, and no failure to give one."""
    return isinstance(record, bytes) and not record.strip()


def size_of(record: Any) -> int:
    """About how many bytes a record, or a value in one, takes."""
    if isinstance(record, dict | list):
        return sum(map(size_of, record.values() if isinstance(record, dict) else record))
    if isinstance(record, PlainText):
        return len(record.data)
    return len(record) if isinstance(record, bytes | str) else 8


def read_file(path: Path, fields: list[str]) -> Iterator[tuple[list[Record], int]]:
    """Records in order, some at a time, with the bytes of the file that were read by then. Tables: the columns in
    which `fields` are."""
    if path.name.lower().endswith(TABLES):
        return _read_table(path, fields)
    if path.name.lower().endswith(JSONL):
        return _read_lines(path)
    return _read_text(path)


def read_rows(rows: Iterable[dict], size: int) -> Iterator[tuple[list[Record], int]]:
    records = []
    for row in rows:
        records.append(row)
        if len(records) == ROWS:
            yield records, 0
            records = []
    yield records, size


def columns_of(where: str, fields: list[str], found: list[str]) -> list[str]:
    """Those of the columns `found` in which `fields` are: of just that name, or what its first part names."""
    columns = {field: field if field in found else field.split(".")[0] for field in fields}
    if missing := [field for field, column in columns.items() if column not in found]:
        raise ValueError(f"{where}: has no column {missing[0]!r} but {', '.join(found)}; {NAME_ONE}")
    return list(dict.fromkeys(columns.values()))


# ------------------------------------------------------------------------------------------- from record to document


def _json(line: bytes) -> dict:
    try:
        row = json.loads(_decoded(line))
    except ValueError as error:
        raise BadDocument("not JSON", f"not JSON: {error}") from error
    except RecursionError as error:
        raise BadDocument("not JSON", "not JSON that can be read: nested too deep") from error
    if not isinstance(row, dict):
        raise BadDocument("not an object", f"expected a JSON object, got {type(row).__name__}")
    return row


def _field(row: dict, dotted: str) -> str:
    value: Any = row
    for key in [dotted] if dotted in row else dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise BadDocument(f"no field {dotted}", f"has no field {dotted!r} but {found or 'none'}; {NAME_ONE}")
        value = value[key]
    if not isinstance(value, str):
        raise BadDocument(f"{dotted} is no text", f"field {dotted!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell lone surrogates, which are no text
        raise BadDocument("not Unicode", f"field {dotted!r} is not Unicode text ({error.reason})") from error
    return value


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise BadDocument("not UTF-8", f"not UTF-8 ({error.reason} at byte {error.start}, line {line})") from error


def _not_empty(text: str) -> str:
    if not text:
        raise BadDocument("empty", "the document is empty")
    return text


# ------------------------------------------------------------------------------------------------ from file to record


def _read_text(path: Path) -> Iterator[tuple[list[Record], int]]:
    size = path.stat().st_size
    too_large = Broken("too large", f"a document of {size} bytes; the most is {LARGEST}")
    yield [PlainText(path.read_bytes()) if size <= LARGEST else too_large], size


def _read_lines(path: Path) -> Iterator[tuple[list[Record], int]]:
    unread = {".zst": _unzstd, ".gz": _ungzip}.get(path.suffix.lower(), _plain)
    with open(path, "rb") as file:
        lines = _Lines()
        try:
            for block in unread(file):
                yield lines.split(block), file.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            yield [Broken("damaged file", f"the file is damaged or cut short from here on ({error})")], file.tell()
        else:
            yield lines.rest(), file.tell()


class _Lines:
    """Cuts blocks of bytes into lines; the start of a line waits here for its end."""

    def __init__(self):
        self.parts: list[bytes] = []
        self.size = 0

    def split(self, block: bytes) -> list[Record]:
        first, *others = block.split(b"\n")
        self._hold(first)
        if not others:
            return []
        *lines, last = others
        lines = [*self.rest(), *lines]
        self._hold(last)
        return lines

    def rest(self) -> list[Record]:
        """The line that was waiting. A line is counted even when nothing is in it."""
        line = b"".join(self.parts)
        if self.size > LARGEST:
            line = Broken("too large", f"a line of {self.size} bytes; the most is {LARGEST}")
        self.parts, self.size = [], 0
        return [line]

    def _hold(self, part: bytes) -> None:
        self.size += len(part)
        if self.size > LARGEST:
            self.parts = []
        else:
            self.parts.append(part)


def _plain(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read1(2**20):  # gzip's read would drop what it has when it comes to damage
        yield block


def _ungzip(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as unpacked:
        yield from _plain(unpacked)


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    # Not zstandard's stream_reader: it takes a file that was cut short for one that ends there.
    frame = None
    while data := file.read(READ):
        while data:
            # By default windows of more than 128 MiB are refused; zstd --long=31 makes them of 2 GiB.
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("the compressed file ends too early")


def _read_table(path: Path, fields: list[str]) -> Iterator[tuple[list[Record], int]]:
    import pyarrow

    size, done = path.stat().st_size, 0
    try:
        with open(path, "rb") as file:
            names, rows, read = (_parquet if path.suffix.lower() == ".parquet" else _arrow)(file)
            batches = read(columns_of(str(path), fields, names))
            for batch in batches:
                done += len(batch)
                yield _rows(batch), size * done // rows if rows else file.tell()
    except (pyarrow.ArrowInvalid, EOFError, OSError) as error:
        if getattr(error, "errno", None):  # the system's, of the disk; Arrow's own, of what it read, have none
            raise
        yield [Broken("damaged file", f"the file is damaged or cut short ({error})")], size


def _rows(batch) -> list[Record]:
    """Arrow believes its files: text that is not UTF-8, or lies outside of the file, is found by asking."""
    import pyarrow

    try:
        batch.validate(full=True)
        return batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        if len(batch) == 1:
            return [Broken("damaged row", f"the row is damaged or not UTF-8 ({error})")]
        return [row for i in range(len(batch)) for row in _rows(batch.slice(i, 1))]


def _parquet(file: IO[bytes]):
    """The names of its columns, the number of its rows, and what gives the batches of some columns."""
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file)
    return table.schema_arrow.names, table.metadata.num_rows, lambda columns: table.iter_batches(ROWS, columns=columns)


def _arrow(file: IO[bytes]):
    import pyarrow

    # Arrow has two formats: with an index at the end, and the stream that `datasets` writes.
    is_indexed = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_indexed:
        reader = pyarrow.ipc.open_file(file)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        reader = batches = pyarrow.ipc.open_stream(file)

    def read(columns: list[str]):
        return (b.select(columns).slice(i, ROWS) for b in batches for i in range(0, b.num_rows, ROWS))

    return reader.schema.names, 0, read
