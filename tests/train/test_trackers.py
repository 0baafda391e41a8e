"""A run's tracker receives metrics, texts and figures; its errors are harmless. Libraries write their real files."""

import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from accelerate import PartialState
from matplotlib import pyplot

from glalm.data.files import read_jsonl
from glalm.train.metrics import MetricsWriter


@pytest.fixture(autouse=True)
def process_state():
    """Accelerate's trackers log debug messages, which need the state that a run has."""
    PartialState(cpu=True)


@pytest.fixture
def folder(run_config):
    run_config.folder.mkdir(parents=True)
    return run_config.folder


@pytest.fixture
def figure(tmp_path):
    """A red figure of 40 x 30 pixels."""
    pyplot.imsave(tmp_path / "red.png", [[[1.0, 0.0, 0.0]] * 40] * 30)
    return tmp_path / "red.png"


class FakeWandb:
    """The part of wandb that Accelerate's tracker uses. It records what it is told."""

    def __init__(self, logged_in: bool):
        self.logged_in = logged_in
        self.logs = []
        self.settings = {}
        self.finished = False
        self.config = SimpleNamespace(update=self.update_config)

    def login(self, prompt):
        assert prompt is False
        return self.logged_in

    def init(self, **settings):
        self.settings |= settings
        return SimpleNamespace(log=lambda row, step: self.logs.append((step, row)), finish=self.finish)

    def update_config(self, values, **_):
        self.settings["config"] = values

    def finish(self):
        self.finished = True


@pytest.mark.parametrize(
    "offline, logged_in, mode", [(False, True, "online"), (False, False, "offline"), (True, True, "offline")]
)
def test_wandb_receives_the_rows(folder, run_config, change, monkeypatch, offline, logged_in, mode):
    fake = FakeWandb(logged_in)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = change(run_config, **{"track.tracker": "wandb", "track.offline": offline})
    with MetricsWriter(folder, config, "abc", 0, is_main_process=True) as metrics:
        metrics.write_row({"step": 2, "loss": 1.0})
    assert fake.settings["mode"] == mode and fake.settings["id"] == "abc" and fake.settings["resume"] == "allow"
    assert fake.settings["config"]["model"]["hidden_size"] == 32
    assert fake.logs == [(2, {"loss": 1.0})] and fake.finished


def read_wandb_records(path: Path) -> list:
    """Read the records of wandb's own file: protocol buffers in chunks of at most 32 KiB, as in LevelDB's logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    block_size, chunk_header = 2**15, 7  # bytes; a chunk has a checksum, a length and a kind before its content
    position = 7  # after the file's header
    records = []
    record = b""
    while position + chunk_header <= len(content):
        left_in_block = block_size - position % block_size
        if left_in_block < chunk_header:
            position += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        start = position + chunk_header
        record += content[start : start + length]
        position = start + length
        if kind in (1, 4):  # a complete record, or the last chunk of one
            records.append(Record.FromString(record))
            record = b""
    return records


def test_an_offline_run_is_in_wandbs_own_files(folder, run_config, change, monkeypatch):
    """Project, name, id, config and every row, as `wandb sync` would upload them."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = change(run_config, **{"track.tracker": "wandb", "track.offline": True, "track.project": "a project"})
    rows = [{"step": step, "loss": 1.0 / (1 + step), "tokens/a b": 64 * step} for step in (0, 3, 6)]
    with MetricsWriter(folder, config, "abc", 0, is_main_process=True) as metrics:
        for row in rows:
            metrics.write_row(row)
    wandb.teardown()  # As at the exit of the process. Until then, the file may not be complete.
    [path] = folder.glob("wandb/offline-run-*-abc/run-abc.wandb")
    records = read_wandb_records(path)
    [run] = [record.run for record in records if record.HasField("run")]
    assert (run.run_id, run.project, run.display_name) == ("abc", "a project", "tiny")
    updates = [update for record in records if record.HasField("config") for update in record.config.update]
    values = {update.key: json.loads(update.value_json) for update in updates}
    assert values["model"]["hidden_size"] == 32 and values["optim"]["lr"] == 1e-2
    logged = []
    for record in records:
        if record.HasField("history"):
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            logged.append({"step": items["_step"]} | {k: v for k, v in items.items() if not k.startswith("_")})
    assert logged == rows


def test_wandb_receives_texts_and_figures(folder, run_config, change, monkeypatch, figure):
    """They are files beside wandb's record, which names them."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = change(run_config, **{"track.tracker": "wandb", "track.offline": True})
    with MetricsWriter(folder, config, "abc", 0, is_main_process=True) as metrics:
        metrics.tracker.log_text("generate", "once upon", 3)
        metrics.tracker.log_figure("extrapolation", figure, 3)
    wandb.teardown()
    media = next(folder.glob("wandb/offline-run-*-abc/files/media"))
    [table] = media.glob("table/generate_*.table.json")
    assert json.loads(table.read_text())["data"] == [[3, "once upon"]]
    [image] = media.glob("images/extrapolation_*.png")
    assert (pyplot.imread(image)[..., :3] == [1, 0, 0]).all()


def read_tensorboard(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


def test_tensorboards_files(folder, run_config, change, figure):
    """Metrics, a text and a figure; the steps that a resumed run repeats replace those of before."""
    config = change(run_config, **{"track.tracker": "tensorboard"})
    with MetricsWriter(folder, config, "abc", 0, is_main_process=True) as metrics:
        for step in (1, 2, 3):
            metrics.write_row({"step": step, "loss": float(step), "mfu": None})
        metrics.tracker.log_text("generate", "once upon", 3)
        metrics.tracker.log_figure("extrapolation", figure, 3)
    with MetricsWriter(folder, config, "abc", 2, is_main_process=True) as metrics:
        metrics.write_row({"step": 3, "loss": 9.0})
        metrics.tracker.log_text("generate", "a time", 3)
        metrics.tracker.log_figure("extrapolation", figure, 3)
    found = read_tensorboard(folder)
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    text = found.Tensors("generate/text_summary")[-1]  # Only numbers are purged.
    assert (text.step, text.tensor_proto.string_val[0]) == (3, b"a time")
    image = found.Images("extrapolation")[-1]
    assert (image.width, image.height) == (40, 30)
    assert "model.hidden_size: 32" in next(folder.glob("tensorboard/*/hparams.yml")).read_text()


def test_mlflows_files(folder, run_config, change, figure, monkeypatch):
    """A resumed run continues in the run of before, with its parameters, metrics, texts and figures."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = change(run_config, **{"track.tracker": "mlflow", "track.project": "a project"})
    for start in (0, 2):
        with MetricsWriter(folder, config, "abc", start, is_main_process=True) as metrics:
            metrics.write_row({"step": start + 1, "loss": 1.0 / (start + 1)})
            metrics.tracker.log_text("generate", f"after {start}", start + 1)
            metrics.tracker.log_figure("extrapolation", figure, start + 1)
    client = mlflow.MlflowClient((folder / "mlflow").resolve().as_uri())
    experiment = client.get_experiment_by_name("a project")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.tags["mlflow.runName"] == "tiny" and run.data.params["model.hidden_size"] == "32"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(entry.step, entry.value) for entry in history] == [(1, 1.0), (3, 1 / 3)]
    artifacts = folder / "mlflow" / experiment.experiment_id / run.info.run_id / "artifacts"
    assert (artifacts / "generate" / "step_3.txt").read_text() == "after 2"
    assert (artifacts / "extrapolation" / "step_1" / "red.png").read_bytes() == figure.read_bytes()


@pytest.mark.parametrize("library", ["wandb", "tensorboard", "mlflow"])
def test_missing_library_is_named(folder, run_config, change, monkeypatch, capsys, library):
    monkeypatch.setitem(sys.modules, library, None)  # import: ImportError
    if library == "tensorboard":
        monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
    config = change(run_config, **{"track.tracker": library})
    with MetricsWriter(folder, config, "id", 0, is_main_process=True) as metrics:
        metrics.write_row({"step": 1, "loss": 1.0})
    assert f"Install it with pip install {library}" in capsys.readouterr().err
    assert read_jsonl(folder / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_failing_wandb_is_harmless(folder, run_config, change, monkeypatch, capsys):
    fake = FakeWandb(True)
    failures = []

    def fail(row, step):
        failures.append(step)
        raise RuntimeError("no space left")

    fake.init = lambda **_: SimpleNamespace(log=fail, finish=fake.finish)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = change(run_config, **{"track.tracker": "wandb"})
    with MetricsWriter(folder, config, "id", 0, is_main_process=True) as metrics:
        metrics.write_row({"step": 1, "loss": 1.0})
        metrics.write_row({"step": 2, "loss": 2.0})
    assert failures == [1]
    assert capsys.readouterr().err.count("stopped logging to wandb: no space left") == 1
    assert len(read_jsonl(folder / "metrics.jsonl")) == 2


@pytest.mark.parametrize("library", ["wandb", "mlflow"])
def test_each_run_of_a_sweep_is_recorded_in_its_folder(run_config, change, monkeypatch, library):
    """The runs share a process, and an error may have ended the logging of the first one."""
    module = pytest.importorskip(library)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    folders = []
    for name in ("first", "second"):
        config = change(run_config, **{"name": name, "track.tracker": library, "track.offline": library == "wandb"})
        folders.append(config.folder)
        config.folder.mkdir(parents=True)
        with MetricsWriter(config.folder, config, name, 0, is_main_process=True) as metrics:
            if name == "first":
                monkeypatch.setattr(metrics.tracker._tracker, "log", Mock(side_effect=RuntimeError("no space left")))
            metrics.write_row({"step": 1, "loss": 1.0})
    if library == "wandb":
        module.teardown()
    for folder in folders:
        pattern = f"offline-run-*/run-{folder.name}.wandb" if library == "wandb" else "*/*/tags/glalm"
        [record] = (folder / library).glob(pattern)
        assert library == "wandb" or record.read_text() == folder.name


def test_wandb_is_not_imported_when_off(folder, run_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with MetricsWriter(folder, run_config, "id", 0, is_main_process=True):
        pass
