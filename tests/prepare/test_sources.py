import dataclasses
import gzip
import json
import math
import os
import shutil
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glalm.data.files import file_sha256
from glalm.prepare.input_files import FileInput, HubInput, read_batches
from glalm.prepare.records import BadRecord
from glalm.prepare.remote import open_url
from glalm.prepare.sources import (
    _find_path_in_dataset,
    collect_inputs,
    describe_skipped_files,
    find_hub_dataset,
    find_local_files,
    find_stdlib,
    parse_source,
)


def test_a_folder_is_read_in_order_without_hidden_files(tmp_path):
    for name in ("b.md", "a/z.py", "a/.hidden.py", ".git/c.txt", "a/c.bin", "C.JSONL", "d.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_local_files(tmp_path)
    assert [i.name for i in found.inputs] == ["C.JSONL", "a/z.py", "b.md", "d.parquet"]
    assert found.skipped_files == (tmp_path / "a/c.bin",)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    for name in ("corpus/a", "elsewhere/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.txt").touch()
    (tmp_path / "corpus/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus/a/up").symlink_to(tmp_path / "corpus")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "corpus/link")
    assert [i.name for i in find_local_files(tmp_path / "corpus").inputs] == ["a/x.txt", "link/b/x.txt"]


def names_read(*sources):
    inputs, repeated = collect_inputs(list(sources))
    return [str(i.name) for i in inputs], [i.name for i in repeated]


def test_a_file_with_several_names_is_read_once(tmp_path):
    for name in ("v1/a.txt", "v1/b.txt", "v2/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "latest").symlink_to("v1")
    (tmp_path / "v1/a2.txt").symlink_to("a.txt")
    (tmp_path / "v2/hard.txt").hardlink_to(tmp_path / "v1/b.txt")
    found, repeated = names_read(find_local_files(tmp_path))
    assert found == ["v1/a.txt", "v1/b.txt", "v2/c.txt"]
    assert repeated == ["latest/a.txt", "latest/a2.txt", "v1/a2.txt", "latest/b.txt", "v2/hard.txt"]
    other = tmp_path / "elsewhere/one"  # A folder of links alone is read, under the names of the links.
    other.mkdir(parents=True)
    (other / "x.txt").symlink_to(tmp_path / "v1/a.txt")
    (other / "y.txt").symlink_to(tmp_path / "v1/a.txt")
    assert names_read(find_local_files(other)) == (["x.txt"], ["y.txt"])
    assert names_read(find_local_files(tmp_path / "v1"), find_local_files(other))[0] == ["a.txt", "b.txt"]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_links_add_and_lose_no_file(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("tree")
    folders = [root]
    files = []
    for number in range(data.draw(st.integers(1, 12))):
        path = data.draw(st.sampled_from(folders)) / f"{data.draw(st.sampled_from('abc'))}{number}"
        kind = data.draw(st.sampled_from(["folder", "file", "link to a folder", "link to a file", "hard link"]))
        if kind == "folder":
            path.mkdir()
            folders.append(path)
        elif kind == "link to a folder":
            path.symlink_to(data.draw(st.sampled_from(folders)))
        elif kind == "file" or not files:
            path.with_suffix(".txt").write_text(str(number))
            files.append(path.with_suffix(".txt"))
        elif kind == "link to a file":
            path.with_suffix(".txt").symlink_to(data.draw(st.sampled_from(files)))
        else:
            path.with_suffix(".txt").hardlink_to(data.draw(st.sampled_from(files)))
    if files:
        inputs, _ = collect_inputs([find_local_files(root)])
        assert sorted(i.path.read_text() for i in inputs) == sorted(file.read_text() for file in files)
        assert not any(i.path.is_symlink() for i in inputs)


def test_what_is_not_a_file_is_skipped_or_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    os.mkfifo(tmp_path / "b.jsonl")
    found = find_local_files(tmp_path)
    assert [i.name for i in found.inputs] == ["a.txt"]
    assert describe_skipped_files([found]).endswith(": 1 pipes, sockets or devices")
    with pytest.raises(ValueError, match=r"b\.jsonl is a pipe.*Write its content to a file"):
        find_local_files(tmp_path / "b.jsonl")
    (tmp_path / "c.bin").symlink_to("nowhere")
    assert len(find_local_files(tmp_path).skipped_files) == 2
    for name in ("d.jsonl", "v1", "loop"):
        link = tmp_path / name
        link.symlink_to(name if name == "loop" else "nowhere")
        for path in (tmp_path, link):
            with pytest.raises(FileNotFoundError, match=rf"{name} is a link to .*Restore what it leads to"):
                find_local_files(path)
        link.unlink()


def test_names(tmp_path):
    (tmp_path / "books").mkdir()
    file = tmp_path / "books" / "a.txt"
    file.write_text("x")
    for spec, name in [
        (file, "books"),
        (tmp_path / "books", "books"),
        (f"prose={file}", "prose"),
        ("std=stdlib", "std"),
        ("stdlib", "stdlib"),
    ]:
        assert {parse_source(spec).name, parse_source(spec).inputs[0].source} == {name}
    (tmp_path / "a=b.txt").write_text("x")
    assert parse_source(tmp_path / "a=b.txt").inputs[0].name == "a=b.txt"  # an existing path is not NAME=PATH


def test_unreadable_sources_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_local_files(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"must end in one of \.txt"):
        find_local_files(tmp_path)
    (tmp_path / "a.tar").touch()
    with pytest.raises(ValueError, match=r"a\.tar.*must end in"):
        find_local_files(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="standard library"):
        find_stdlib(tmp_path)
    with pytest.raises(ValueError, match="`datasets` cannot open it"):
        find_hub_dataset(str(tmp_path / "absent"))


def test_stdlib_is_the_library_without_tests():
    library = parse_source("stdlib")
    names = [i.name for i in library.inputs]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "unittest/mock.py"} <= set(names)
    assert not [f for f in names if {"test", "tests", "idle_test", "site-packages"} & set(f.split("/"))]
    assert 500 < len(names) < 1000
    found = next(i for i in library.inputs if i.name == "json/decoder.py")
    path = Path(sysconfig.get_path("stdlib")) / "json/decoder.py"
    assert (found.path, found.size) == (path, path.stat().st_size) and isinstance(found, FileInput)


def test_a_hub_data_set_may_have_columns_with_a_dot_in_their_name(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"meta.set": "a", "text": "x", "id": 1}) + "\n")
    [found] = parse_source(f"hf:{tmp_path}").inputs
    assert [r for records, _ in found.read_records(["text", "meta.set"]) for r in records] == [
        {"meta.set": "a", "text": "x"}
    ]


def test_a_hub_data_set_is_streamed_file_by_file(tmp_path):
    """A local folder of a data set is read as one on the hub is."""
    for i in range(3):
        rows = [{"text": f"{i}.{j}", "meta": {"set": "a"}, "more": j} for j in range(5)]
        (tmp_path / f"part-{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = parse_source(f"wiki=hf:{tmp_path}")
    assert [i.source for i in found.inputs] == ["wiki"] * 3
    texts = [[r["text"] for records, _ in i.read_records(["text", "meta"]) for r in records] for i in found.inputs]
    assert texts == [[f"{i}.{j}" for j in range(5)] for i in range(3)]
    other = shutil.copytree(tmp_path, tmp_path / "other")  # Another data set of as many files has other names.
    assert not {i.name for i in found.inputs} & {i.name for i in find_hub_dataset(str(other)).inputs}
    records, size = next(iter(found.inputs[0].read_records(["text"])))
    assert records[0] == {"text": "0.0"} and size == found.inputs[0].size


def test_files_of_a_data_set_are_named_by_their_paths_without_the_revision(tmp_path, monkeypatch):
    (tmp_path / "wiki/data").mkdir(parents=True)
    for name in ("train-0.jsonl", "train-1.jsonl"):
        (tmp_path / "wiki/data" / name).write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    for address in ("wiki", str(tmp_path / "wiki")):
        names = [found.name for found in find_hub_dataset(address).inputs]
        assert names == [f"{address}, data/train-0.jsonl", f"{address}, data/train-1.jsonl"]
    for file, name in {
        "hf://datasets/me/wiki@0ld/data/en/0.parquet": "data/en/0.parquet",
        "hf://datasets/squad@refs%2Fpr%2F1/a.jsonl": "a.jsonl",
        "https://example.org/a.jsonl": "",
        "": "",
    }.items():
        assert _find_path_in_dataset(file, "me/wiki") == name


def test_a_changed_file_of_a_local_data_set_is_described_otherwise(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    [found] = find_hub_dataset(str(tmp_path)).inputs
    assert found.version == str(path) and found.compute_sha256() == file_sha256(path) and not found.has_changed()
    path.write_text('{"text": "b"}\n')
    os.utime(path, ns=(0, 0))
    assert found.has_changed()
    [changed] = find_hub_dataset(str(tmp_path)).inputs
    assert changed.key == found.key and changed.describe() != found.describe()


def read_hub(folder, fields=("text",)):
    """Return the texts of each file of a data set, and the reason where one is damaged."""
    found = []
    for source_input in find_hub_dataset(str(folder)).inputs:
        records = [record for batch in read_batches([source_input], list(fields)) for record in batch.records]
        found.append([r.args[0] if isinstance(r, BadRecord) else r["text"] for r in records])
    return found


def test_a_damaged_file_of_a_hub_data_set_ends_with_a_bad_record(tmp_path):
    lines = "".join(json.dumps({"text": f"{i} {'x' * 5 * (i % 7)}"}) + "\n" for i in range(2000)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n'))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines)[:-2000])
    (tmp_path / "c.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "d.jsonl.zst").write_bytes(b"not zstd")
    (tmp_path / "e.jsonl").write_bytes(b"not JSON\n")
    (tmp_path / "f.jsonl").write_bytes(b'{"text": "last"}\n')
    assert read_hub(tmp_path) == [["one"], *[["damaged file"]] * 4, ["last"]]


def test_rows_before_the_damage_of_a_hub_data_set_are_read(tmp_path):
    table = pyarrow.table({"text": [f"{i}" for i in range(1000)]})
    for name in "ab":
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=300)
    data = bytearray((tmp_path / "b.parquet").read_bytes())
    place = pyarrow.parquet.ParquetFile(tmp_path / "b.parquet").metadata.row_group(2).column(0).data_page_offset
    data[place : place + 40] = b"\xff" * 40
    (tmp_path / "b.parquet").write_bytes(data)
    texts = [f"{i}" for i in range(1000)]
    assert read_hub(tmp_path) == [texts, [*texts[:600], "damaged file"]]


def test_a_parquet_file_of_the_hub_is_cut_like_any_other(tmp_path):
    table = pyarrow.table({"text": [f"{i}" for i in range(1000)], "more": range(1000)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    [found] = find_hub_dataset(str(tmp_path)).inputs
    filesystem, path = open_url(f"memory://{tmp_path}/a.parquet")
    filesystem.pipe_file(path, (tmp_path / "a.parquet").read_bytes())
    on_hub = dataclasses.replace(found, mtime_ns=None, size=1, address=f"memory://{tmp_path}/a.parquet")
    assert found.size == on_hub.expected_bytes == (tmp_path / "a.parquet").stat().st_size
    for source_input in (found, on_hub):
        assert source_input.find_cuts(0, 2**20) == [] and source_input.find_cuts(0, 1) == [1, 2, 3]
        chunks = list(source_input.read_records(["text"], 1, 3))
        assert [row for rows, _ in chunks for row in rows] == [{"text": f"{i}"} for i in range(300, 900)]
        positions = [position for _, position in chunks]
        assert positions == sorted(positions) and 0 < positions[-1] <= source_input.size
    filesystem.rm(path)
    with pytest.raises(
        ValueError, match=r", a\.parquet cannot be read \(FileNotFoundError.*run the same command again"
    ):
        on_hub.find_cuts(0, 1)
    with pytest.raises(ValueError, match=r", a\.parquet cannot be read \(FileNotFoundError"):
        list(on_hub.read_records(["text"]))


def test_other_columns_of_a_hub_data_set_may_change_their_type(tmp_path):
    for name, more in (("a", 1), ("b", {"x": 1}), ("c", None)):
        row = {"text": name} if more is None else {"text": name, "n": more}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    assert read_hub(tmp_path) == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), TimeoutError("network"), KeyError("text")])
def test_a_hub_data_set_that_cannot_be_read_is_not_damaged(tmp_path, error):
    class Dataset:
        column_names = None
        num_shards = 1

        def shard(self, count, index):
            raise error
            yield

    source_input = HubInput("hub", "hub, shard 0 of 1", 1, None, Dataset(), 0)
    assert source_input.expected_bytes == math.inf  # Its file is not known.
    with pytest.raises(ValueError, match=r"shard 0 of 1 cannot be read .*run the same command again"):
        list(source_input.read_records(["text"]))
