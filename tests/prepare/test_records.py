import errno
import gzip
import io
import json
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm.prepare import records
from glalm.prepare.input_files import read_batches
from glalm.prepare.records import (
    BadRecord,
    Document,
    TextFile,
    count_lines,
    estimate_bytes,
    extract_document,
    read_file,
    read_rows,
    select_columns,
)
from glalm.prepare.sources import _describe_file

LINES = ['{"text": "one"}\n', "\n", '{"text": "zwei ▁\\n", "id": 2}\n', '{"text": " "}']
EXPECTED = [(1, "one"), (3, "zwei ▁\n"), (4, " ")]


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def read_texts(path, columns=("text",), field="text"):
    """Return (line, text or reason) of each record."""
    found, number = [], 0
    for some, position in read_file(path, list(columns)):
        assert 0 <= position <= path.stat().st_size
        for record in some:
            number += count_lines(record)
            if isinstance(record, bytes) and not record.strip():
                continue
            try:
                found.append((number, extract_document(record, field, None).text))
            except BadRecord as bad:
                found.append((number, bad.args[0]))
    return found


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".jsonl", bytes), (".jsonl.gz", gzip.compress), (".jsonl.zst", zstd)]
)
@pytest.mark.parametrize("end", ["", "\n"])
def test_jsonl(tmp_path, suffix, compress, end):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress(("".join(LINES) + end).encode()))
    assert read_texts(path) == EXPECTED


@pytest.mark.parametrize("block", [1, 7, 64])
def test_lines_that_blocks_cut(tmp_path, block, monkeypatch):
    monkeypatch.setattr(records, "COMPRESSED_READ_BYTES", block)
    data = "".join(LINES).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(data[:20]) + zstd(data[20:]))  # Two frames.
    assert read_texts(tmp_path / "a.jsonl.zst") == EXPECTED


def test_zstd_with_a_window_of_any_size(tmp_path):
    long = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=28, hash_log=6, chain_log=6
    )  # What zstd --long=28 writes.
    frame = zstandard.ZstdCompressor(compression_params=long).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(frame.compress("".join(LINES).encode()) + frame.flush())
    assert read_texts(tmp_path / "a.jsonl.zst") == EXPECTED


@pytest.mark.parametrize(("suffix", "compress"), [(".jsonl.gz", gzip.compress), (".jsonl.zst", zstd)])
def test_a_file_that_was_cut_short_ends_with_a_broken_record(tmp_path, suffix, compress):
    data = compress(b"".join(b'{"text": "%d"}\n' % i for i in range(100)))
    path = tmp_path / f"a{suffix}"
    for missing in (3, len(data) // 2):
        path.write_bytes(data[:-missing])
        *whole, last = read_texts(path)
        assert whole == [(i + 1, str(i)) for i in range(len(whole))]
        assert last == (len(whole) + 1, "damaged file")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": 3}', "text is no text"),
        (b'["text"]', "not an object"),
        (b'{"body": "x"}', "no field text"),
        (b"{", "not JSON"),
        (b'{"text": "x"} {"text": "y"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "\\ud800"}', "not Unicode"),
        (b'{"text": "na\xefve"}', "not UTF-8"),
        (b'{"text": ""}', "empty"),
        (b'{"text": null}', "text is no text"),
    ],
)
def test_reasons(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "after"}\n')
    assert read_texts(tmp_path / "a.jsonl") == [(1, "fine"), (3, reason), (4, "after")]


def test_details_count_bytes_of_a_line_and_characters_of_a_text(monkeypatch):
    with pytest.raises(BadRecord, match=r"\(invalid start byte at byte 10 of the line\)"):
        extract_document(b'\n\n{"text": "\xff"}', "text", None)
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 10)
    with pytest.raises(BadRecord, match="the text has 11 characters, more than the limit of 10"):
        extract_document({"text": "\N{HIRAGANA LETTER A}" * 11}, "text", None)


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nna\xefve\n")
    assert read_texts(tmp_path / "a.txt") == [(1, "not UTF-8")]
    [([record], _)] = read_file(tmp_path / "a.txt", [])
    with pytest.raises(BadRecord, match=r"at byte 7 of the file, line 2\)"):
        extract_document(record, "text", None)
    with pytest.raises(BadRecord, match=r"at byte 10 of the file, line 2\)"):
        extract_document(TextFile(b"\xef\xbb\xbf" + record.data), "text", None)
    (tmp_path / "b.md").write_bytes(b"\xef\xbb\xbf  \r\n\tx\n")
    assert read_texts(tmp_path / "b.md") == [(1, "  \r\n\tx\n")]


@pytest.mark.parametrize("end", [lambda data: data[:-9], lambda data: data + b"garbage"])
def test_gzip_gives_what_is_before_the_damage(tmp_path, end):
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(1000))
    (tmp_path / "a.jsonl.gz").write_bytes(end(gzip.compress(lines)))
    assert read_texts(tmp_path / "a.jsonl.gz")[:900] == [(i + 1, str(i)) for i in range(900)]
    assert read_texts(tmp_path / "a.jsonl.gz")[-1][1] == "damaged file"


def test_a_record_beyond_all_bounds_is_passed_over_without_holding_it(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + "x" * 5_000_000 + '\n{"text": "b"}\n')
    assert read_texts(tmp_path / "a.jsonl") == [(1, "a"), (2, "too large"), (3, "b")]
    (tmp_path / "a.txt").write_text("x" * 1001)
    assert read_texts(tmp_path / "a.txt") == [(1, "too large")]


def test_nested_fields_and_origins():
    row = {"content": {"body": "x"}, "meta": {"set": "books"}, "n": 1}
    assert extract_document(row, "content.body", "meta.set") == Document("x", "books")
    assert extract_document(json.dumps(row).encode(), "content.body", "meta.set") == Document("x", "books")
    flat = {"content.body": "y", "meta.set": "code"}
    assert extract_document(flat | row, "content.body", "meta.set") == Document(
        "y", "code"
    )  # A field of the full name goes first.
    assert extract_document(json.dumps(flat).encode(), "content.body", "meta.set") == Document("y", "code")
    with pytest.raises(BadRecord, match=r"no field meta\.name.*only set; name one of them with --source-field"):
        extract_document(row, "content.body", "meta.name")
    with pytest.raises(BadRecord, match=r"no field text.*; name one of them with --text-field\W*$"):
        extract_document(row, "text", "meta.set")
    for fields, option in ((["text", "meta.set"], "--text-field"), (["content", "source"], "--source-field")):
        with pytest.raises(ValueError, match=rf"; name one of them with {option}\."):
            select_columns("a.parquet", fields, list(row))
    with pytest.raises(BadRecord, match="not Unicode"):
        extract_document(b'{"text": "x", "set": "\\ud800"}', "text", "set")


def test_what_a_record_takes_is_counted_wherever_its_text_is():
    text = "x" * 1000
    for record in (text.encode(), TextFile(text.encode()), {"text": text}, {"a": {"b": [{"c": text}]}, "n": 1}):
        assert 1000 <= estimate_bytes(record) < 1100
    assert estimate_bytes({"text": None}) > 0  # So that rows without text end a batch, too.


ROWS = [{"text": f"row {i}", "meta": {"set": "a"}, "n": i} for i in range(600)] + [{"text": None, "meta": None, "n": 1}]
TABLE_EXPECTED = [(i + 1, f"row {i}") for i in range(600)] + [(601, "text is no text")]


def write_table(path, table):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=250)
        return
    make = pyarrow.ipc.new_stream if "stream" in path.name else pyarrow.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=300)


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_tables(tmp_path, name):
    path = tmp_path / name
    write_table(path, pyarrow.Table.from_pylist(ROWS))
    assert read_texts(path, ["text", "meta"]) == TABLE_EXPECTED
    some, _ = next(iter(read_file(path, ["text", "meta"])))
    assert some[0] == {"text": "row 0", "meta": {"set": "a"}}  # Other columns are not read.
    with pytest.raises(ValueError, match=rf"{name}.*no column 'txt'\. It has text, meta, n"):
        read_texts(path, ["txt"])
    path.write_bytes(path.read_bytes()[:-100])
    assert read_texts(path)[-1][1] == "damaged file"


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_columns_with_a_dot_in_their_name(tmp_path, name):
    path = tmp_path / name
    write_table(path, pyarrow.table({"m.text": ["own"], "m": [{"text": "nested", "set": "a"}], "n": [1]}))
    assert read_texts(path, ["m.text"], "m.text") == [(1, "own")]
    [(record, *_)] = [some for some, _ in read_file(path, ["m.text", "m.set"]) if some]
    assert extract_document(record, "m.text", "m.set") == Document("own", "a") and "n" not in record
    with pytest.raises(ValueError, match=r"no column 'o\.text'\. It has m\.text, m, n"):
        read_texts(path, ["o.text"])


@pytest.mark.parametrize("name", ["A.PARQUET", "A.ARROW", "A.JSONL.GZ", "A.TXT"])
def test_endings_in_capitals(tmp_path, name):
    path = tmp_path / name
    if name.endswith(("PARQUET", "ARROW")):
        write_table(tmp_path / name.lower(), pyarrow.table({"text": ["one"]}))
        (tmp_path / name.lower()).rename(path)
    else:
        path.write_bytes(gzip.compress(b'{"text": "one"}') if name.endswith("GZ") else b"one")
    assert read_texts(path) == [(1, "one")]


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_rows_that_are_not_utf8_are_left_out_alone(tmp_path, name):
    path = tmp_path / name
    data = pyarrow.array([b"one", b"na\xefve", b"three"])
    write_table(path, pyarrow.table({"text": pyarrow.StringArray.from_buffers(3, *data.buffers()[1:])}))
    assert read_texts(path) == [(1, "one"), (2, "damaged row"), (3, "three")]


def test_a_table_damaged_in_its_midst(tmp_path):
    path = tmp_path / "a.parquet"
    write_table(path, pyarrow.Table.from_pylist(ROWS))
    data = bytearray(path.read_bytes())
    place = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    assert read_texts(path) == [*TABLE_EXPECTED[:500], (501, "damaged file")]  # Row groups have 250 rows.


def test_an_arrow_file_that_points_outside_of_itself(tmp_path):
    """Without validation, to read it crashes the process."""
    path = tmp_path / "stream.arrow"
    write_table(path, pyarrow.table({"text": ["one", "two", "three"]}))
    offsets = np.array([0, 3, 6, 11], np.int32).tobytes()
    path.write_bytes(path.read_bytes().replace(offsets, np.array([0, 3, 2**30, 11], np.int32).tobytes()))
    assert read_texts(path) == [(1, "one"), (2, "damaged row"), (3, "damaged row")]


def test_a_disk_that_cannot_be_read_is_not_a_damaged_table(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    write_table(path, pyarrow.Table.from_pylist(ROWS))

    class Disk(io.FileIO):
        def read(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(type(path), "open", lambda path, mode: Disk(path))
    with pytest.raises(OSError, match="Input/output error"):
        read_texts(path)


def test_rows_of_a_stream_come_some_at_a_time():
    blocks = list(read_rows(({"text": str(i)} for i in range(600)), size=9))
    assert [len(some) for some, _ in blocks] == [256, 256, 88]
    assert blocks[-1][1] == 9


def test_broken_records_keep_their_reason():
    with pytest.raises(BadRecord) as caught:
        extract_document(BadRecord("damaged file", "at byte 5"), "text", None)
    assert caught.value.args == ("damaged file", "at byte 5")


def test_integers_of_any_length():
    line = b'{"text": "x", "n": [' + b"7" * 5000 + b", -" + b"9" * 4301 + b"]}"
    assert extract_document(line, "text", None) == Document("x", None)
    with pytest.raises(BadRecord, match="text is no text"):
        extract_document(b'{"text": ' + b"7" * 5000 + b"}", "text", None)


def test_an_arrow_stream_cut_anywhere_is_damaged(tmp_path):
    whole = io.BytesIO()
    table = pyarrow.table({"text": [f"row {i}" for i in range(30)]})
    ends = []
    with pyarrow.ipc.new_stream(whole, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=10):
            writer.write_batch(batch)
            ends.append(whole.tell())
    path = tmp_path / "a.arrow"
    expected = [(i + 1, f"row {i}") for i in range(30)]
    for size in range(ends[0] - 8, len(whole.getvalue())):
        path.write_bytes(whole.getvalue()[:size])
        rows = 10 * sum(end <= size for end in ends)
        assert read_texts(path) == [*expected[:rows], (rows + 1, "damaged file")]
    path.write_bytes(whole.getvalue())
    assert read_texts(path) == expected


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_file_without_content_is_damaged(tmp_path, suffix):
    (tmp_path / f"a{suffix}").touch()
    assert read_texts(tmp_path / f"a{suffix}") == [(1, "damaged file")]


@settings(max_examples=60)
@given(
    lines=st.lists(st.sampled_from([b"", b"", b" \t", b"\r", b'{"text": "a"}', b' {"text": "b"} \r', b"x", b"\f"])),
    cuts=st.lists(st.integers(1, 40)),
    last_newline=st.booleans(),
)
def test_lines_have_their_numbers_wherever_blocks_end(lines, cuts, last_newline):
    data = b"\n".join(lines) + b"\n" * last_newline
    splitter = records._LineSplitter()
    found = []
    for size in [*cuts, len(data)]:
        found += splitter.split(data[:size])
        data = data[size:]
    items = records.parse_records([*found, splitter.take_pending()], 0, "text", None)
    bad_lines = [number for number, line in enumerate(lines, 1) if line == b"x"]
    texts = [json.loads(line)["text"] for line in lines if line.strip().startswith(b"{")]
    results = list(items)
    assert [item.number for item in results if isinstance(item, records.SkippedRecord)] == bad_lines
    assert [item.text for item in results if isinstance(item, Document)] == texts


def peak_bytes(function):
    """Return the most memory that a function takes beyond what is taken before."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("suffix", "open_file"), [(".gz", gzip.open), (".zst", zstandard.open)])
@pytest.mark.parametrize("content", [b"\n", b"a", b" "])
def test_memory_does_not_grow_with_what_a_file_unpacks_to(tmp_path, suffix, open_file, content, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 2**20)
    path = tmp_path / f"a.jsonl{suffix}"
    with open_file(path, "wb") as file:
        for _ in range(64):
            file.write(content * 2**20)

    def read():
        for batch in read_batches([_describe_file("s", tmp_path, path.name)], ["text"]):
            assert len(batch.records) <= 2**14

    assert peak_bytes(read) < 48 * 2**20  # of the 64 MiB in the file


def test_a_batch_of_a_parquet_file_is_as_large_as_its_rows_allow(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"{i}" + "x" * 2**20 for i in range(64)]}), path)
    sizes = [len(rows) for rows, _ in read_file(path, ["text"])]
    assert sum(sizes) == 64 and max(sizes) <= 16
