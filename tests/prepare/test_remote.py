"""Files at URLs give the set that the same files on a disk give: of a folder (file://), and of an S3 server (slow)."""

import gzip
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from folder_contents import read_contents

from glalm.prepare import input_files, units
from glalm.prepare.pipeline import prepare_data
from glalm.prepare.remote import RemoteFile
from glalm.prepare.sources import describe_skipped_files, parse_source


@pytest.fixture
def corpus_url(url_of_bucket, texts, tmp_path):
    """The URL of a folder with a file of every kind, and a copy of it on a disk."""
    folder = tmp_path / "disk/corpus"
    (folder / "deeper").mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "d.jsonl.gz").touch()
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, folder / "deeper/e.parquet", row_group_size=7)
    with pyarrow.ipc.new_file(str(folder / "deeper/f.arrow"), table.schema) as file:
        file.write_table(table)
    (folder / "deeper/g.txt").write_text(texts[7])
    (folder / "h.csv").write_text("a, b")
    (folder / ".hidden.txt").write_text("hidden")
    filesystem, root = fsspec.url_to_fs(url_of_bucket)
    for name, content in read_contents(folder).items():
        filesystem.makedirs(f"{root}/corpus/{name}".rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(f"{root}/corpus/{name}", content)
    return f"{url_of_bucket}/corpus", folder


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_files_at_a_url_give_the_set_of_the_same_files(corpus_url, prepared, tmp_path, monkeypatch, processes):
    url, folder = corpus_url
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    monkeypatch.setattr(units, "MAX_WHOLE_BYTES", 30_000)
    given = {"tokenizer": prepared / "tokenizer.model", "on_error": "skip", "progress": False}
    expected = prepare_data([folder], tmp_path / "disk_set", workers=1, **given)
    assert prepare_data([url], tmp_path / "url_set", workers=processes, **given) == {
        **expected,
        "fingerprint": expected["fingerprint"],
        "logs": read_logs(tmp_path / "url_set"),
    }
    disk = read_contents(tmp_path / "disk_set")
    remote = read_contents(tmp_path / "url_set")
    differ = {"inputs.jsonl", "manifest.json"}  # Files at a URL have other times, and no SHA-256.
    assert {name: remote[name] for name in remote.keys() - differ} == {
        name: disk[name] for name in disk.keys() - differ
    }
    assert prepare_data([url], tmp_path / "url_set", workers=1, **given)["complete"]
    source = parse_source(url)
    assert describe_skipped_files([source]).endswith(": 1 .csv")
    [single] = parse_source(f"{url}/a.jsonl").inputs
    assert (single.source, single.name) == ("corpus", "a.jsonl")


def read_logs(folder):
    return json.loads((folder / "manifest.json").read_bytes())["logs"]


def test_a_file_at_a_url_that_changes_is_noticed(corpus_url, prepared, tmp_path):
    url, _ = corpus_url
    given = {"tokenizer": prepared / "tokenizer.model", "on_error": "skip", "progress": False}
    prepare_data([url], tmp_path / "set", **given)
    filesystem, path = fsspec.url_to_fs(f"{url}/a.jsonl")
    filesystem.pipe_file(path, b'{"text": "other"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl differs from what .*set has"):
        prepare_data([url], tmp_path / "set", **given)
    assert parse_source(f"{url}/a.jsonl").inputs[0].has_changed() is False


def test_what_cannot_be_read_is_named(url_of_bucket, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: there are no files"):
        parse_source(f"{url_of_bucket}/absent")
    with pytest.raises(ValueError, match=r"nosuch://x cannot be opened: .*install the extra s3"):
        parse_source("nosuch://x")
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"no file to read\. File names must end in"):
        parse_source(f"file://{tmp_path}")
    (tmp_path / "b.jsonl").write_text("{}")
    assert RemoteFile(f"file://{tmp_path}/b.jsonl").stat().st_size == 2
    assert input_files.RemoteInput("s", "b", 2, None, RemoteFile(f"file://{tmp_path}/b.jsonl")).has_changed()


@pytest.mark.parametrize("name", ["a.jsonl", ""])
def test_files_of_a_web_server_are_refused(tmp_path, name):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(
            ValueError, match=r"^http://.* its files are listed without their sizes.* Download them to a disk"
        ):
            parse_source(f"http://127.0.0.1:{server.server_port}/{name}")
    finally:
        server.shutdown()
        server.server_close()
