import gzip
import json
from itertools import pairwise

import pyarrow
import pyarrow.parquet
import pytest
from folder_contents import read_contents
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm.prepare import pipeline, units
from glalm.prepare.input_files import Input, Position, RecordBatch, read_part
from glalm.prepare.pipeline import prepare_data
from glalm.prepare.records import Document, find_cuts, parse_records, read_file
from glalm.prepare.sources import _describe_file, find_hub_dataset

LINES = [b"", b"", b" \t", b"\r", b'{"text": "a"}', b' {"text": "b"} \r', b"x", b'{"text": "' + b"c" * 50 + b'"}']


def describe(path):
    return _describe_file("s", path.parent, path.name)


def read_items(parts_of_units):
    """Return the documents, and the numbers of the lines that have none, of units that are read one by one."""
    items = []
    before = 0
    for unit in parts_of_units:
        assert not isinstance(unit, RecordBatch)
        for part in unit:
            for batch in read_part(part, ["text"], batch_bytes=200):
                for item in parse_records(batch.records, batch.first, "text", None):
                    items.append(item.text if isinstance(item, Document) else before + item.number)
            before += batch.end
    return items


@settings(max_examples=40)
@given(st.lists(st.sampled_from(LINES), max_size=30), st.booleans(), st.integers(1, 120))
def test_parts_of_a_file_of_lines_are_its_lines(tmp_path_factory, lines, last_newline, part_bytes):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * last_newline)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_BYTES", part_bytes)
        found = read_items(units.cut_units([describe(path)], ["text"], Position()))
    expected = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            expected.append(json.loads(line)["text"] if line != b"x" else number)
    assert found == expected
    size = path.stat().st_size
    assert find_cuts(path, 0, part_bytes) == list(range(part_bytes, size, part_bytes))


@settings(max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 4000), st.data())
def test_parts_of_a_parquet_file_are_its_rows(tmp_path_factory, group_rows, part_bytes, data):
    path = tmp_path_factory.mktemp("rows") / "a.parquet"
    table = pyarrow.table({"text": [f"row {i} {'x' * (i % 50)}" for i in range(sum(group_rows))]})
    with pyarrow.parquet.ParquetWriter(path, table.schema) as writer:
        start = 0
        for rows in group_rows:
            writer.write_table(table.slice(start, rows))
            start += rows
    cuts = [0, *find_cuts(path, 0, part_bytes), None]
    texts = []
    for start, stop in pairwise(cuts):
        texts += [row["text"] for rows, _ in read_file(path, ["text"], start, stop) for row in rows]
    assert texts == table.column("text").to_pylist()
    index = data.draw(st.integers(0, len(cuts) - 2))
    assert find_cuts(path, cuts[index], part_bytes) == cuts[index + 1 : -1]  # A resumed preparation cuts as before.


def test_small_files_share_a_unit_and_large_ones_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 1000)
    monkeypatch.setattr(units, "MAX_WHOLE_BYTES", 2000)
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("x" * 300)
    (tmp_path / "5.jsonl").write_text('{"text": "y"}\n' * 200)
    (tmp_path / "6.jsonl.gz").write_bytes(gzip.compress(b'{"text": "z"}\n'))
    (tmp_path / "7.txt").write_text("x" * 2001)
    inputs = [describe(path) for path in sorted(tmp_path.iterdir())]
    found = []
    for unit in units.cut_units(inputs, ["text"], Position()):
        batches = [unit] if isinstance(unit, RecordBatch) else unit
        found.append(("read" if batches[0] is unit else "parts", [item.input_index for item in batches]))
    cut = [("parts", [5])] * 3  # 2,800 bytes
    assert found == [("parts", [0, 1, 2]), ("parts", [3, 4]), *cut, ("parts", [6]), ("read", [7])]
    [(first, *_), *_] = units.cut_units(inputs, ["text"], Position(input=5, start=1000, records=3, before=72))
    assert (first.start, first.stop, first.skip) == (1000, 2000, 3)


@pytest.mark.parametrize(("size", "files", "expected"), [(100, 10_000, 10), (2**24, 3, 4), (100, 3, 1)])
def test_there_are_processes_for_units_of_tiny_files(size, files, expected):
    assert units.limit_workers(64, [Input("s", f"{i}", size, 0) for i in range(files)]) == expected
    assert units.limit_workers(2, [Input("s", f"{i}", size, 0) for i in range(files)]) == min(2, expected)


def test_sizes_are_asked_for_until_there_are_enough_units():
    asked = []

    class StreamedInput(Input):
        @property
        def expected_bytes(self):
            asked.append(self.name)
            return units.UNIT_BYTES / 2

    inputs = [StreamedInput("s", f"{i}", 1, None) for i in range(1000)]
    assert units.limit_workers(4, inputs) == 4 and asked == ["0", "1", "2", "3", "4", "5"]
    assert units.limit_workers(1, inputs) == 1 and len(asked) == 6
    assert units.limit_workers(4, inputs[:2]) == 2


@pytest.fixture(scope="module")
def many_kinds(tmp_path_factory, texts):
    """A folder with the same documents in files of every kind, one of which is damaged in its midst."""
    folder = tmp_path_factory.mktemp("kinds") / "kinds"
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n\n" for text in texts)
    (folder / "a.jsonl").write_text(lines + "{\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pyarrow.table({"text": texts})
    for name in ("c", "d"):
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=7)
    data = bytearray((folder / "c.parquet").read_bytes())
    place = pyarrow.parquet.ParquetFile(folder / "c.parquet").metadata.row_group(5).column(0).data_page_offset
    data[place : place + 40] = b"\xff" * 40
    (folder / "c.parquet").write_bytes(data)
    with pyarrow.ipc.new_stream(str(folder / "e.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=9)
    for number, text in enumerate(texts):
        (folder / f"f{number:02d}.txt").write_text(text)
    return folder


@pytest.mark.parametrize("unit_bytes", [100, 3000, 20_000])
def test_units_of_any_size_give_the_same_set(many_kinds, texts, prepared, tmp_path, monkeypatch, unit_bytes):
    given = {"tokenizer": prepared / "tokenizer.model", "on_error": "skip", "progress": False, "workers": 1}
    books = prepare_data([many_kinds], tmp_path / "whole", **given)["books"]["kinds"]
    assert books["skipped"] == {"not JSON": 1, "damaged file": 1}
    monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
    prepare_data([many_kinds], tmp_path / "cut", **given)
    assert read_contents(tmp_path / "cut") == read_contents(tmp_path / "whole")
    skipped = [json.loads(line) for line in (tmp_path / "cut/skipped.jsonl").read_text().splitlines()]
    expected = [("a.jsonl", 2 * len(texts) + 1), ("c.parquet", 5 * 7 + 1)]  # The damage is in its sixth row group.
    assert [(row["name"], row["record"]) for row in skipped] == expected


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 5])
def test_processes_give_the_same_set_of_every_kind(many_kinds, texts, prepared, tmp_path, monkeypatch, processes):
    hub = tmp_path / "hub"
    hub.mkdir()
    tables = tmp_path / "tables"
    tables.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tables / "a.parquet", row_group_size=7)
    for number in range(4):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[number::4])
        (hub / f"{number}.jsonl").write_text(rows)
    monkeypatch.setattr(units, "UNIT_BYTES", 3000)
    monkeypatch.setattr(pipeline, "BYTES_PER_WORKER", 1)
    inputs = find_hub_dataset(str(hub)).inputs
    assert [source_input.expected_bytes for source_input in inputs] == [
        (hub / f"{number}.jsonl").stat().st_size for number in range(4)
    ]
    assert not any(isinstance(unit, RecordBatch) for unit in units.cut_units(list(inputs), ["text"], Position()))
    given = {"tokenizer": prepared / "tokenizer.model", "on_error": "skip", "progress": False}
    sources = [many_kinds, f"hub=hf:{hub}", f"tables=hf:{tables}"]
    prepare_data(sources, tmp_path / "one", workers=1, **given)
    prepare_data(sources, tmp_path / "many", workers=processes, **given)
    assert read_contents(tmp_path / "many") == read_contents(tmp_path / "one")
