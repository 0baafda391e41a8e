"""Read files, or ranges of them, into records, and turn a record into a document.

A record is what is cheap to send to another process: a JSON line or a text file as bytes, or a row of a table as a
dict. What cannot be read becomes a `BadRecord`, so that documents and failures are counted in one place. Memory does
not grow with the size of a file.
"""

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import IO, Any

import zstandard

from glalm.prepare.remote import RemoteFile

TEXT = (".txt", ".md", ".py")  # one document per file
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")  # one document per line
TABLES = (".parquet", ".arrow")  # one document per row
SUFFIXES = (*TEXT, *JSONL, *TABLES)
MAX_RECORD_BYTES = 2**30  # bounds memory
ROWS_PER_BATCH = 256
MAX_BATCH_BYTES = 2**24  # of rows of a Parquet file that are unpacked at once, if they are of average size
BLOCK_BYTES = 2**20  # of text that is split into lines at once
# zstd needs 4 bytes for a block of 128 KiB of one repeated byte. So this many compressed bytes are at most 8 MiB.
COMPRESSED_READ_BYTES = 2**8
MIN_RECORD_BYTES = 64  # of memory
DAMAGED_FILE = "damaged file"  # the reason of the last record of a file that cannot be read any further
# Python refuses integers of more than 4,300 digits. No number of a line is ever used, so its precision does not matter.
JSON = json.JSONDecoder(parse_int=float)
TEXT_OPTION = "--text-field"
SOURCE_OPTION = "--source-field"


@dataclass(frozen=True)
class TextFile:
    """The content of a text file, which is one document."""

    data: bytes


class BadRecord(Exception):
    """A record without a document. `args` are a reason, by which such records are counted, and a detail."""


# Bytes are a line of a JSON file, with the blank lines before it.
Record = bytes | TextFile | dict[str, Any] | BadRecord
Chunks = Iterator[tuple[list[Record], int]]  # some records, and the bytes of the file read so far


@dataclass(frozen=True)
class Document:
    """A document: its text, its source if the record names one, and its number, as in `SkippedRecord`."""

    text: str
    source: str | None
    number: int | None = None


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
    number = first
    for record in records:
        number += count_lines(record)
        if isinstance(record, bytes) and not record.strip():
            continue
        try:
            yield replace(extract_document(record, text_field, source_field), number=number)
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
        text = _decode_utf8(record.data, "file")
    else:
        row = record if isinstance(record, dict) else _parse_json(record)
        text = _get_field(row, text_field, TEXT_OPTION)
    if len(text) > MAX_RECORD_BYTES:
        raise _oversized_record("text", len(text), "characters")
    if not text:
        raise BadRecord("empty", "the document is empty")
    return Document(text, _get_field(row, source_field, SOURCE_OPTION) if row and source_field else None)


def count_lines(record: Record) -> int:
    """Return by how much a record advances the number of records: one, and one for each blank line that it contains."""
    return 1 + record.count(b"\n") if isinstance(record, bytes) else 1


def estimate_bytes(record: Record) -> int:
    """Return about how many bytes of memory a record takes."""
    return MIN_RECORD_BYTES + _estimate_value_bytes(record)


def _estimate_value_bytes(value: Any) -> int:
    """Return about how many bytes of memory a value in a record takes."""
    if isinstance(value, dict):
        return sum(map(_estimate_value_bytes, value.values()))
    if isinstance(value, list):
        return sum(map(_estimate_value_bytes, value))
    if isinstance(value, TextFile):
        return len(value.data)
    return len(value) if isinstance(value, bytes | str) else 8


def find_cuts(path: Path | RemoteFile, start: int, part_bytes: int) -> list[int]:
    """Return where to cut a file after `start` into parts of about `part_bytes`, of its text or of unpacked columns.

    The parts of plain JSON Lines are cut at a byte: a line belongs to the part in which it begins. Those of Parquet are
    cut before a row group. Other files can only be read from the start.
    """
    name = path.name.lower()
    if name.endswith(".jsonl"):
        first = (start // part_bytes + 1) * part_bytes
        return list(range(first, path.stat().st_size, part_bytes))
    if name.endswith(".parquet"):
        return _find_row_groups(path, start, part_bytes)
    return []


def read_file(path: Path | RemoteFile, fields: list[str], start: int = 0, stop: int | None = None) -> Chunks:
    """Yield the records of a file in order. From a table, only the columns that hold `fields` are read.

    Args:
        start, stop: The part of the file to read, between two of the places that `find_cuts` returns or to the end.
    """
    name = path.name.lower()
    size = path.stat().st_size
    if name.endswith(TABLES):
        yield from _read_table(path, fields, start, stop)
    elif name.endswith(JSONL):
        yield from _read_lines(path, start, stop)
    elif size > MAX_RECORD_BYTES:
        yield [_oversized_record("file", size)], size
    else:
        yield [TextFile(path.read_bytes())], size


def read_rows(rows: Iterable[dict], size: int) -> Chunks:
    """Yield `rows` some at a time, and a `BadRecord` where `datasets` finds that their file is damaged.

    Args:
        size: The number of bytes read once all rows are.
    """
    records: list[Record] = []
    records_bytes = 0
    try:
        for row in rows:
            records.append(row)
            records_bytes += estimate_bytes(row)
            if len(records) == ROWS_PER_BATCH or records_bytes >= BLOCK_BYTES:
                yield records, 0
                records = []
                records_bytes = 0
    except Exception as error:
        if not _shows_damage(error):
            raise
        records.append(_damaged_file(error))
    yield records, size


def select_columns(where: str, fields: list[str], found: list[str]) -> list[str]:
    """Return the columns among `found` that hold `fields`: the column of that name, or the first part of a path.

    Args:
        fields: The field of the text, and then that of the source if there is one.

    Raises:
        ValueError: `where`, a file or data set, has no such column.
    """
    columns = {field: field if field in found else field.split(".")[0] for field in fields}
    for field, column in columns.items():
        if column not in found:
            option = TEXT_OPTION if field == fields[0] else SOURCE_OPTION
            problem = f"{where} has no column {field!r}. It has {', '.join(found)}"
            raise ValueError(f"{problem}; name one of them with {option}.")
    return list(dict.fromkeys(columns.values()))


# ------------------------------------------------------------------------------------------- from record to document


def _parse_json(line: bytes) -> dict:
    """Return the object in a line of JSON. Raises BadRecord, which is no ValueError, if the line is anything else."""
    # Blank lines may precede the line.
    text = _decode_utf8(line[line.rfind(b"\n") + 1 :], "line")
    try:
        row = JSON.decode(text)
    except ValueError as error:
        raise BadRecord("not JSON", f"not JSON: {error}") from error
    except RecursionError as error:
        raise BadRecord("not JSON", "not JSON: nested too deeply") from error
    if not isinstance(row, dict):
        raise BadRecord("not an object", f"expected a JSON object, found {type(row).__name__}")
    return row


def _get_field(row: dict, field: str, option: str) -> str:
    """Return the text in a field of a row. Raises BadRecord, which names the field's `option`, if there is none."""
    value: Any = row
    for key in [field] if field in row else field.split("."):
        if not isinstance(value, dict) or key not in value:
            found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            problem = f"no field {field!r}, only {found or 'none'}"
            raise BadRecord(f"no field {field}", f"{problem}; name one of them with {option}")
        value = value[key]
    if not isinstance(value, str):
        raise BadRecord(f"{field} is no text", f"field {field!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can escape lone surrogates, which have no UTF-8 encoding.
        raise BadRecord("not Unicode", f"field {field!r} is not Unicode text ({error.reason})") from error
    return value


def _decode_utf8(data: bytes, kind: str) -> str:
    """Return the text of a "file" or a "line", without a byte order mark. Raises BadRecord if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        position = len(data) - len(error.object) + error.start  # The error's bytes lack the byte order mark.
        where = f"byte {position} of the {kind}"
        if kind == "file":
            line = data.count(b"\n", 0, position) + 1
            where += f", line {line}"
        raise BadRecord("not UTF-8", f"not UTF-8 ({error.reason} at {where})") from error


# ------------------------------------------------------------------------------------------------ from file to record


def _oversized_record(kind: str, size: int, unit: str = "bytes") -> BadRecord:
    """Return the record in place of a file, a line or a text that is too large."""
    return BadRecord("too large", f"the {kind} has {size:,} {unit}, more than the limit of {MAX_RECORD_BYTES:,}")


def _damaged_file(error: Exception) -> BadRecord:
    """Return the record in place of those that follow where a file is damaged."""
    return BadRecord(DAMAGED_FILE, f"the file is damaged or cut short from here on ({error})")


def _shows_damage(error: Exception) -> bool:
    """Return whether an error of a library that reads a file is about its content.

    Other errors are those of a disk, which have a number, of a network, which have a type of their own, and of memory.
    """
    import pyarrow

    if isinstance(error, OSError):
        is_numbered = error.errno is not None
        return isinstance(error, gzip.BadGzipFile) or (type(error) is OSError and not is_numbered)
    if isinstance(error, MemoryError):
        return False
    of_content = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, pyarrow.ArrowException)
    return isinstance(error, (*of_content, ValueError, TypeError))


def _read_lines(path: Path | RemoteFile, start: int, stop: int | None) -> Chunks:
    """Yield the lines that begin in a part of a JSON Lines file, and a `BadRecord` where a packed file is damaged."""
    unpack = {".gz": _read_gzip, ".zst": _read_zstd}.get(path.suffix.lower())
    splitter = _LineSplitter()
    with path.open("rb") as file:
        try:
            if unpack and not file.peek(1):  # It would have at least a header.
                raise EOFError("the compressed file is empty")
            for block in unpack(file) if unpack else _read_line_range(file, start, stop):
                yield splitter.split(block), file.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            yield [_damaged_file(error)], file.tell()
        else:
            # The last line of the file may lack its newline. A part before it ends with one, and has nothing pending.
            pending = splitter.take_pending()
            yield [pending] if pending else [], file.tell()


class _LineSplitter:
    """Split blocks of bytes into lines. The last line of a block is pending until its end is found in a later block.

    Blank lines are prepended to the next line, because a list of them would take much more memory than they do.
    """

    # The whitespace is that of JSON. It is matched first, and then the rest of the line in which it ends.
    LINES = re.compile(rb"[ \t\r\n]*[^\n]*\n")

    def __init__(self):
        self._parts: list[bytes] = []
        self._size = 0

    def split(self, block: bytes) -> list[Record]:
        """Return the lines that end in this block."""
        first_end = block.find(b"\n")
        if first_end < 0:
            self._extend_pending(block)
            return []
        self._extend_pending(block[:first_end])
        last_end = block.rfind(b"\n")
        lines = [self.take_pending()]
        # Each match ends with the newline that ends its line.
        lines += [match[:-1] for match in self.LINES.findall(block, first_end + 1, last_end + 1)]
        self._extend_pending(block[last_end + 1 :])
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


def _read_line_range(file: IO[bytes], start: int, stop: int | None) -> Iterator[bytes]:
    """Yield blocks of the lines that begin in the bytes [start, stop) of a file, to the end of the last of them."""
    if start:
        # A line begins at `start` if the byte before it is a newline, and else behind the next one.
        file.seek(start - 1)
        while (part := file.readline(BLOCK_BYTES)) and not part.endswith(b"\n"):
            if stop is not None and file.tell() >= stop:
                break
    position = file.tell()
    block = b"\n"
    while stop is None or position < stop:
        limit = BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - position)
        block = file.read1(limit)
        if not block:
            return
        position += len(block)
        yield block
    while not block.endswith(b"\n") and (block := file.readline(BLOCK_BYTES)):
        yield block


def _read_gzip(file: BufferedReader) -> Iterator[bytes]:
    """Yield blocks of the text in a gzip file."""
    unpacked = gzip.GzipFile(fileobj=file)
    # This calls `read1`, because when GzipFile.read finds damage it discards what it has decompressed before.
    while block := unpacked.read1(BLOCK_BYTES):
        yield block


def _read_zstd(file: BufferedReader) -> Iterator[bytes]:
    """Yield blocks of the text in a file of zstd frames."""
    # zstandard's stream_reader does not notice that a file is cut short, so we track the frames ourselves.
    frame = None
    parts = []
    size = 0
    while data := file.read(COMPRESSED_READ_BYTES):
        while data:
            # By default, windows of more than 128 MiB are refused, but `zstd --long=31` writes windows of 2 GiB.
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                parts.append(frame.decompress(data))
            except zstandard.ZstdError:
                yield b"".join(parts)
                raise
            size += len(parts[-1])
            data = frame.unused_data
            if frame.eof:
                frame = None
        if size >= BLOCK_BYTES // 4:
            yield b"".join(parts)
            parts = []
            size = 0
    yield b"".join(parts)
    if frame:
        raise EOFError("the compressed file ends too early")


def _read_table(path: Path | RemoteFile, fields: list[str], start: int, stop: int | None) -> Chunks:
    """Yield the rows of a part of a Parquet or Arrow file, and a `BadRecord` where it is damaged."""
    import pyarrow

    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            is_parquet = path.suffix.lower() == ".parquet"
            batches = _read_parquet(file, path, fields, start, stop) if is_parquet else _read_arrow(file, path, fields)
            for batch, position in batches:
                yield _convert_rows(batch), position
    except (pyarrow.ArrowException, EOFError, OSError) as error:
        if not _shows_damage(error):
            raise
        yield [_damaged_file(error)], size


def _find_row_groups(path: Path | RemoteFile, start: int, part_bytes: int) -> list[int]:
    """Return the row groups of a Parquet file before which to cut it after the row group `start`."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with path.open("rb") as file:
            metadata = ParquetFile(file).metadata
    except (pyarrow.ArrowException, EOFError, OSError) as error:
        if not _shows_damage(error):
            raise
        return []  # Whoever reads the file reports the damage.
    cuts = []
    size = 0
    for group in range(start, metadata.num_row_groups):
        if size >= part_bytes:
            cuts.append(group)
            size = 0
        size += metadata.row_group(group).total_byte_size
    return cuts


def _read_parquet(
    file: IO[bytes], path: Path | RemoteFile, fields: list[str], start: int, stop: int | None
) -> Iterator[tuple[Any, int]]:
    """Yield batches of the rows in the row groups [start, stop), and the share of rows so far in bytes of the file."""
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file)
    columns = select_columns(str(path), fields, table.schema_arrow.names)
    bytes_per_row = path.stat().st_size / max(table.metadata.num_rows, 1)
    groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    unpacked_per_row = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1)
    rows_per_batch = min(ROWS_PER_BATCH, max(1, int(MAX_BATCH_BYTES / max(unpacked_per_row, 1))))
    rows = sum(group.num_rows for group in groups[:start])
    for group in range(len(groups))[start:stop]:
        # A batch does not cross row groups, so that rows before a damaged one are read wherever the file is cut.
        for batch in table.iter_batches(rows_per_batch, row_groups=[group], columns=columns):
            rows += len(batch)
            yield batch, int(rows * bytes_per_row)


def _read_arrow(file: IO[bytes], path: Path | RemoteFile, fields: list[str]) -> Iterator[tuple[Any, int]]:
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
    position = file.tell()
    for batch in batches:
        position = file.tell()
        for start in range(0, batch.num_rows, ROWS_PER_BATCH):
            yield batch.select(columns).slice(start, ROWS_PER_BATCH), position
    # A stream that ends without the mark that writers put there was cut short between two batches.
    if not is_indexed and file.tell() == position:
        raise EOFError("the stream has no end mark")


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
