"""What a set is made of does not depend on how many processes made it, nor on how often they were killed."""

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

from glalm.data import files
from glalm.data.shards import SPLITS, TokenSet
from glalm.prepare import encode, pipeline, plan, set_folder, workers, writer
from glalm.prepare import sources as sources_module
from glalm.prepare.pipeline import prepare_data

ROOT = Path(__file__).parents[2]
PATHS = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)}
WORDS = ["if", "x", "(a,", "b):", "'quoted'", "#", "==", "2024", "äöü", "\n", "return", "", "", "yield"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two inputs of 1,500 documents of two origins, with some that are broken or empty."""
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
def unbroken(sources, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "set"
    prepare_data([sources], out, workers=1, **settings)
    return contents(out)


def test_the_books_balance(unbroken, sources):
    manifest = json.loads(unbroken["manifest.json"])
    book = manifest["books"]["mixed"]
    records = [line for path in sorted(sources.iterdir()) for line in path.read_text().split("\n") if line]
    reasons = {"not JSON": "{", "empty": '{"text": ""}', "no field text": '{"body": 1}'}
    assert book["skipped"] == {reason: records.count(line) for reason, line in reasons.items()}
    assert book["read"] == len(records) == book["written"] + sum(book["skipped"].values())
    assert book["written"] == sum(manifest["splits"][split]["documents"] for split in SPLITS)
    inputs = [json.loads(line) for line in unbroken["inputs.jsonl"].splitlines()]
    assert sum(i["read"] for i in inputs) == book["read"] and sum(i["written"] for i in inputs) == book["written"]
    skipped = [json.loads(line) for line in unbroken["skipped.jsonl"].splitlines()]
    for entry in skipped:
        line = (sources / entry["name"]).read_text().split("\n")[entry["record"] - 1]
        assert line == reasons[entry["reason"]]
    assert len(skipped) == sum(book["skipped"].values())
    assert set(manifest["splits"]["train"]["sources"]) == set("xyz")


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(sources, settings, unbroken, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(pipeline, "BYTES_PER_WORKER", 1)
    monkeypatch.setattr(sources_module, "BATCH_BYTES", 10_000)
    monkeypatch.setattr(workers, "PENDING_BYTES", 30_000)
    prepare_data([sources], tmp_path / "set", workers=processes, **settings)
    assert contents(tmp_path / "set") == unbroken


def test_killed_at_random_moments_it_goes_on_from_there(sources, settings, unbroken, tmp_path):
    """kill -9 of a process with two workers, again and again; then one is left to finish."""
    script = (
        "import time\nfrom glalm.prepare import pipeline, sources\nfrom glalm.prepare.writer import SetWriter\n"
        "pipeline.BYTES_PER_WORKER, sources.BATCH_BYTES = 1, 5_000\n"
        "add = SetWriter.add_batch\nSetWriter.add_batch = lambda *args: (time.sleep(0.01), add(*args))\n"
        "if __name__ == '__main__':\n"
        f"    pipeline.prepare_data([{str(sources)!r}], {str(tmp_path / 'set')!r}, workers=2, commit_seconds=0.02, "
        f"**{settings!r})"
    )
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, str(tmp_path / "run.py")]
    where = {"cwd": ROOT, "env": ENVIRONMENT}
    pick, cursors = random.Random(os.getpid()), [cursor(tmp_path / "set")]
    for _ in range(5):
        process = subprocess.Popen(command, **where)
        while process.poll() is None and cursor(tmp_path / "set") == cursors[-1]:
            time.sleep(0.005)
        time.sleep(pick.uniform(0, 0.1))  # past a commit, into what is lost
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        cursors.append(cursor(tmp_path / "set"))
    assert len(cursors) > 3 and cursors[1] != cursors[3], cursors
    subprocess.run(command, check=True, **where)
    assert contents(tmp_path / "set") == unbroken


def cursor(out: Path) -> list[int] | None:
    try:
        return json.loads((out / set_folder.JOURNAL).read_bytes())["cursor"]
    except FileNotFoundError:
        return None


@pytest.mark.parametrize(
    "moment", ["rename_into_place", "atomic_write", "flush_to_disk", "fsync_path", "reopen_truncated"]
)
def test_killed_between_any_two_steps_on_the_disk(sources, settings, unbroken, tmp_path, monkeypatch, moment):
    """Stop before the n-th call of a primitive that changes the disk, for n over the whole work."""

    class Killed(BaseException):
        pass

    monkeypatch.setattr(sources_module, "BATCH_BYTES", 100_000)
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
    assert contents(tmp_path / "set") == unbroken


def test_what_a_commit_counts_on_is_on_the_disk(sources, settings, tmp_path, monkeypatch):
    """After a crash of the machine too: files are synced before they get their names and their folders after it, and
    all that the journal says of files that still grow was synced before it."""
    monkeypatch.setattr(sources_module, "BATCH_BYTES", 20_000)
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
    assert len(commits) > 5 and max(commits) == 2 + 2 * 9  # logs, and two files of each source in each split
    assert not renamed_in


def interrupted(blocks, *args, **kwargs):
    """prepare(...), killed when it has committed so many blocks."""

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
def test_a_file_that_lost_what_was_committed_is_not_written_on(sources, settings, tmp_path, name):
    interrupted(1, [sources], tmp_path / "set", **{**settings, "shard_tokens": 10**6})
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
    """The same inputs, with the same times, which may be changed."""
    return shutil.copytree(sources, tmp_path / "mixed")


@pytest.mark.parametrize("name, blocks", [("a", 1), ("a", 0), ("b", 1)])
def test_it_does_not_go_on_with_inputs_that_have_changed(copied, settings, tmp_path, name, blocks):
    """Read whole (a, 1 block), or not yet; of the same size."""
    interrupted(blocks, [copied], tmp_path / "set", **settings)
    path = copied / f"{name}.jsonl"
    path.write_text(path.read_text().replace("return", "RETURN"))
    with pytest.raises(ValueError, match=rf"{path} has changed since .*set began, .*--overwrite"):
        prepare_data([copied], tmp_path / "set", **settings)
    manifest = prepare_data([copied], tmp_path / "set", overwrite=True, **settings)
    [row] = [r for r in files.read_jsonl(tmp_path / "set/inputs.jsonl") if r["name"] == path.name]
    assert manifest["complete"] and row["sha256"] == files.file_sha256(path)


def test_it_goes_on_with_an_input_that_was_read_whole_and_only_touched(copied, settings, unbroken, tmp_path):
    interrupted(1, [copied], tmp_path / "set", **settings)
    os.utime(copied / "a.jsonl")
    prepare_data([copied], tmp_path / "set", **settings)
    assert contents(tmp_path / "set") == unbroken


def test_an_input_that_changes_while_it_is_read_is_an_error(copied, settings, tmp_path, monkeypatch):
    path, finish = copied / "b.jsonl", writer.SetWriter._finish_input

    def changing(self, *args):
        path.touch()
        finish(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(writer.SetWriter, "_finish_input", changing)
        with pytest.raises(ValueError, match=rf"{path} has changed since"):
            prepare_data([copied], tmp_path / "set", workers=1, **settings)
    with pytest.raises(ValueError, match=rf"{path} has changed since"):
        prepare_data([copied], tmp_path / "set", **settings)


@pytest.mark.parametrize("moment", [1, 2])
def test_killed_as_it_is_finished_nothing_is_done_again(sources, settings, unbroken, tmp_path, monkeypatch, moment):
    killed_at_removal(moment, monkeypatch, [sources], tmp_path / "set", workers=1, **settings)
    monkeypatch.setattr(writer.ShardWriter, "add_document", None)  # it would fail if it wrote again
    prepare_data([sources], tmp_path / "set", workers=1, **settings)
    assert contents(tmp_path / "set") == unbroken


@pytest.mark.parametrize("moment", [2, 3, 4])
def test_killed_as_it_is_overwritten_it_is_not_taken_up_again(
    sources, settings, unbroken, tmp_path, monkeypatch, moment
):
    monkeypatch.setattr(sources_module, "BATCH_BYTES", 20_000)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(writer.SetWriter, "_finish_input", lambda *_: 1 / 0)  # an interruption, at the end of an input
        prepare_data([sources], tmp_path / "set", workers=1, commit_seconds=0, **settings)
    killed_at_removal(moment, monkeypatch, [sources], tmp_path / "set", overwrite=True, workers=1, **settings)
    prepare_data([sources], tmp_path / "set", workers=1, **settings)
    TokenSet(tmp_path / "set", "train").verify_checksums()
    assert contents(tmp_path / "set") == unbroken


def killed_at_removal(moment, monkeypatch, *args, **kwargs):
    """prepare(...), stopped before it removes the `moment`-th file."""

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
        "import os, time\nfrom glalm.prepare.workers import map_in_order\n"
        "def sleep(item):\n    print(os.getpid(), flush=True)\n    time.sleep(60)\n"
        "if __name__ == '__main__':\n    list(map_in_order(sleep, range(2), workers=2, size_of=lambda item: 1))\n"
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


def test_a_full_disk_stops_with_advice_and_loses_nothing(sources, settings, unbroken, tmp_path, monkeypatch):
    """Writes fail, as they do on a full disk, at ever later moments."""
    monkeypatch.setattr(sources_module, "BATCH_BYTES", 20_000)
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
    assert contents(tmp_path / "set") == unbroken


def test_a_small_real_limit_on_file_sizes(sources, settings, tmp_path):
    """The system itself refuses to write on: the process ends with an error, and goes on when it may."""
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


def test_stopped_at_a_broken_document_it_goes_on_when_told_to_skip(sources, settings, unbroken, tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl:\d+: .*--on-error skip"):
        prepare_data([sources], tmp_path / "set", workers=1, **{**settings, "on_error": "stop"})
    prepare_data([sources], tmp_path / "set", workers=1, **settings)
    assert contents(tmp_path / "set") == unbroken


def test_another_command_does_not_go_on_with_an_unfinished_set(sources, settings, tmp_path):
    with pytest.raises(ValueError, match=r"--on-error skip"):
        prepare_data([sources], tmp_path / "set", workers=1, **{**settings, "on_error": "stop"})
    with pytest.raises(ValueError, match=r"unfinished set.*different shard_tokens"):
        prepare_data([sources], tmp_path / "set", **{**settings, "shard_tokens": 7})
    with pytest.raises(ValueError, match=r"unfinished set.*inputs are missing, such as a\.jsonl"):
        prepare_data([sources / "b.jsonl"], tmp_path / "set", **settings)
    with pytest.raises(ValueError, match="so far, because it is still being prepared"):
        from glalm.data.loader import Windows

        begun = plan.Plan(**json.loads((tmp_path / "set/.plan.json").read_text()))
        (tmp_path / "set" / set_folder.JOURNAL).unlink()
        writer.SetWriter(tmp_path / "set", begun).write_manifest(complete=False)
        Windows(TokenSet(tmp_path / "set", "train"), 16)


def test_two_at_once_are_refused(sources, settings, tmp_path):
    (tmp_path / "set").mkdir()
    with (
        set_folder.lock_folder(tmp_path / "set"),
        pytest.raises(ValueError, match="another process is preparing this set"),
    ):
        prepare_data([sources], tmp_path / "set", **settings)


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


def test_memory_does_not_grow_with_the_input(prepared, tmp_path):
    """The most memory that preparing 20 times as much takes is the same, but for noise."""
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
    assert peaks[1] < peaks[0] + 40, peaks  # MiB; the larger input has 160
