import json
import shutil
import sysconfig
from pathlib import Path

import pytest

from glalm.prepare.sources import FileInput, find_hub_dataset, find_local_files, find_stdlib, parse_source


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
