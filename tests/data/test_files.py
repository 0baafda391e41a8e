import os

import pytest

from glalm.data.files import atomic_write, read_jsonl, reopen_truncated, temporary_path, try_lock, write_json


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"incomplete")
        raise ZeroDivisionError
    assert path.read_text() == '{"old": 1}'
    write_json(path, {"new": 2})
    assert path.read_text() == '{"new": 2}' and not temporary_path(path).exists()


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


def test_a_folder_is_locked_once(tmp_path):
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    assert try_lock(first) and not try_lock(second)
    os.close(first)
    assert try_lock(second)
    os.close(second)
