import gzip
import json
import sysconfig
from pathlib import Path

import pytest
import zstandard

from glalm.data.sources import local, source, stdlib

LINES = ['{"text": "one"}\n', "\n", '{"text": "zwei ▁\\n", "id": 2}\n', '{"text": ""}']
EXPECTED = [("one", "1"), ("zwei ▁\n", "3"), ("", "4")]


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".jsonl", bytes), (".jsonl.gz", gzip.compress), (".jsonl.zst", zstd)]
)
def test_jsonl(tmp_path, suffix, compress):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress("".join(LINES).encode()))
    documents = list(local(path))
    assert [(d.text, d.name.removeprefix(f"a{suffix}:")) for d in documents] == EXPECTED
    assert {d.source for d in documents} == {str(path)}


def test_zstd_in_several_frames_that_cut_a_line(tmp_path):
    data = "".join(LINES).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(data[:20]) + zstd(data[20:]))
    assert [d.text for d in local(tmp_path / "a.jsonl.zst")] == [text for text, _ in EXPECTED]


@pytest.mark.parametrize(("suffix", "compress"), [(".jsonl.gz", gzip.compress), (".jsonl.zst", zstd)])
def test_a_file_that_was_cut_short_is_an_error(tmp_path, suffix, compress):
    data = compress(b'{"text": "a"}\n' * 100)
    path = tmp_path / f"a{suffix}"
    for missing in (3, len(data) // 2):
        path.write_bytes(data[:-missing])
        with pytest.raises(ValueError, match=rf"a{suffix}:\d+: .*end"):
            list(local(path))


@pytest.mark.parametrize("line", ['{"text": 3}', '["text"]', '{"body": "x"}', "{", '"\\ud800"', '{"text": "\\ud800"}'])
def test_a_wrong_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:3: "):
        list(local(tmp_path / "a.jsonl"))


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nna\xefve\n")
    with pytest.raises(ValueError, match=r"a\.txt:2: not UTF-8"):
        list(local(tmp_path))


def test_a_folder_is_read_in_order_and_text_is_not_changed(tmp_path):
    for name in ("b.md", "a/z.py", "a/.hidden.py", ".git/c.txt", "a/c.bin", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'{"text": "\\r\\n"}' if name == "c.jsonl" else b"  \r\n\tx\n")
    folder = local(tmp_path)
    documents = [(d.name, d.text) for d in folder]
    assert documents == [("a/z.py", "  \r\n\tx\n"), ("b.md", "  \r\n\tx\n"), ("c.jsonl:1", "\r\n")]
    assert documents == [(d.name, d.text) for d in folder]  # a second pass


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        local(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"ends in one of \.txt"):
        local(tmp_path)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match=r"a\.parquet.*must end in"):
        local(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="standard library"):
        stdlib(tmp_path)


def test_stdlib_is_the_library_without_tests():
    library = source("stdlib")
    assert list(library.files) == sorted(library.files)
    assert {"argparse.py", "json/decoder.py", "unittest/mock.py"} <= set(library.files)
    assert not [f for f in library.files if {"test", "tests", "idle_test", "site-packages"} & set(f.split("/"))]
    assert 500 < len(library.files) < 1000
    document = next(library.read("json/decoder.py"))
    path = Path(sysconfig.get_path("stdlib")) / "json/decoder.py"
    assert (document.text, document.source) == (path.read_text(encoding="utf-8"), "stdlib")


def test_json_escapes_are_decoded(tmp_path):
    text = "\ttab \U0001f600\u2028 \\n"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert [d.text for d in local(tmp_path / "a.jsonl")] == [text]
