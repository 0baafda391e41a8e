import json
import sys
from types import SimpleNamespace

import pytest

from glalm.data.files import read_jsonl
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


def test_other_processes_write_nothing(folder, run_config):
    with Metrics(folder, run_config, "id", 0, active=False) as metrics:
        metrics.log({"step": 1})
        metrics.advance(1)
        metrics.say("nothing")
    assert list(folder.iterdir()) == []


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


def test_wandb_off_is_not_imported(folder, run_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Metrics(folder, run_config, "id", 0, active=True):
        pass
