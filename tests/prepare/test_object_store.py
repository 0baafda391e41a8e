"""Sets are copied to a URL, the manifest last: to a folder (file://), and to a real S3 server (slow)."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from folder_contents import read_contents

from glalm.commands.prepare_data import prepare
from glalm.prepare import object_store
from glalm.prepare.object_store import SetCopy, staging_folder
from glalm.prepare.pipeline import prepare_data
from glalm.prepare.writer import SetWriter

ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(url_of_bucket):
    """The URL of a set that does not exist yet."""
    return f"{url_of_bucket}/sets/mine"


@pytest.fixture
def settings(prepared, tmp_path):
    tokenizer = str(prepared / "tokenizer.model")
    return {"tokenizer": tokenizer, "shard_tokens": 1000, "progress": False, "staging": tmp_path / "staging"}


def read_url(url: str) -> dict[str, bytes]:
    filesystem, root = fsspec.url_to_fs(url)
    filesystem.invalidate_cache()
    return {path.removeprefix(f"{root}/"): filesystem.cat_file(path) for path in filesystem.find(root)}


def read_set(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in read_contents(folder).items() if name != object_store.COPIED}


def test_the_set_at_a_url_is_the_set_of_the_folder(url, settings, corpus, tmp_path):
    options = {name: value for name, value in settings.items() if name != "staging"}
    manifest = prepare_data([corpus], tmp_path / "local", **options)
    assert prepare_data([corpus], url, **settings) == manifest
    assert read_url(url) == read_set(tmp_path / "local") == read_set(tmp_path / "staging")
    assert prepare_data([corpus], url, **settings) == manifest  # It is complete.
    (tmp_path / "more").mkdir()
    (tmp_path / "more/x.txt").write_text("more text")
    del settings["tokenizer"], settings["shard_tokens"]
    added = prepare_data([tmp_path / "more"], url, add=True, **settings)
    assert added["books"]["more"]["written"] == 1
    assert read_url(url) == read_set(tmp_path / "staging")


def test_a_complete_set_at_a_url_says_so(url, settings, corpus, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "my staging"
    arguments = ["--out", url, "--staging", str(folder), "--tokenizer", settings["tokenizer"], str(corpus)]
    monkeypatch.setattr(sys, "argv", ["glalm prepare", *arguments])
    assert prepare() == 0
    shown = capsys.readouterr().out
    assert f"{url} is ready: " in shown and ("aws s3 sync" in shown) == url.startswith("s3://")
    assert prepare() == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{url} is already complete: ") and shown.endswith(f" glalm prepare inspect '{folder}'\n")
    filesystem, root = fsspec.url_to_fs(url)
    filesystem.rm_file(f"{root}/manifest.json")
    assert prepare() == 0 and f"{url} is ready: " in capsys.readouterr().out


def test_the_manifest_is_last_and_shards_come_early(url, settings, corpus, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    from glalm.prepare import input_files

    monkeypatch.setattr(input_files, "BATCH_BYTES", 5000)
    add_batch = SetWriter.add_batch
    left = 8

    def kill(self, *args):
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        add_batch(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SetWriter, "add_batch", kill)
        prepare_data([corpus], url, commit_seconds=0, workers=1, **settings)
    early = read_url(url)
    assert early and "manifest.json" not in early
    copied = []
    original = SetCopy._copy_file
    with monkeypatch.context() as patch:
        patch.setattr(SetCopy, "_copy_file", lambda self, entry: copied.append(entry["file"]) or original(self, entry))
        prepare_data([corpus], url, workers=1, **settings)
    complete = read_url(url)
    assert complete == read_set(tmp_path / "staging")
    assert {name: complete[name] for name in early} == early
    recorded = set(complete) - set(copied) - {"manifest.json"}
    assert recorded and recorded <= set(early)  # What was copied before is not copied again.


def test_another_set_at_the_url_is_replaced_only_with_overwrite(url, settings, corpus, tmp_path):
    prepare_data([corpus], url, **settings)
    before = read_url(url)
    shutil.rmtree(tmp_path / "staging")
    changed = {**settings, "shard_tokens": 3000}
    with pytest.raises(ValueError, match=r"has a complete set, but .*staging, from which .*, has none\. .*--overwrite"):
        prepare_data([corpus], url, **changed)
    prepare_data([corpus], f"{url}-other", **changed)
    with pytest.raises(ValueError, match=r"has a complete set, which is not the one that .*--overwrite"):
        prepare_data([corpus], url, **changed)
    assert read_url(url) == before
    prepare_data([corpus], url, overwrite=True, **changed)
    assert read_url(url) == read_set(tmp_path / "staging") != before


def test_the_same_command_resumes_an_interrupted_overwrite(url, settings, corpus, tmp_path, monkeypatch):
    """The set in the staging folder is complete, but not all of it was copied."""
    prepare_data([corpus], url, **settings)
    changed = {**settings, "shard_tokens": 3000, "overwrite": True}
    copy_file = SetCopy._copy_file
    copied = []

    def copy_three(self, entry):
        if len(copied) == 3:
            raise ValueError("the connection is lost")
        copied.append(entry["file"])
        return copy_file(self, entry)

    monkeypatch.setattr(object_store, "THREADS", 1)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="the connection is lost"):
        patch.setattr(SetCopy, "_copy_file", copy_three)
        prepare_data([corpus], url, **changed)
    monkeypatch.setattr(SetWriter, "add_batch", None)  # To prepare the set again would fail.
    prepare_data([corpus], url, **changed)
    assert read_url(url) == read_set(tmp_path / "staging")


def test_a_url_with_other_files_is_not_touched(url, settings, corpus):
    filesystem, root = fsspec.url_to_fs(url)
    filesystem.makedirs(root, exist_ok=True)
    filesystem.pipe_file(f"{root}/notes.txt", b"precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"notes\.txt is not part of a prepared set"):
            prepare_data([corpus], url, overwrite=overwrite, **settings)
    assert read_url(url) == {"notes.txt": b"precious"}


def test_files_that_appear_at_the_url_during_the_preparation_stay(url, settings, corpus, monkeypatch):
    filesystem, root = fsspec.url_to_fs(url)
    finish = SetCopy.finish
    theirs = {"README.md": b"precious", "sub/weights.safetensors": b"precious"}

    def put_files(self):
        for name, content in {**theirs, "train/old/00007.npy": b"of another set"}.items():
            filesystem.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
            filesystem.pipe_file(f"{root}/{name}", content)
        finish(self)

    monkeypatch.setattr(SetCopy, "finish", put_files)
    prepare_data([corpus], url, **settings)
    assert read_url(url) == {**read_set(settings["staging"]), **theirs}
    with pytest.raises(ValueError, match=r"README\.md is not part of a prepared set\. Move it elsewhere"):
        prepare_data([corpus], url, **settings)


def test_a_copy_that_was_changed_is_noticed_and_mended(url, settings, corpus, tmp_path):
    prepare_data([corpus], url, **settings)
    filesystem, root = fsspec.url_to_fs(url)
    name = next(name for name in read_url(url) if name.endswith("00000.npy"))
    filesystem.pipe_file(f"{root}/{name}", b"cut")
    with pytest.raises(ValueError, match=r"has 3 bytes, not [\d,]+\. Run the same command again"):
        prepare_data([corpus], url, **settings)
    filesystem.rm_file(f"{root}/{name}")
    prepare_data([corpus], url, **settings)
    filesystem.rm_file(f"{root}/{name}")
    with pytest.raises(ValueError, match=rf"{name} is missing\. Run the same command again"):
        prepare_data([corpus], url, **settings)
    prepare_data([corpus], url, **settings)
    assert read_url(url) == read_set(tmp_path / "staging")


@pytest.mark.slow
def test_a_killed_preparation_resumes(url, settings, corpus, tmp_path):
    options = {**settings, "staging": str(settings["staging"]), "commit_seconds": 0}
    script = (
        "import time\nfrom glalm.prepare import input_files, pipeline\ninput_files.BATCH_BYTES = 3000\n"
        "from glalm.prepare.writer import SetWriter\nadd = SetWriter.add_batch\n"
        "SetWriter.add_batch = lambda *args: (time.sleep(0.05), add(*args))\n"
        f"pipeline.prepare_data([{str(corpus)!r}], {url!r}, workers=1, **{options!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    while process.poll() is None and not (tmp_path / "staging" / object_store.COPIED).exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert "manifest.json" not in read_url(url)
    prepare_data([corpus], url, workers=1, **settings)
    assert read_url(url) == read_set(tmp_path / "staging")
    assert json.loads(read_url(url)["manifest.json"])["complete"]


def test_the_staging_folder_is_named_after_the_url(corpus, tmp_path):
    assert staging_folder("s3://bucket/sets/mine/") == Path("data/staging/s3/bucket/sets/mine")
    assert staging_folder("gs://bucket/sets/mine") == Path("data/staging/gs/bucket/sets/mine")
    with pytest.raises(ValueError, match=r"s3://bucket/\.\./mine has the part '\.\.'.*Add --staging FOLDER"):
        staging_folder("s3://bucket/../mine")
    with pytest.raises(ValueError, match="--staging is for a URL"):
        prepare_data([corpus], tmp_path / "set", staging=tmp_path / "staging")


@pytest.mark.slow
def test_a_bucket_that_does_not_exist_is_named(url, settings, corpus):
    if url.startswith("s3"):
        with pytest.raises(ValueError, match=r"s3://absent/set cannot be listed .*Check that the bucket exists"):
            prepare_data([corpus], "s3://absent/set", **settings)
