import json
import os
import resource
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm.data.files import DamagedFile, read_jsonl
from glalm.train import metrics as metrics_module
from glalm.train.metrics import MetricsWriter, read_last_row, read_metrics


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def test_rows_are_written_at_once(folder, run_config):
    with MetricsWriter(folder, run_config, "id", 0, is_main_process=True) as metrics:
        metrics.write_row({"step": 1, "loss": 2.5})
        assert read_jsonl(folder / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]


def test_resuming_drops_later_rows_and_a_torn_line(folder, run_config):
    written = "".join(json.dumps({"step": i}) + "\n" for i in range(6))
    (folder / "metrics.jsonl").write_text(written + '{"step": 6, "lo')
    with MetricsWriter(folder, run_config, "id", 3, is_main_process=True) as metrics:
        metrics.write_row({"step": 4, "loss": 1.0})
    assert read_jsonl(folder / "metrics.jsonl") == [{"step": i} for i in range(4)] + [{"step": 4, "loss": 1.0}]


def test_resuming_skips_the_rows_that_a_crash_of_the_machine_damaged(folder, run_config, capsys):
    """They are zeros where the file had grown and its content was not on the disk yet."""
    path = folder / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + bytes(30) + b'\n{"step": 2}\n' + bytes(9))
    assert read_metrics(path) == ([{"step": 0}, {"step": 2}], [bytes(30), bytes(9)])
    with MetricsWriter(folder, run_config, "id", 3, is_main_process=True):
        assert read_jsonl(path) == [{"step": 0}, {"step": 2}]
    assert "skipped 2 unreadable lines" in capsys.readouterr().err
    assert read_metrics(path) == ([{"step": 0}, {"step": 2}], [])
    assert read_metrics(folder / "nothing.jsonl") == ([], [])


@pytest.mark.parametrize("line", ["[1, 2]", "3", "{}", '{"step": "1"}', '{"step": 1, "loss": "low"}', "[" * 9999, "ä"])
def test_lines_that_are_no_rows_are_skipped(folder, run_config, capsys, line):
    path = folder / "metrics.jsonl"
    damaged = line.encode("latin-1")
    path.write_bytes(b'{"step": 0}\n' + damaged + b'\n{"step": 2, "loss": null}\n')
    assert read_metrics(path) == ([{"step": 0}, {"step": 2, "loss": None}], [damaged])
    with MetricsWriter(folder, run_config, "id", 3, is_main_process=True):
        assert read_jsonl(path) == [{"step": 0}, {"step": 2, "loss": None}]
    assert "skipped 1 unreadable lines" in capsys.readouterr().err
    assert (folder / "metrics.damaged.jsonl").read_bytes() == damaged + b"\n"


def test_the_lines_of_every_damage_are_kept(folder, run_config):
    for line in (b"first", b"second"):
        with open(folder / "metrics.jsonl", "ab") as file:
            file.write(line)
        with MetricsWriter(folder, run_config, "id", 3, is_main_process=True):
            pass
    assert (folder / "metrics.damaged.jsonl").read_bytes() == b"first\nsecond\n"


LINES = st.one_of(
    st.builds(lambda step: json.dumps({"step": step, "loss": 2.5}).encode(), st.integers(0, 10**6)),
    st.binary(max_size=40).filter(lambda line: b"\n" not in line),
)


@given(lines=st.lists(LINES, max_size=12), last_bytes=st.integers(1, 200))
@settings(max_examples=100)
def test_the_last_row_is_that_of_the_whole_file(tmp_path_factory, lines, last_bytes):
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    assert read_last_row(path) is None
    path.write_bytes(b"\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_module, "LAST_BYTES", last_bytes)
        assert read_last_row(path) == (read_metrics(path)[0] or [None])[-1]


def test_the_last_row_of_a_long_file_is_read_from_its_end(folder, monkeypatch):
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(20_000)))
    parsed = []
    loads = json.loads
    monkeypatch.setattr(metrics_module.json, "loads", lambda line: parsed.append(line) or loads(line))
    assert read_last_row(path) == {"step": 19_999}
    assert sum(map(len, parsed)) <= 65_536


@pytest.mark.parametrize("start_step", [0, 2])
def test_rows_of_repeated_steps_are_kept_elsewhere(folder, run_config, start_step):
    rows = [{"step": i} for i in range(5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with MetricsWriter(folder, run_config, "id", start_step, is_main_process=True):
        assert read_jsonl(folder / "metrics.jsonl") == (rows[: start_step + 1] if start_step else [])
    assert read_jsonl(folder / "metrics.superseded.jsonl") == rows[start_step + 1 :]


def test_metrics_that_are_a_folder_are_named(folder):
    (folder / "metrics.jsonl").mkdir()
    with pytest.raises(DamagedFile, match=r"metrics\.jsonl is a folder"):
        read_metrics(folder / "metrics.jsonl")


def test_brackets_in_messages_are_not_markup(folder, run_config, capsys):
    """gloo's errors start with brackets that rich would parse as the end of a style, and raise an error."""
    said = "step 4 of run[a] is not saved: [/pytorch/gloo/pair.cc:534] Connection closed by peer"
    with MetricsWriter(folder, run_config, "id", 0, is_main_process=True) as metrics:
        metrics.log_message(said)
    assert capsys.readouterr().err == said + "\n"


def test_durable_rows_are_flushed_to_disk(folder, run_config, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    with MetricsWriter(folder, run_config, "id", 0, is_main_process=True) as metrics:
        synced.clear()
        metrics.write_row({"step": 1})
        assert synced == []
        metrics.write_row({"step": 2}, durable=True)
        assert synced == [str(folder / "metrics.jsonl")]


def test_other_processes_write_nothing(folder, run_config):
    with MetricsWriter(folder, run_config, "id", 0, is_main_process=False) as metrics:
        metrics.write_row({"step": 1})
        metrics.advance(1)
        metrics.log_message("nothing")
    assert list(folder.iterdir()) == []


@contextmanager
def limit_growth(more: int, path):
    """Let the kernel refuse to make any file more than `more` bytes larger than `path` is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_wait_while_the_disk_is_full(folder, run_config, capsys):
    """There is space for one and a half rows, then for none, then again. Every row is written once, in order."""
    path, made = folder / "metrics.jsonl", [{"step": i, "loss": 2.5} for i in range(6)]
    with MetricsWriter(folder, run_config, "id", 0, is_main_process=True) as metrics:
        metrics.write_row(made[0])
        with limit_growth(36, path):  # a row is 25 bytes
            for row in made[1:4]:
                metrics.write_row(row)
        assert read_jsonl(path) == made[:2] and path.read_text()[-1] != "\n"  # as a kill would leave it
        assert list(metrics.unwritten) == made[2:4] and metrics.failures == 2
        metrics.write_row(made[4])
        assert read_jsonl(path) == made[:5] and not metrics.unwritten
        with limit_growth(0, path):
            metrics.write_row(made[5])
    assert read_jsonl(path) == made  # at the end, without another row
    said = capsys.readouterr().err
    assert said.count("a row of metrics.jsonl could not be written: ") == 2 and "rows of metrics.jsonl" not in said
    assert "complete again, with the 3 rows that had to wait" in said


def test_waiting_rows_are_bounded_and_reported_at_the_end(folder, run_config, monkeypatch, capsys):
    monkeypatch.setattr(metrics_module, "MAX_UNWRITTEN_ROWS", 3)
    with MetricsWriter(folder, run_config, "id", 0, is_main_process=True) as metrics:
        metrics._path = folder / "gone" / "metrics.jsonl"
        for i in range(5):
            metrics.write_row({"step": i})
        assert [row["step"] for row in metrics.unwritten] == [2, 3, 4]
    assert "3 rows of metrics.jsonl could not be written. The newest checkpoint has" in capsys.readouterr().err


def test_rows_that_were_too_many_to_wait_are_reported(folder, run_config, monkeypatch, capsys):
    monkeypatch.setattr(metrics_module, "MAX_UNWRITTEN_ROWS", 3)
    with MetricsWriter(folder, run_config, "id", 0, is_main_process=True) as metrics:
        with limit_growth(0, folder / "metrics.jsonl"):
            for i in range(5):
                metrics.write_row({"step": i})
        metrics.write_row({"step": 5})
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [3, 4, 5]
    assert "metrics.jsonl lacks 3 rows but continues, with the 3 rows that had to wait" in capsys.readouterr().err


def test_rows_of_a_checkpoint_are_written_when_resuming(folder, run_config):
    """Rows 2 and 3 were waiting when step 3 was saved. Row 2 was written after that, and so was 4."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i}) + "\n" for i in (0, 1, 2, 4)))
    with MetricsWriter(folder, run_config, "id", 3, is_main_process=True, unwritten=[{"step": 2}, {"step": 3}]):
        assert read_jsonl(folder / "metrics.jsonl") == [{"step": i} for i in range(4)]


def test_a_file_that_was_cut_is_continued_after_its_last_row(folder, run_config, capsys):
    path = folder / "metrics.jsonl"
    with MetricsWriter(folder, run_config, "id", 0, is_main_process=True) as metrics:
        for step in range(3):
            metrics.write_row({"step": step})
        os.truncate(path, path.stat().st_size - 5)
        metrics.write_row({"step": 3})
        assert read_jsonl(path) == [{"step": 0}, {"step": 1}, {"step": 3}]
    assert "metrics.jsonl was removed or cut during the run" in capsys.readouterr().err


def test_file_that_was_moved_away_is_started_again(folder, run_config):
    with MetricsWriter(folder, run_config, "id", 0, is_main_process=True) as metrics:
        metrics.write_row({"step": 1})
        (folder / "metrics.jsonl").rename(folder / "moved")
        metrics.write_row({"step": 2})
        assert read_jsonl(folder / "metrics.jsonl") == [{"step": 2}]


def test_console_line(folder, run_config, capsys):
    row = {"step": 3, "loss": 2.5, "lr": 3e-4, "grad_norm": 0.5, "tokens_per_second": 216000.4, "mfu": None}
    with MetricsWriter(folder, run_config, "id", 0, is_main_process=True) as metrics:
        metrics.write_row(row)
        metrics.write_row(row | {"step": 4, "mfu": 0.4567, "peak_memory_gib": 40.04})
    one, two = capsys.readouterr().err.splitlines()
    assert one == "step 3/6  loss 2.500  lr 3.00e-04  grad norm 0.50  216,000 tokens/s"
    assert two == one.replace("3/6", "4/6") + "  MFU 45.7%  40.0 GiB"


@pytest.mark.parametrize("perplexity, text", [(17.12345, "17.123"), (32000.5, "32000"), (1.5e300, "1.5e+300")])
def test_a_perplexity_has_five_digits_on_the_console(folder, run_config, capsys, perplexity, text):
    with MetricsWriter(folder, run_config, "id", 0, is_main_process=True) as metrics:
        metrics.write_row({"step": 3, "val_perplexity": perplexity})
    assert capsys.readouterr().err == f"step 3/6  val perplexity {text}\n"
