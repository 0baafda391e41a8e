import json
import os
import resource
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from glalm.data.files import read_jsonl
from glalm.train import metrics as module
from glalm.train.metrics import Metrics


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def test_rows_are_on_disk_at_once(folder, run_config):
    with Metrics(folder, run_config, "id", 0, active=True) as metrics:
        metrics.log({"step": 1, "loss": 2.5})
        assert read_jsonl(folder / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]


def test_resuming_drops_later_rows_and_a_line_cut_short(folder, run_config):
    written = "".join(json.dumps({"step": i}) + "\n" for i in range(6))
    (folder / "metrics.jsonl").write_text(written + '{"step": 6, "lo')
    with Metrics(folder, run_config, "id", 3, active=True) as metrics:
        metrics.log({"step": 4, "loss": 1.0})
    assert read_jsonl(folder / "metrics.jsonl") == [{"step": i} for i in range(4)] + [{"step": 4, "loss": 1.0}]


def test_resuming_leaves_out_what_a_crash_of_the_machine_made_of_a_row(folder, run_config):
    """Zeros, where the file had grown and its content was not on the disk yet."""
    (folder / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + bytes(30) + b'\n{"step": 2}\n' + bytes(9))
    with Metrics(folder, run_config, "id", 3, active=True):
        assert read_jsonl(folder / "metrics.jsonl") == [{"step": 0}, {"step": 2}]


def test_brackets_are_text(folder, run_config, capsys):
    """gloo's errors begin with what rich would take for the end of a style, and raise at."""
    said = "step 4 of run[a] is not saved: [/pytorch/gloo/pair.cc:534] Connection closed by peer"
    with Metrics(folder, run_config, "id", 0, active=True) as metrics:
        metrics.say(said)
    assert capsys.readouterr().err == said + "\n"


def test_the_rows_before_a_checkpoint_are_on_the_disk(folder, run_config, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    with Metrics(folder, run_config, "id", 0, active=True) as metrics:
        synced.clear()
        metrics.log({"step": 1})
        assert synced == []
        metrics.log({"step": 2}, durable=True)
        assert synced == [str(folder / "metrics.jsonl")]


def test_other_processes_write_nothing(folder, run_config):
    with Metrics(folder, run_config, "id", 0, active=False) as metrics:
        metrics.log({"step": 1})
        metrics.advance(1)
        metrics.say("nothing")
    assert list(folder.iterdir()) == []


@contextmanager
def room_for(more: int, path):
    """The kernel writes `more` bytes of what would make a file larger than `path` is now, and refuses the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_wait_while_there_is_no_room(folder, run_config, capsys):
    """For a row and a half, then for none: each row is in the file once, in order, as soon as there is room again."""
    path, made = folder / "metrics.jsonl", [{"step": i, "loss": 2.5} for i in range(6)]
    with Metrics(folder, run_config, "id", 0, active=True) as metrics:
        metrics.log(made[0])
        with room_for(36, path):  # a row is 25 bytes
            for row in made[1:4]:
                metrics.log(row)
        assert read_jsonl(path) == made[:2] and path.read_text()[-1] != "\n"  # as a kill would leave it
        assert list(metrics.unwritten) == made[2:4] and metrics.row() == {"failed_writes": 2}
        metrics.log(made[4])
        assert read_jsonl(path) == made[:5] and not metrics.unwritten
        with room_for(0, path):
            metrics.log(made[5])
    assert read_jsonl(path) == made  # at the end, without another row
    said = capsys.readouterr().err
    assert said.count("a row of metrics.jsonl is not written: ") == 2 and "could not be written" not in said
    assert "written again, with the 3 rows that were kept" in said


def test_what_waits_is_bounded_and_told_of_at_the_end(folder, run_config, monkeypatch, capsys):
    monkeypatch.setattr(module, "MOST_UNWRITTEN", 3)
    with Metrics(folder, run_config, "id", 0, active=True) as metrics:
        metrics._path = folder / "gone" / "metrics.jsonl"
        for i in range(5):
            metrics.log({"step": i})
        assert [row["step"] for row in metrics.unwritten] == [2, 3, 4]
    assert "3 rows of metrics.jsonl could not be written; the newest checkpoint has" in capsys.readouterr().err


def test_what_a_checkpoint_kept_is_written_when_resuming(folder, run_config):
    """Rows 2 and 3 waited as step 3 was saved; 2 was written after that, and 4."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i}) + "\n" for i in (0, 1, 2, 4)))
    with Metrics(folder, run_config, "id", 3, active=True, unwritten=[{"step": 2}, {"step": 3}]):
        assert read_jsonl(folder / "metrics.jsonl") == [{"step": i} for i in range(4)]


def test_a_file_that_is_moved_away_begins_anew(folder, run_config):
    with Metrics(folder, run_config, "id", 0, active=True) as metrics:
        metrics.log({"step": 1})
        (folder / "metrics.jsonl").rename(folder / "moved")
        metrics.log({"step": 2})
        assert read_jsonl(folder / "metrics.jsonl") == [{"step": 2}]


class FakeWandb:
    """wandb's surface that is used, recording what it is told."""

    def __init__(self, logged_in: bool):
        self.logged_in, self.logs, self.settings, self.finished = logged_in, [], None, False

    def login(self, prompt):
        assert prompt is False
        return self.logged_in

    def init(self, **settings):
        self.settings = settings
        return SimpleNamespace(log=lambda row, step: self.logs.append((step, row)), finish=self.finish)

    def finish(self):
        self.finished = True


@pytest.mark.parametrize(
    "wanted, logged_in, mode", [("online", True, "online"), ("online", False, "offline"), ("offline", True, "offline")]
)
def test_wandb_is_a_view_of_the_rows(folder, run_config, change, monkeypatch, wanted, logged_in, mode):
    fake = FakeWandb(logged_in)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with Metrics(folder, change(run_config, **{"track.wandb": wanted}), "abc", 0, active=True) as metrics:
        metrics.log({"step": 2, "loss": 1.0})
    assert fake.settings["mode"] == mode and fake.settings["id"] == "abc" and fake.settings["resume"] == "allow"
    assert fake.settings["config"]["model"]["hidden_size"] == 32
    assert fake.logs == [(2, {"loss": 1.0})] and fake.finished


def test_wandb_absent_does_no_harm(folder, run_config, change, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb: ImportError
    with Metrics(folder, change(run_config, **{"track.wandb": "online"}), "id", 0, active=True) as metrics:
        metrics.log({"step": 1, "loss": 1.0})
    assert "Weights & Biases is not used" in capsys.readouterr().err
    assert read_jsonl(folder / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_wandb_failing_does_no_harm(folder, run_config, change, monkeypatch, capsys):
    fake = FakeWandb(True)

    def broken(row, step):
        raise RuntimeError("no space left")

    fake.init = lambda **_: SimpleNamespace(log=broken, finish=fake.finish)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with Metrics(folder, change(run_config, **{"track.wandb": "online"}), "id", 0, active=True) as metrics:
        metrics.log({"step": 1, "loss": 1.0})
        metrics.log({"step": 2, "loss": 2.0})
    assert capsys.readouterr().err.count("Weights & Biases is given up: no space left") == 1
    assert len(read_jsonl(folder / "metrics.jsonl")) == 2


def test_what_the_console_shows(folder, run_config, capsys):
    row = {"step": 3, "loss": 2.5, "lr": 3e-4, "grad_norm": 0.5, "tokens_per_second": 216000.4, "mfu": None}
    with Metrics(folder, run_config, "id", 0, active=True) as metrics:
        metrics.log(row)
        metrics.log(row | {"step": 4, "mfu": 0.4567, "peak_memory_gib": 40.04})
    one, two = capsys.readouterr().err.splitlines()
    assert one == "step 3/6  loss 2.500  lr 3.00e-04  grad norm 0.50  216,000 tokens/s"
    assert two == one.replace("3/6", "4/6") + "  MFU 45.7%  40.0 GiB"


def test_wandb_off_is_not_imported(folder, run_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Metrics(folder, run_config, "id", 0, active=True):
        pass
