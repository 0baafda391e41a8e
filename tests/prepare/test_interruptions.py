"""The content of a set depends neither on the number of processes nor on how often they were killed."""

import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from byte_tokenizer import ByteTokenizer
from folder_contents import read_contents

from glalm.data import files
from glalm.data.shards import SPLITS, TokenSet
from glalm.prepare import encode, input_files, pipeline, plan, set_folder, units, writer
from glalm.prepare.pipeline import prepare_data
from glalm.prepare.sources import Source, find_hub_dataset

ROOT = Path(__file__).parents[2]
PATHS = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)}
WORDS = ["if", "x", "(a,", "b):", "'quoted'", "#", "==", "2024", "äöü", "\n", "return", "", "", "yield"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two inputs of 1,500 records from three sources, some of which are bad or empty."""
    folder = tmp_path_factory.mktemp("sources") / "mixed"
    folder.mkdir()
    pick = random.Random(0)
    for name in ("a", "b"):
        lines = []
        for i in range(1500):
            text = f"{i} " + " ".join(pick.choices(WORDS, k=pick.randrange(60)))
            row = {"text": text, "meta": {"set": pick.choice("xyz")}}
            lines.append(json.dumps(row) if i % 50 else pick.choice(["{", '{"text": ""}', '{"body": 1}', ""]))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def settings(prepared):
    return {
        "tokenizer": str(prepared / "tokenizer.model"),
        "shard_tokens": 20_000,
        "source_field": "meta.set",
        "on_error": "skip",
        "progress": False,
    }


@pytest.fixture(scope="module")
def uninterrupted(sources, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "set"
    prepare_data([sources], out, workers=1, **settings)
    return read_contents(out)


def test_the_counts_are_consistent(uninterrupted, sources):
    manifest = json.loads(uninterrupted["manifest.json"])
    counts = manifest["books"]["mixed"]
    records = [line for path in sorted(sources.iterdir()) for line in path.read_text().split("\n") if line]
    reasons = {"not JSON": "{", "empty": '{"text": ""}', "no field text": '{"body": 1}'}
    assert counts["skipped"] == {reason: records.count(line) for reason, line in reasons.items()}
    assert counts["read"] == len(records) == counts["written"] + sum(counts["skipped"].values())
    assert counts["written"] == sum(manifest["splits"][split]["documents"] for split in SPLITS)
    inputs = [json.loads(line) for line in uninterrupted["inputs.jsonl"].splitlines()]
    assert sum(i["read"] for i in inputs) == counts["read"] and sum(i["written"] for i in inputs) == counts["written"]
    skipped = [json.loads(line) for line in uninterrupted["skipped.jsonl"].splitlines()]
    for entry in skipped:
        line = (sources / entry["name"]).read_text().split("\n")[entry["record"] - 1]
        assert line == reasons[entry["reason"]]
    assert len(skipped) == sum(counts["skipped"].values())
    assert set(manifest["splits"]["train"]["sources"]) == set("xyz")


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    sources, settings, uninterrupted, tmp_path, monkeypatch, processes
):
    monkeypatch.setattr(pipeline, "BYTES_PER_WORKER", 1)
    monkeypatch.setattr(input_files, "BATCH_BYTES", 10_000)
    monkeypatch.setattr(units, "UNIT_BYTES", 30_000)
    prepare_data([sources], tmp_path / "set", workers=processes, **settings)
    assert read_contents(tmp_path / "set") == uninterrupted


@pytest.mark.slow
def test_killed_at_random_moments_it_resumes(sources, settings, uninterrupted, tmp_path):
    """Kill a process with two workers by SIGKILL again and again, and let the last one finish."""
    script = (
        "import time\nfrom glalm.prepare import input_files, pipeline, units\n"
        "from glalm.prepare.writer import SetWriter\n"
        "pipeline.BYTES_PER_WORKER, input_files.BATCH_BYTES, units.UNIT_BYTES = 1, 5_000, 20_000\n"
        "add = SetWriter.add_batch\nSetWriter.add_batch = lambda *args: (time.sleep(0.01), add(*args))\n"
        "if __name__ == '__main__':\n"
        f"    pipeline.prepare_data([{str(sources)!r}], {str(tmp_path / 'set')!r}, workers=2, commit_seconds=0.02, "
        f"**{settings!r})"
    )
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, str(tmp_path / "run.py")]
    where = {"cwd": ROOT, "env": ENVIRONMENT}
    pick, positions = random.Random(os.getpid()), [read_position(tmp_path / "set")]
    for _ in range(5):
        process = subprocess.Popen(command, **where)
        while process.poll() is None and read_position(tmp_path / "set") == positions[-1]:
            time.sleep(0.005)
        time.sleep(pick.uniform(0, 0.1))  # Continue past the commit, into work that is lost.
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        positions.append(read_position(tmp_path / "set"))
    assert len(positions) > 3 and positions[1] != positions[3], positions
    subprocess.run(command, check=True, **where)
    assert read_contents(tmp_path / "set") == uninterrupted


def read_position(out: Path) -> list[int] | None:
    try:
        return json.loads((out / set_folder.JOURNAL).read_bytes())["cursor"]
    except FileNotFoundError:
        return None


@pytest.mark.parametrize(
    "moment", ["rename_into_place", "atomic_write", "flush_to_disk", "fsync_path", "reopen_truncated"]
)
def test_killed_between_any_two_steps_on_the_disk(sources, settings, uninterrupted, tmp_path, monkeypatch, moment):
    """Stop before the n-th call of a function that changes the disk, for several n."""

    class Killed(BaseException):
        pass

    monkeypatch.setattr(input_files, "BATCH_BYTES", 100_000)
    total = [0]
    original = getattr(files, moment)

    def counted(*args):
        total[0] += 1
        if total[0] == limit:
            raise Killed
        return original(*args)

    for module in (files, writer, plan, set_folder):
        if hasattr(module, moment):
            monkeypatch.setattr(module, moment, counted)
    deaths = 0
    for limit in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 10**9):  # noqa: B007 (counted reads it)
        total[0] = 0
        try:
            prepare_data([sources], tmp_path / "set", workers=1, commit_seconds=0, **settings)
            break
        except Killed:
            deaths += 1
    assert deaths >= 3
    assert read_contents(tmp_path / "set") == uninterrupted


def test_a_commit_relies_only_on_what_is_on_disk(sources, settings, tmp_path, monkeypatch):
    """A crash of the machine loses nothing either: files are flushed before they are renamed, and their folders after
    it. What the journal says of growing files was flushed before the journal."""
    monkeypatch.setattr(input_files, "BATCH_BYTES", 20_000)
    out, synced, commits, fsync, replace = tmp_path / "set", {}, [], os.fsync, os.replace
    renamed_in = set()

    def syncing(fd):
        fsync(fd)
        path = os.readlink(f"/proc/self/fd/{fd}")
        synced[path] = os.fstat(fd).st_size
        renamed_in.discard(Path(path))

    def replacing(source, target):
        assert not renamed_in
        assert synced.pop(source, None) == os.path.getsize(source), source
        if target.name == set_folder.JOURNAL:
            state, sizes = json.loads(Path(source).read_bytes()), {}
            sizes |= {out / name: size for name, size in state["logs"].items()}
            for split, entries in state["splits"].items():
                for name, entry in entries.items():
                    if entry["open"]:
                        shard = f"{split}/{name}/.{len(entry['shards']):05d}"
                        sizes[out / f"{shard}.npy.tmp"] = writer.HEADER_BYTES + 2 * entry["open"]["tokens"]
                        sizes[out / f"{shard}.docs.npy.tmp"] = writer.HEADER_BYTES + 8 * (
                            entry["open"]["documents"] + 1
                        )
            assert {path: synced.get(str(path)) for path in sizes} == sizes
            commits.append(len(sizes))
        replace(source, target)
        renamed_in.add(target.parent)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    prepare_data([sources], out, workers=1, commit_seconds=0, **settings)
    assert len(commits) > 5 and max(commits) == 2 + 2 * 9  # Two logs, and two files for each source and split.
    assert not renamed_in


def prepare_interrupted(blocks, *args, **kwargs):
    """Call prepare_data, and stop it after this many batches were committed."""

    class Killed(BaseException):
        pass

    left, write = [blocks], writer.SetWriter.add_batch

    def counted(*args):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        write(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(writer.SetWriter, "add_batch", counted)
        prepare_data(*args, workers=1, commit_seconds=0, **kwargs)


@pytest.mark.parametrize("name", ["train/x/.00000.npy.tmp", "test/y/.00000.docs.npy.tmp", "skipped.jsonl"])
def test_a_file_that_lost_committed_bytes_is_refused(sources, settings, tmp_path, name):
    prepare_interrupted(1, [sources], tmp_path / "set", **{**settings, "shard_tokens": 10**6})
    path = tmp_path / "set" / name
    size = path.stat().st_size
    for there in (size - 1, 0):
        os.truncate(path, there)
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"{path} has {there} bytes, but {size} were .*--overwrite"):
                prepare_data([sources], tmp_path / "set", **{**settings, "shard_tokens": 10**6})
    path.unlink()
    with pytest.raises(ValueError, match=f"{path} has 0 bytes"):
        prepare_data([sources], tmp_path / "set", **{**settings, "shard_tokens": 10**6})


@pytest.fixture
def copied(sources, tmp_path):
    """A copy of the inputs, with the same times, that a test may change."""
    return shutil.copytree(sources, tmp_path / "mixed")


@pytest.mark.parametrize("name, blocks", [("a", 1), ("a", 4), ("b", 5)])
def test_inputs_that_changed_after_they_were_read_are_refused_on_resume(
    copied, settings, tmp_path, monkeypatch, name, blocks
):
    """The changed input has the same size, and was read completely (a, after 4 batches) or in part."""
    monkeypatch.setattr(input_files, "BATCH_BYTES", 120_000)
    prepare_interrupted(blocks, [copied], tmp_path / "set", **settings)
    path = copied / f"{name}.jsonl"
    path.write_text(path.read_text().replace("return", "RETURN"))
    with pytest.raises(ValueError, match=rf"{path} has changed since .*set began, .*--overwrite"):
        prepare_data([copied], tmp_path / "set", **settings)
    manifest = prepare_data([copied], tmp_path / "set", overwrite=True, **settings)
    [row] = [r for r in files.read_jsonl(tmp_path / "set/inputs.jsonl") if r["name"] == path.name]
    assert manifest["complete"] and row["sha256"] == files.file_sha256(path)


def test_an_input_that_changed_before_it_was_read_is_accepted_on_resume(copied, settings, tmp_path, capsys):
    """Such as one with a bad record, after its correction. What was prepared before it is not prepared again."""
    prepare_interrupted(1, [copied], tmp_path / "set", **settings)
    path = copied / "b.jsonl"
    path.write_text(path.read_text().replace("return", "RETURNED"))
    with pytest.MonkeyPatch.context() as patch:
        read = []
        add_batch = writer.SetWriter.add_batch
        patch.setattr(writer.SetWriter, "add_batch", lambda *args: (read.append(args[-1].name), add_batch(*args)))
        prepare_data([copied], tmp_path / "set", workers=1, **(settings | {"progress": True}))
    assert read == ["b.jsonl"] and "b.jsonl has changed, before it was read" in capsys.readouterr().err
    prepare_data([copied], tmp_path / "other", **settings)
    found, expected = (read_contents(tmp_path / name) for name in ("set", "other"))
    manifests = [json.loads(contents.pop("manifest.json")) for contents in (found, expected)]
    assert found == expected
    # The fingerprint is of the sizes with which the set was begun.
    assert manifests[0] == manifests[1] | {"fingerprint": manifests[0]["fingerprint"]}


def find_version(folder, commit: str) -> list[Source]:
    """Return the data set in a folder as one of the hub, which knows the commit of a file but no time."""
    inputs = []
    for found in find_hub_dataset(str(folder), "wiki").inputs:
        address = f"hf://datasets/me/wiki@{commit}/{Path(found.address).name}"
        size = 9 + len(commit)  # It is an estimate, and may be another one for each version.
        inputs.append(dataclasses.replace(found, size=size, mtime_ns=None, address=address, version=address))
    return [Source("wiki", tuple(inputs))]


def test_another_version_of_a_data_set_is_refused_on_resume(tmp_path, prepared):
    """Without @REVISION the hub gives its newest version, whose files may repeat what was read, or lack something."""
    (tmp_path / "wiki").mkdir()
    for name in "ab":
        (tmp_path / f"wiki/{name}.jsonl").write_text(json.dumps({"text": f"the text of {name}"}) + "\n")
    old, new = find_version(tmp_path / "wiki", "0ld"), find_version(tmp_path / "wiki", "newer")
    given = {"tokenizer": prepared / "tokenizer.model", "held_out": {}, "progress": False}
    prepare_interrupted(1, old, tmp_path / "set", **given)
    with pytest.raises(ValueError, match=r"wiki, a\.jsonl has changed since .*old revision, @0ld, or .*--overwrite"):
        prepare_data(new, tmp_path / "set", **given)
    assert prepare_data(old, tmp_path / "set", **given)["complete"]
    assert prepare_data(new, tmp_path / "set", **given)["complete"]  # Nothing of it is missing.


def test_the_new_files_of_a_data_set_of_the_hub_are_added(tmp_path, prepared):
    (tmp_path / "wiki").mkdir()

    def write(*names):
        for name in names:
            (tmp_path / f"wiki/{name}.jsonl").write_text(json.dumps({"text": f"the text of {name}"}) + "\n")

    write("a", "b")
    given = {"tokenizer": prepared / "tokenizer.model", "held_out": {}, "progress": False}
    prepare_data(find_version(tmp_path / "wiki", "0ld"), tmp_path / "set", **given)
    write("0", "c")
    grown = find_version(tmp_path / "wiki", "newer")
    assert prepare_data(grown, tmp_path / "set", add=True, progress=False)["books"]["wiki"]["written"] == 4
    (tmp_path / "wiki/c.jsonl").rename(tmp_path / "wiki/d.jsonl")
    renamed = find_version(tmp_path / "wiki", "newest")
    with pytest.raises(ValueError, match=r"now has d\.jsonl, and no longer c\.jsonl.*@REVISION.*NAME=hf:"):
        prepare_data(renamed, tmp_path / "set", add=True, progress=False)
    other = [Source("other", tuple(dataclasses.replace(found, source="other") for found in renamed[0].inputs))]
    assert prepare_data(other, tmp_path / "set", add=True, progress=False)["books"]["other"]["written"] == 4


def test_added_sources_may_have_fields_of_other_names(texts, prepared, tmp_path):
    given = {"tokenizer": prepared / "tokenizer.model", "held_out": {}, "progress": False}
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": texts[0], "from": "wiki"}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"content": texts[1], "from": "wiki"}) + "\n")
    (tmp_path / "code").mkdir()
    for i in (2, 3):
        (tmp_path / f"code/{i}.jsonl").write_text(json.dumps({"content": texts[i]}) + "\n")
    out = tmp_path / "set"
    prepare_data([tmp_path / "a.jsonl"], out, source_field="from", **given)
    settings = json.loads((out / "manifest.json").read_text())["settings"]
    add = {"add": True, "text_field": "content", "progress": False}
    prepare_data([tmp_path / "b.jsonl"], out, **add)
    prepare_interrupted(1, [tmp_path / "code"], out, source_field="", **add)
    with pytest.raises(ValueError, match=r"unfinished set, with different --text-field, --source-field\."):
        prepare_data([tmp_path / "code"], out, add=True, progress=False)
    manifest = prepare_data([tmp_path / "code"], out, source_field="", **add)
    assert manifest["settings"] == settings
    assert {name: counts["written"] for name, counts in manifest["books"].items()} == {tmp_path.name: 2, "code": 2}
    assert manifest["splits"]["train"]["sources"].keys() == {"wiki", "code"}
    assert prepare_data([tmp_path / "a.jsonl"], out, source_field="from", **given) == manifest


def test_a_touched_input_that_was_read_completely_is_accepted_on_resume(copied, settings, uninterrupted, tmp_path):
    prepare_interrupted(1, [copied], tmp_path / "set", **settings)
    os.utime(copied / "a.jsonl")
    prepare_data([copied], tmp_path / "set", **settings)
    assert read_contents(tmp_path / "set") == uninterrupted


def test_an_input_that_changes_while_it_is_read_is_an_error(copied, settings, tmp_path, monkeypatch):
    path, finish = copied / "b.jsonl", writer.SetWriter._finish_input

    def changing(self, *args):
        path.touch()
        finish(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(writer.SetWriter, "_finish_input", changing)
        with pytest.raises(ValueError, match=rf"{path} changed while it was read.*same command again"):
            prepare_data([copied], tmp_path / "set", workers=1, **settings)
    # Nothing of the file was committed, so the set has its new content only.
    assert prepare_data([copied], tmp_path / "set", **settings)["complete"]


@pytest.mark.parametrize("moment", [1, 2])
def test_killed_while_finishing_nothing_is_repeated(sources, settings, uninterrupted, tmp_path, monkeypatch, moment):
    prepare_killed_at_removal(moment, monkeypatch, [sources], tmp_path / "set", workers=1, **settings)
    monkeypatch.setattr(writer.ShardWriter, "add_document", None)  # To write again would fail.
    prepare_data([sources], tmp_path / "set", workers=1, **settings)
    assert read_contents(tmp_path / "set") == uninterrupted


def test_the_same_command_resumes_an_interrupted_overwrite(sources, settings, uninterrupted, tmp_path, monkeypatch):
    out = tmp_path / "set"
    given = {"overwrite": True, **settings}
    prepare_data([sources / "a.jsonl"], out, **settings)
    prepare_interrupted(1, [sources], out, **given)
    with monkeypatch.context() as patch:
        read = []
        add_batch = writer.SetWriter.add_batch
        patch.setattr(writer.SetWriter, "add_batch", lambda *args: (read.append(args[-1].name), add_batch(*args)))
        prepare_data([sources], out, workers=1, **given)
        assert read == ["b.jsonl"] and read_contents(out) == uninterrupted
        read.clear()
        prepare_data([sources], out, workers=1, **given)  # Nothing is unfinished.
        assert read == ["a.jsonl", "b.jsonl"]
    prepare_interrupted(1, [sources], out, **given)
    prepare_data([sources], out, **{**given, "shard_tokens": 10_000})  # This is another set.
    prepare_interrupted(1, [sources], out, **given)
    os.truncate(out / "skipped.jsonl", 0)
    with pytest.raises(ValueError, match=r"skipped\.jsonl has 0 bytes.*--overwrite"):
        prepare_data([sources], out, **settings)
    prepare_data([sources], out, **given)
    assert read_contents(out) == uninterrupted


@pytest.mark.parametrize("moment", [2, 3, 4])
def test_killed_while_overwriting_the_old_set_is_not_resumed(
    sources, settings, uninterrupted, tmp_path, monkeypatch, moment
):
    monkeypatch.setattr(input_files, "BATCH_BYTES", 20_000)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(writer.SetWriter, "_finish_input", lambda *_: 1 / 0)  # An interruption at the end of an input.
        prepare_data([sources], tmp_path / "set", workers=1, commit_seconds=0, **settings)
    prepare_killed_at_removal(moment, monkeypatch, [sources], tmp_path / "set", overwrite=True, workers=1, **settings)
    prepare_data([sources], tmp_path / "set", workers=1, **settings)
    TokenSet(tmp_path / "set", "train").verify_checksums()
    assert read_contents(tmp_path / "set") == uninterrupted


def prepare_killed_at_removal(moment, monkeypatch, *args, **kwargs):
    """Call prepare_data, and stop it before it removes the `moment`-th file."""

    class Killed(BaseException):
        pass

    left, unlink = [moment], Path.unlink

    def counted(self, missing_ok=False):
        left[0] -= self.exists()
        if left[0] == 0:
            raise Killed
        unlink(self, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", counted)
        prepare_data(*args, **kwargs)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = (
        "import os, time\nfrom glalm.prepare.workers import stream_in_order\n"
        "def sleep(item):\n    print(os.getpid(), flush=True)\n    time.sleep(60)\n"
        "if __name__ == '__main__':\n    list(stream_in_order(sleep, range(2), workers=2, size_of=lambda item: 1))\n"
    )
    (tmp_path / "parent.py").write_text(script)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.02)


def test_a_full_disk_stops_with_advice_and_loses_nothing(sources, settings, uninterrupted, tmp_path, monkeypatch):
    """Writes fail as on a full disk, later and later."""
    monkeypatch.setattr(input_files, "BATCH_BYTES", 20_000)
    add, left = writer.ShardWriter.add_document, [0]

    def full(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(writer.ShardWriter, "add_document", full)
        for room in (0, 100, 700, 1300):
            left[0] = room
            with pytest.raises(
                OSError, match=r"disk is full\. Free some space and run the same command again"
            ) as caught:
                prepare_data([sources], tmp_path / "set", workers=1, commit_seconds=0, **settings)
            assert caught.value.errno == errno.ENOSPC
    prepare_data([sources], tmp_path / "set", workers=1, **settings)
    assert read_contents(tmp_path / "set") == uninterrupted


def test_a_small_real_limit_on_file_sizes(sources, settings, tmp_path):
    """The system limits the size of files: the process ends with an error, and resumes without the limit."""
    script = (
        "import resource, signal, sys\nfrom glalm.prepare.pipeline import prepare_data\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (30_000, -1))\n"
        f"prepare_data([{str(sources)!r}], {str(tmp_path / 'set')!r}, workers=1, **{settings!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    manifest = prepare_data([sources], tmp_path / "set", workers=1, **settings)
    assert manifest["complete"]


def test_stopped_at_a_bad_record_it_resumes_with_skip(sources, settings, uninterrupted, tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl:\d+: .*--on-error skip"):
        prepare_data([sources], tmp_path / "set", workers=1, **{**settings, "on_error": "stop"})
    prepare_data([sources], tmp_path / "set", workers=1, **settings)
    assert read_contents(tmp_path / "set") == uninterrupted


ONE_BAD_LINE = '{"text": "a first text"}\n{"body": "a second text"}\n'


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_command_that_has_written_nothing_does_not_hinder_the_next(tmp_path, prepared, interrupted):
    """What the message advises works: another field, or a corrected line."""
    path = tmp_path / "a.jsonl"
    path.write_text(ONE_BAD_LINE)
    given = {"tokenizer": prepared / "tokenizer.model", "held_out": {}, "progress": False}
    if interrupted:  # The files of the set stay.
        prepare_interrupted(0, [path], tmp_path / "set", on_error="skip", **given)
    else:
        with pytest.raises(ValueError, match=r"a\.jsonl:2: no field 'text', only body"):
            prepare_data([path], tmp_path / "set", **given)
    other_field = prepare_data([path], tmp_path / "set", text_field="body", on_error="skip", **given)
    assert count_written(other_field) == 1
    shutil.rmtree(tmp_path / "set")
    with pytest.raises(ValueError, match=r"a\.jsonl:2"):
        prepare_data([path], tmp_path / "set", **given)
    path.write_text(ONE_BAD_LINE.replace("body", "text"))
    assert count_written(prepare_data([path], tmp_path / "set", **given)) == 2


@pytest.mark.parametrize("error", ["bad record", "kill"])
def test_an_addition_that_has_written_nothing_leaves_the_set_complete(prepared, corpus, tmp_path, error):
    out = shutil.copytree(prepared, tmp_path / "set")
    before = read_contents(out)
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.jsonl").write_text('{"text": ""}\n')
    path = tmp_path / "more/b.jsonl"
    path.write_text(ONE_BAD_LINE)
    if error == "kill":  # after a commit of the first input, which has no text
        prepare_interrupted(1, [tmp_path / "more"], out, add=True, on_error="skip", progress=False)
    else:
        with pytest.raises(ValueError, match=r"b\.jsonl:2: no field 'text'"):
            prepare_data([tmp_path / "more"], out, add=True, commit_seconds=0, progress=False)
    assert TokenSet(out, "train").is_complete
    failed = shutil.copytree(out, tmp_path / "failed")
    prepare_data([corpus], out, vocab_size=400, shard_tokens=1000, progress=False)  # the set's own command
    assert read_contents(out) == before
    path.write_text(ONE_BAD_LINE.replace("body", "text"))
    manifest = prepare_data([tmp_path / "more"], failed, add=True, progress=False)
    assert manifest["complete"] and manifest["books"]["more"] == {"read": 3, "written": 2, "skipped": {"empty": 1}}


def count_written(manifest: dict) -> int:
    return sum(counts["written"] for counts in manifest["books"].values())


def test_another_command_does_not_resume_an_unfinished_set(sources, settings, tmp_path):
    prepare_interrupted(1, [sources], tmp_path / "set", **settings)
    with pytest.raises(ValueError, match=r"unfinished set.*different --shard-tokens"):
        prepare_data([sources], tmp_path / "set", **{**settings, "shard_tokens": 7})
    with pytest.raises(ValueError, match=r"unfinished set.*inputs are missing, such as a\.jsonl"):
        prepare_data([sources / "b.jsonl"], tmp_path / "set", **settings)
    with pytest.raises(ValueError, match="so far, because it is still being prepared"):
        from glalm.data.loader import Windows

        begun = plan.Plan(**json.loads((tmp_path / "set/.plan.json").read_text()))
        (tmp_path / "set" / set_folder.JOURNAL).unlink()
        writer.SetWriter(tmp_path / "set", begun).write_manifest(complete=False)
        Windows(TokenSet(tmp_path / "set", "train"), 16)


def test_two_preparations_of_one_set_are_refused(sources, settings, tmp_path):
    (tmp_path / "set").mkdir()
    with set_folder.lock_folder(tmp_path / "set"):
        with pytest.raises(ValueError, match="another process is working in this folder"):
            prepare_data([sources], tmp_path / "set", **settings)
        assert [path.name for path in (tmp_path / "set").iterdir()] == [set_folder.LOCK]


@pytest.mark.slow
def test_a_document_of_100_mb(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "Tokenizer", ByteTokenizer)
    text = "0123456789abcde " * (100 * 2**20 // 16)
    with open(tmp_path / "a.jsonl", "w") as file:
        file.write('{"text": "before"}\n{"text": "' + text + '"}\n{"text": "after"}\n')
    given = {"tokenizer": prepared / "tokenizer.model", "held_out": {}, "shard_tokens": 10**6, "progress": False}
    prepare_data([tmp_path / "a.jsonl"], tmp_path / "set", workers=1, **given)
    tokens = TokenSet(tmp_path / "set", "train")
    assert sorted(tokens.document_lengths.tolist()) == [7, 8, 100 * 2**20 + 2]
    assert bytes(tokens.read_document(1)[1:-1].astype(np.uint8)) == text.encode()
    assert [len(s) for s in tokens._shards] == [8, 100 * 2**20 + 2, 7]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(prepared, tmp_path):
    """The peak memory is the same for 20 times as much input, apart from noise."""
    script = (
        "import sys, resource\nfrom glalm.prepare import encode\nfrom glalm.prepare.pipeline import prepare_data\n"
        f"sys.path.append({str(Path(__file__).parent)!r})\n"
        "from byte_tokenizer import ByteTokenizer\nencode.Tokenizer = ByteTokenizer\n"
        f"prepare_data([sys.argv[1]], sys.argv[1] + '.set', tokenizer={str(prepared / 'tokenizer.model')!r}, "
        "workers=1, progress=False, commit_seconds=0.2, shard_tokens=10**7)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for copies in (1, 20):
        folder = tmp_path / f"n{copies}"
        folder.mkdir()
        lines = [json.dumps({"text": f"{i} " + "x" * 4000}) + "\n" for i in range(2000)]
        with open(folder / "a.jsonl", "w") as file:
            for _ in range(copies):
                file.writelines(lines)
        done = subprocess.run(
            [sys.executable, "-c", script, folder], cwd=ROOT, capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout) // 1024)
    assert peaks[1] < peaks[0] + 40, peaks  # MiB; the larger input has 160 MiB.


def test_tokenizer_of_a_killed_preparation_is_removed(corpus, tmp_path, monkeypatch):
    """Nothing is left in the system's folder of temporary files, where no later command would look for it."""
    system_folder = tmp_path / "tmp"
    system_folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(system_folder))
    out = tmp_path / "set"

    def stop(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(plan, "remove_set", stop)
        prepare_data([corpus], out, vocab_size=300, progress=False)
    assert [path.name for path in out.iterdir()] == [".tokenizer.model.tmp"]
    prepare_data([corpus], out, vocab_size=300, progress=False)
    assert not [*out.rglob("*.tmp")] and not [*system_folder.iterdir()]
    TokenSet(out, "train").verify_checksums()


@pytest.mark.parametrize("name", [".plan.json", ".journal.json"])
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"cursor": 1}'])
def test_a_damaged_plan_or_journal_is_named(sources, settings, tmp_path, monkeypatch, name, content):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer.SetWriter, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_data([sources], tmp_path / "set", commit_seconds=0, workers=1, **settings)
    (tmp_path / "set" / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        prepare_data([sources], tmp_path / "set", workers=1, **settings)
    prepare_data([sources], tmp_path / "set", overwrite=True, workers=1, **settings)


def test_a_folder_that_is_replaced_during_the_preparation_is_not_written_to(sources, settings, tmp_path, monkeypatch):
    """Another process may prepare a set in the folder that has the name now."""
    out = tmp_path / "set"
    original = writer.SetWriter.add_batch

    def replace_folder(self, *args):
        original(self, *args)
        out.rename(tmp_path / "moved")
        out.mkdir()

    monkeypatch.setattr(writer.SetWriter, "add_batch", replace_folder)
    with pytest.raises(ValueError, match="set was removed while the set was being prepared"):
        prepare_data([sources], out, commit_seconds=0, workers=1, **settings)
    assert list(out.iterdir()) == []
