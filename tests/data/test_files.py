import errno
import json
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm.config.strict import RunError
from glalm.data import files
from glalm.data.files import (
    DamagedFile,
    UnreadableFile,
    atomic_write,
    find_mismatch,
    hold_lock,
    read_file,
    read_json,
    read_jsonl,
    remove_entry,
    reopen_truncated,
    temporary_folder,
    temporary_path,
    try_lock,
    write_json,
)
from glalm.prepare.set_folder import lock_folder

# What a killed process, or somebody else, may have left under a name: a file, a link, or a folder of them.
LEFTOVERS = st.recursive(
    st.sampled_from(["file", "link to a folder", "link to nothing"]),
    lambda entries: st.dictionaries(st.sampled_from("abc"), entries, max_size=3),
    max_leaves=6,
)


def create(path, entry, outside):
    """Create an entry of LEFTOVERS."""
    if isinstance(entry, dict):
        path.mkdir()
        for name, inner in entry.items():
            create(path / name, inner, outside)
    elif entry == "file":
        path.write_text("half a mod")
    else:
        path.symlink_to(outside if entry == "link to a folder" else outside / "nothing")


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"incomplete")
        raise ZeroDivisionError
    assert path.read_text() == '{"old": 1}'
    write_json(path, {"new": 2})
    assert path.read_text() == '{"new": 2}' and not temporary_path(path).exists()


def test_a_write_on_a_full_disk_names_the_file_and_frees_what_it_took(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{tmp_path / 'a'}'")):
        write_json(tmp_path / "a", [1] * 9999)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_a_last_line_that_was_cut_short_is_skipped(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"a": 1}, {"a": 2}]


def test_reopening_discards_what_follows(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"flushed and lost")
    with reopen_truncated(path, 7) as file:
        file.write(b"!")
    assert path.read_bytes() == b"flushed!"
    with pytest.raises(ValueError, match="has 8 bytes, but 9 were flushed"):
        reopen_truncated(path, 9)
    reopen_truncated(path, 0).close()
    assert path.read_bytes() == b""


def test_a_lock_is_held_once_and_leaves_no_file(tmp_path):
    path = tmp_path / "lock"
    for _ in range(2):
        with hold_lock(path) as first, hold_lock(path) as second:
            assert (first, second) == (True, False)
        assert not path.exists()


def test_a_lock_whose_file_was_just_removed_is_taken_anew(tmp_path, monkeypatch):
    """Its last holder removes the file after this process has opened it, and before it locks it."""
    path = tmp_path / "lock"

    def remove_and_lock(file):
        monkeypatch.undo()
        path.unlink()
        return try_lock(file)

    monkeypatch.setattr(files, "try_lock", remove_and_lock)
    with hold_lock(path) as first, hold_lock(path) as second:
        assert (first, second) == (True, False)


def test_only_regular_files_open_for_writing_are_locked(tmp_path, monkeypatch):
    """NFS locks a folder on one machine only, and refuses an exclusive lock of a file that is open for reading."""
    modes = []

    def record_mode(file):
        modes.append((stat.S_ISREG(os.fstat(file.fileno()).st_mode), file.writable()))
        return try_lock(file)

    monkeypatch.setattr(files, "try_lock", record_mode)
    with temporary_folder(tmp_path / "mine"), lock_folder(tmp_path):
        pass
    assert modes == [(True, True)] * 2 and list(tmp_path.iterdir()) == []


DAMAGED_CONTENT = {
    "empty": b"",
    "cut": b'{"a": {"b": [1,',
    "zeros": bytes(40),
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "nested too deeply": b"[" * 100_000,
    "a number of too many digits": b"1" * 5_000,
    "another type": b"[1, 2]",
}


@pytest.mark.parametrize("content", DAMAGED_CONTENT.values(), ids=DAMAGED_CONTENT)
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=rf"^{path} is damaged: "):
        read_json(path)


def test_what_is_no_regular_file_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "away")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("folder", "not a regular one"), ("dangling", "a link to .*away"), ("pipe", "regular")):
        with pytest.raises(DamagedFile, match=rf"{name} is .*{message}"):
            read_json(tmp_path / name)
    with pytest.raises(UnreadableFile, match="cannot be read: File name too long"):
        read_file(tmp_path / ("n" * 300))
    write_json(tmp_path / "file.json", {"a": 1})
    (tmp_path / "link").symlink_to("file.json")
    assert read_json(tmp_path / "link", {"a": int}) == {"a": 1}
    for missing in ("nothing", "file.json/below"):
        with pytest.raises(FileNotFoundError, match=missing):
            read_json(tmp_path / missing)
    assert issubclass(DamagedFile, RunError)  # A command prints its message and no traceback.


@pytest.mark.parametrize(
    "value, shape, mismatch",
    [
        ({"a": {"b": [1, 2]}, "more": 0}, {"a": {"b": [int]}}, None),
        ({"a": {"b": [1, "2"]}}, {"a": {"b": [int]}}, "a.b[1] is of the wrong type, str"),
        ({"a": {}}, {"a": {"b": int}}, "a has no 'b'"),
        ({}, {"a": int}, "its content has no 'a'"),
        ({"x": {"n": 1}, "y": {"n": True}}, {str: {"n": int}}, "y.n is of the wrong type, bool"),
        ({"a": None}, {"a": (int, type(None))}, None),
        ({"a": "uint8"}, {"a": {"uint16", "uint32"}}, "a is none of uint16, uint32"),
        ([], {}, "its content is not an object"),
        ({"a": {}}, {"a": [int]}, "a is not a list"),
    ],
)
def test_mismatches_are_located(value, shape, mismatch):
    assert find_mismatch(value, shape) == mismatch


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda children: st.lists(children, max_size=2) | st.dictionaries(st.sampled_from("abc"), children, max_size=3),
)


@settings(max_examples=60)
@given(value=JSON_VALUES, cut=st.integers(0, 40))
def test_read_json_returns_the_shape_or_raises_one_error(tmp_path_factory, value, cut):
    """Whatever a file holds, its reader can index it as the shape says, or gets a DamagedFile."""
    path = tmp_path_factory.mktemp("any") / "file.json"
    path.write_bytes(json.dumps(value).encode()[: cut or None])
    try:
        content = read_json(path, {"a": {"b": int}, "c": [str]})
    except DamagedFile as error:
        assert str(path) in str(error)
        return
    assert isinstance(content["a"]["b"], int) and all(isinstance(item, str) for item in content["c"])


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(DamagedFile, match=r"rows\.jsonl is damaged in line 2"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_removing_a_link_leaves_what_it_leads_to(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "away")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "below").mkdir(parents=True)
    for name in ("link", "dangling", "file", "folder", "nothing"):
        remove_entry(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "file"]


@settings(max_examples=25, deadline=None)
@given(leftover=st.none() | LEFTOVERS, completes=st.booleans())
def test_a_temporary_folder_is_empty_and_leaves_nothing(leftover, completes):
    """What links lead to stays."""
    with TemporaryDirectory() as name:
        root = Path(name)
        (root / "outside").mkdir()
        (root / "outside" / "file").write_text("not ours")
        (root / "models").mkdir()
        path = root / "models" / "mine"
        if leftover is not None:
            create(temporary_path(path), leftover, root / "outside")
        with suppress(ZeroDivisionError), temporary_folder(path) as folder:
            assert [*folder.iterdir()] == []
            (folder / "content").write_text("whole")
            if not completes:
                raise ZeroDivisionError
            folder.rename(path)
        found = [entry.relative_to(path.parent).as_posix() for entry in path.parent.rglob("*")]
        assert found == (["mine", "mine/content"] if completes else [])
        assert (root / "outside" / "file").read_text() == "not ours"


def test_a_temporary_folder_belongs_to_one_process(tmp_path):
    with temporary_folder(tmp_path / "mine") as folder:
        (folder / "content").touch()
        with pytest.raises(BlockingIOError, match=r"Another process is writing .*\.mine\.tmp"):
            temporary_folder(tmp_path / "mine").__enter__()
        assert (folder / "content").exists()
