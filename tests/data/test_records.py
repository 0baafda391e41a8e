import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from glalm.data import records
from glalm.data.records import BadDocument, Broken, document, read_file, read_rows

LINES = ['{"text": "one"}\n', "\n", '{"text": "zwei ▁\\n", "id": 2}\n', '{"text": " "}']
EXPECTED = [(1, "one"), (3, "zwei ▁\n"), (4, " ")]


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def read(path, columns=("text",), field="text"):
    """(line, text or reason) of each record."""
    found, number = [], 0
    for some, position in read_file(path, list(columns)):
        assert 0 <= position <= path.stat().st_size
        for record in some:
            number += 1
            if isinstance(record, bytes) and not record.strip():
                continue
            try:
                found.append((number, document(record, field, None)[0]))
            except BadDocument as bad:
                found.append((number, bad.args[0]))
    return found


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".jsonl", bytes), (".jsonl.gz", gzip.compress), (".jsonl.zst", zstd)]
)
@pytest.mark.parametrize("end", ["", "\n"])
def test_jsonl(tmp_path, suffix, compress, end):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress(("".join(LINES) + end).encode()))
    assert read(path) == EXPECTED


@pytest.mark.parametrize("block", [1, 7, 64])
def test_lines_that_blocks_cut(tmp_path, block, monkeypatch):
    monkeypatch.setattr(records, "READ", block)
    data = "".join(LINES).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(data[:20]) + zstd(data[20:]))  # several frames, too
    assert read(tmp_path / "a.jsonl.zst") == EXPECTED


@pytest.mark.parametrize(("suffix", "compress"), [(".jsonl.gz", gzip.compress), (".jsonl.zst", zstd)])
def test_a_file_that_was_cut_short_ends_with_a_broken_record(tmp_path, suffix, compress):
    data = compress(b"".join(b'{"text": "%d"}\n' % i for i in range(100)))
    path = tmp_path / f"a{suffix}"
    for missing in (3, len(data) // 2):
        path.write_bytes(data[:-missing])
        *whole, last = read(path)
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
    assert read(tmp_path / "a.jsonl") == [(1, "fine"), (3, reason), (4, "after")]


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nna\xefve\n")
    assert read(tmp_path / "a.txt") == [(1, "not UTF-8")]
    [([record], _)] = read_file(tmp_path / "a.txt", [])
    with pytest.raises(BadDocument, match="line 2"):
        document(record, "text", None)
    (tmp_path / "b.md").write_bytes(b"\xef\xbb\xbf  \r\n\tx\n")
    assert read(tmp_path / "b.md") == [(1, "  \r\n\tx\n")]


def test_a_record_beyond_all_bounds_is_passed_over_without_holding_it(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LARGEST", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + "x" * 5_000_000 + '\n{"text": "b"}\n')
    assert read(tmp_path / "a.jsonl") == [(1, "a"), (2, "too large"), (3, "b")]
    (tmp_path / "a.txt").write_text("x" * 1001)
    assert read(tmp_path / "a.txt") == [(1, "too large")]


def test_nested_fields_and_origins():
    row = {"content": {"body": "x"}, "meta": {"set": "books"}, "n": 1}
    assert document(row, "content.body", "meta.set") == ("x", "books")
    assert document(json.dumps(row).encode(), "content.body", "meta.set") == ("x", "books")
    with pytest.raises(BadDocument, match=r"no field meta\.name"):
        document(row, "content.body", "meta.name")


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
    assert read(path, ["text", "meta"]) == TABLE_EXPECTED
    some, _ = next(iter(read_file(path, ["text", "meta"])))
    assert some[0] == {"text": "row 0", "meta": {"set": "a"}}  # no other column is read
    with pytest.raises(ValueError, match=rf"{name}.*no column 'txt' but text, meta, n"):
        read(path, ["txt"])
    path.write_bytes(path.read_bytes()[:-100])
    assert read(path)[-1][1] == "damaged file"


def test_rows_of_a_stream_come_some_at_a_time():
    blocks = list(read_rows(({"text": str(i)} for i in range(600)), size=9))
    assert [len(some) for some, _ in blocks] == [256, 256, 88]
    assert blocks[-1][1] == 9


def test_broken_records_keep_their_reason():
    with pytest.raises(BadDocument) as caught:
        document(Broken("damaged file", "at byte 5"), "text", None)
    assert caught.value.args == ("damaged file", "at byte 5")
