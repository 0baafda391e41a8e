"""Read files into records, and turn a record into a document.

Files are read by one process, and records are parsed by many. So a record is what is cheap to send to another process:
a JSON line or a text file as bytes, or a row of a table as a dict. What cannot be read becomes a `BadRecord`, so that
documents and failures are counted in one place. Memory does not grow with the size of a file.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import zstandard

TEXT = (".txt", ".md", ".py")  # one document per file
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")  # one document per line
TABLES = (".parquet", ".arrow")  # one document per row
SUFFIXES = (*TEXT, *JSONL, *TABLES)
MAX_RECORD_BYTES = 2**30  # bounds memory
ROWS_PER_BATCH = 256
# The size of one read of a compressed file is small, because repetitive text can be a thousand times as long
# once it is decompressed.
COMPRESSED_READ_BYTES = 2**16
NAME_A_FIELD = "name one of them with --text-field or --source-field"


@dataclass(frozen=True)
class TextFile:
    """The content of a text file, which is one document."""

    data: bytes


class BadRecord(Exception):
    """A record without a document. `args` are a reason, by which such records are counted, and a detail."""


Record = bytes | TextFile | dict[str, Any] | BadRecord
Chunks = Iterator[tuple[list[Record], int]]  # some records, and the bytes of the file read so far


@dataclass(frozen=True)
class Document:
    """A document: its text, and its source if the record names one."""

    text: str
    source: str | None


@dataclass(frozen=True)
class SkippedRecord:
    """A record without a document. `number` counts the records of its input from 1, so it is a JSON file's line."""

    number: int
    reason: str
    detail: str


def parse_records(
    records: Iterable[Record], first: int, text_field: str, source_field: str | None
) -> Iterator[Document | SkippedRecord]:
    """Yield the document of each record, or the reason why it has none. Blank lines yield nothing.

    Args:
        records: Neighbouring records of one input.
        first: The number of records that precede them in the input.
        text_field, source_field: See `extract_document`.
    """
    for number, record in enumerate(records, start=first + 1):
        if isinstance(record, bytes) and not record.strip():
            continue
        try:
            yield extract_document(record, text_field, source_field)
        except BadRecord as error:
            yield SkippedRecord(number, *error.args)


def extract_document(record: Record, text_field: str, source_field: str | None) -> Document:
    """Return the document in a record.

    Args:
        record: A JSON line, a row of a table, or a text file, which has no fields.
        text_field, source_field: The field's full name, or else a path into nested fields, separated by dots.

    Raises:
        BadRecord: The record could not be read, lacks a field, or has an empty text.
    """
    if isinstance(record, BadRecord):
        raise record
    row = {}
    if isinstance(record, TextFile):
        text = _decode_utf8(record.data)
    else:
        row = record if isinstance(record, dict) else _parse_json(record)
        text = _get_field(row, text_field)
    if not text:
        raise BadRecord("empty", "the document is empty")
    return Document(text, _get_field(row, source_field) if row and source_field else None)


def estimate_bytes(value: Any) -> int:
    """Return about how many bytes of memory a record, or a value in one, takes."""
    if isinstance(value, dict):
        return sum(map(estimate_bytes, value.values()))
    if isinstance(value, list):
        return sum(map(estimate_bytes, value))
    if isinstance(value, TextFile):
        return len(value.data)
    return len(value) if isinstance(value, bytes | str) else 8


def read_file(path: Path, fields: list[str]) -> Chunks:
    """Yield the records of a file in order. From a table, only the columns that hold `fields` are read."""
    name = path.name.lower()
    size = path.stat().st_size
    if name.endswith(TABLES):
        yield from _read_table(path, fields)
    elif name.endswith(JSONL):
        yield from _read_lines(path)
    elif size > MAX_RECORD_BYTES:
        yield [_oversized_record("file", size)], size
    else:
        yield [TextFile(path.read_bytes())], size


def read_rows(rows: Iterable[dict], size: int) -> Chunks:
    """Yield `rows` some at a time. `size` is the number of bytes read once all of them are."""
    records = []
    for row in rows:
        records.append(row)
        if len(records) == ROWS_PER_BATCH:
            yield records, 0
            records = []
    yield records, size


def select_columns(where: str, fields: list[str], found: list[str]) -> list[str]:
    """Return the columns among `found` that hold `fields`: the column of that name, or the first part of a path.

    Raises:
        ValueError: `where`, a file or data set, has no such column.
    """
    columns = {field: field if field in found else field.split(".")[0] for field in fields}
    for field, column in columns.items():
        if column not in found:
            raise ValueError(f"{where} has no column {field!r}. It has {', '.join(found)}; {NAME_A_FIELD}.")
    return list(dict.fromkeys(columns.values()))


# ------------------------------------------------------------------------------------------- from record to document


def _parse_json(line: bytes) -> dict:
    """Return the object in a line of JSON. Raises BadRecord, which is no ValueError, if the line is anything else."""
    try:
        row = json.loads(_decode_utf8(line))
    except ValueError as error:
        raise BadRecord("not JSON", f"not JSON: {error}") from error
    except RecursionError as error:
        raise BadRecord("not JSON", "not JSON: nested too deeply") from error
    if not isinstance(row, dict):
        raise BadRecord("not an object", f"expected a JSON object, found {type(row).__name__}")
    return row


def _get_field(row: dict, field: str) -> str:
    """Return the text in a field of a row. Raises BadRecord if there is none."""
    value: Any = row
    for key in [field] if field in row else field.split("."):
        if not isinstance(value, dict) or key not in value:
            found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise BadRecord(f"no field {field}", f"no field {field!r}, only {found or 'none'}; {NAME_A_FIELD}")
        value = value[key]
    if not isinstance(value, str):
        raise BadRecord(f"{field} is no text", f"field {field!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can escape lone surrogates, which have no UTF-8 encoding.
        raise BadRecord("not Unicode", f"field {field!r} is not Unicode text ({error.reason})") from error
    return value


def _decode_utf8(data: bytes) -> str:
    """Return the text of UTF-8 bytes, without a byte order mark. Raises BadRecord for bytes that are not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise BadRecord("not UTF-8", f"not UTF-8 ({error.reason} at byte {error.start}, line {line})") from error


# ------------------------------------------------------------------------------------------------ from file to record


def _oversized_record(kind: str, size: int) -> BadRecord:
    """Return the record in place of a file or a line that is too large."""
    return BadRecord("too large", f"the {kind} has {size} bytes, more than the limit of {MAX_RECORD_BYTES}")


def _read_lines(path: Path) -> Chunks:
    """Yield the lines of a JSON Lines file, and a `BadRecord` where a compressed file is damaged."""
    suffix = path.suffix.lower()
    splitter = _LineSplitter()
    with open(path, "rb") as file:
        decompressed = gzip.GzipFile(fileobj=file) if suffix == ".gz" else file
        try:
            for block in _read_zstd(file) if suffix == ".zst" else _read_blocks(decompressed):
                yield splitter.split(block), file.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            detail = f"the file is damaged or cut short from here on ({error})"
            yield [BadRecord("damaged file", detail)], file.tell()
        else:
            yield [splitter.take_pending()], file.tell()


class _LineSplitter:
    """Split blocks of bytes into lines. The last line of a block is pending until its end is found in a later block."""

    def __init__(self):
        self._parts: list[bytes] = []
        self._size = 0

    def split(self, block: bytes) -> list[Record]:
        """Return the lines that end in this block."""
        first, *others = block.split(b"\n")
        self._extend_pending(first)
        if not others:
            return []
        lines = [self.take_pending(), *others[:-1]]
        self._extend_pending(others[-1])
        return lines

    def take_pending(self) -> Record:
        """Return the pending line, which may be empty, and begin another one."""
        line = _oversized_record("line", self._size) if self._size > MAX_RECORD_BYTES else b"".join(self._parts)
        self._parts = []
        self._size = 0
        return line

    def _extend_pending(self, part: bytes) -> None:
        """Append to the pending line. The content of an overlong line is dropped, and its bytes are still counted."""
        self._parts.append(part)
        self._size += len(part)
        if self._size > MAX_RECORD_BYTES:
            self._parts = []


def _read_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Yield blocks of a file, or of a decompressed one."""
    # This calls `read1`, because when GzipFile.read finds damage it discards what it has decompressed before.
    while block := file.read1(2**20):
        yield block


def _read_zstd(file: IO[bytes]) -> Iterator[bytes]:
    """Yield blocks of the text in a file of zstd frames."""
    # zstandard's stream_reader does not notice that a file is cut short, so we track the frames ourselves.
    frame = None
    while data := file.read(COMPRESSED_READ_BYTES):
        while data:
            # By default, windows of more than 128 MiB are refused, but `zstd --long=31` writes windows of 2 GiB.
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("the compressed file ends too early")


def _read_table(path: Path, fields: list[str]) -> Chunks:
    """Yield the rows of a Parquet or Arrow file, and a `BadRecord` where it is damaged."""
    import pyarrow

    read_batches = _read_parquet if path.suffix.lower() == ".parquet" else _read_arrow
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            for batch, position in read_batches(file, path, fields):
                yield _convert_rows(batch), position
    except (pyarrow.ArrowInvalid, EOFError, OSError) as error:
        # An error of the disk has a number; pyarrow's errors about the content of a file have none.
        if getattr(error, "errno", None):
            raise
        yield [BadRecord("damaged file", f"the file is damaged or cut short ({error})")], size


def _read_parquet(file: IO[bytes], path: Path, fields: list[str]) -> Iterator[tuple[Any, int]]:
    """Yield batches of rows, and the share of the rows read so far in bytes of the file."""
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file)
    columns = select_columns(str(path), fields, table.schema_arrow.names)
    bytes_per_row = path.stat().st_size / max(table.metadata.num_rows, 1)
    rows = 0
    for batch in table.iter_batches(ROWS_PER_BATCH, columns=columns):
        rows += len(batch)
        yield batch, int(rows * bytes_per_row)


def _read_arrow(file: IO[bytes], path: Path, fields: list[str]) -> Iterator[tuple[Any, int]]:
    """Yield batches of rows, and the position in the file."""
    import pyarrow

    # Arrow has two formats: one with an index at its end, and the stream that `datasets` writes.
    is_indexed = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_indexed:
        reader = pyarrow.ipc.open_file(file)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        reader = batches = pyarrow.ipc.open_stream(file)
    columns = select_columns(str(path), fields, reader.schema.names)
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_PER_BATCH):
            yield batch.select(columns).slice(start, ROWS_PER_BATCH), file.tell()


def _convert_rows(batch) -> list[Record]:
    """Return the rows of a pyarrow batch as dicts, and damaged rows as `BadRecord`."""
    import pyarrow

    try:
        # pyarrow does not validate what it reads: text may be invalid UTF-8, or lie outside of the file.
        batch.validate(full=True)
        return batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        if len(batch) == 1:
            return [BadRecord("damaged row", f"the row is damaged or not UTF-8 ({error})")]
    # One of the rows is damaged, so each is validated by itself.
    return list(chain.from_iterable(_convert_rows(batch.slice(i, 1)) for i in range(len(batch))))
