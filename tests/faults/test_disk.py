"""Train on a disk that is full, flips bits, loses files, or cannot rename."""

import errno
import os
import resource
import shutil
import signal
from contextlib import contextmanager
from functools import partial

import pytest
from injection import before_steps, hang, send_signal
from processes import start, until, wait
from sameness import assert_same, rows

from glalm.config.run import RunConfig
from glalm.config.strict import ConfigError, RunError
from glalm.train import checkpoint
from glalm.train.checkpoint import CheckpointError, CheckpointWriter
from glalm.train.trainer import train
from glalm.train.watchdog import WATCHDOG_EXIT_CODE


class FullDisk(CheckpointWriter):
    """A disk without space for the first `failures` saves, each in the middle of its second file."""

    def __init__(self, failures: int):
        self.failures = failures
        self.refused = 0

    def write_file(self, path, chunks):
        if "training" in path.name and self.refused < self.failures:
            self.refused += 1
            path.write_bytes(b"as much as there was space for")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return super().write_file(path, chunks)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_full_disk_fails_only_that_save(run_config, change, unbroken, capfd, asynchronous):
    disk = FullDisk(failures=2)
    config = change(run_config, **{"train.checkpoint.asynchronous": asynchronous})
    with before_steps({6: lambda: until(lambda: disk.refused == 2)}):  # so that the row of step 6 counts both
        assert train(config, checkpoint_writer=disk) == 0
    warning = capfd.readouterr().err
    assert warning.count("was not saved") == 2 and "step 4 was not saved" in warning and "No space left" in warning
    assert [p.name for p in (run_config.folder / "checkpoints").iterdir()] == ["step_6"]
    assert rows(run_config.folder)[-1].pop("failed_saves") == 2
    found = [{k: v for k, v in row.items() if k != "failed_saves"} for row in rows(run_config.folder)]
    assert found == rows(unbroken)


def test_three_failed_saves_in_a_row_stop_the_run(run_config, change, unbroken):
    assert train(change(run_config, **{"train.steps": 2})) == 0
    longer = {"train.steps": 10, "train.allow_changes": ["train.steps"], "train.checkpoint.keep_last": 1}
    disk = FullDisk(failures=9)
    with pytest.raises(CheckpointError, match=r"could not be saved \(3 failed in a row\).*step_2.*No space left"):
        train(change(run_config, **longer), checkpoint_writer=disk)
    assert disk.refused == 3
    assert [p.name for p in (run_config.folder / "checkpoints").iterdir()] == ["step_2"]
    checkpoint.verify_checkpoint(run_config.folder / "checkpoints" / "step_2")
    assert train(change(run_config, **longer)) == 0


def test_failed_last_save_stops_the_run(run_config, change):
    disk = FullDisk(failures=1)
    with pytest.raises(CheckpointError, match=r"The last checkpoint could not be saved .*No space left"):
        train(change(run_config, **{"train.steps": 2}), checkpoint_writer=disk)
    assert disk.refused == 1
    assert list((run_config.folder / "checkpoints").iterdir()) == []


@contextmanager
def limit_file_size(size: int):
    """Let the kernel refuse to write beyond `size` bytes of any file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def without(found: list[dict], *names: str) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in names} for row in found]


def test_full_disk_loses_no_metrics(run_config, change, unbroken):
    """The disk is full from step 2 to 4, for metrics and checkpoints."""
    full = limit_file_size((unbroken / "metrics.jsonl").stat().st_size // 4)
    with before_steps({2: full.__enter__, 5: lambda: full.__exit__(None, None, None)}):
        assert train(change(run_config, **{"train.checkpoint.asynchronous": False})) == 0
    last = rows(run_config.folder)[-1]
    assert last["failed_saves"] == 2 and 1 <= last["failed_writes"] <= 3
    assert without(rows(run_config.folder), "failed_saves", "failed_writes") == rows(unbroken)


class UnlimitedWriter(CheckpointWriter):
    """A writer for whose files the kernel has no limit."""

    def write_checkpoint(self, *args):
        with limit_file_size(resource.RLIM_INFINITY):
            super().write_checkpoint(*args)


def without_room_for_metrics(config: RunConfig) -> int:
    """Train with a disk that has room only for checkpoints from step 3 on, and die in step 6."""

    def fill_disk() -> None:
        size = (config.folder / "metrics.jsonl").stat().st_size + 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    with before_steps({3: fill_disk, 6: partial(send_signal, signal.SIGKILL)}):
        return train(config, checkpoint_writer=UnlimitedWriter())


def test_waiting_metrics_survive_a_kill(run_config, change, unbroken, tmp_path):
    config = change(run_config, **{"train.checkpoint.asynchronous": False})
    assert wait(start(without_room_for_metrics, config, log=tmp_path / "log")) == [-signal.SIGKILL]
    assert [row["step"] for row in rows(config.folder)] == [0, 1, 2]
    unwritten = checkpoint.read_metadata(config.folder / "checkpoints/step_4")["unwritten"]
    assert [row["step"] for row in unwritten] == [3, 4]
    assert train(config) == 0
    assert without(rows(config.folder), "failed_writes") == rows(unbroken)


def train_with_full_log(hangs: bool, config: RunConfig) -> int:
    """Train with standard output and error on a full disk. If `hangs`, hang before step 2."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    with before_steps({2: hang} if hangs else {}):
        return train(config)


def test_log_on_a_full_disk_does_not_stop_the_run(run_config, change, unbroken, tmp_path):
    assert wait(start(train_with_full_log, False, run_config, log=tmp_path / "log")) == [0]
    assert_same(unbroken, run_config.folder)
    hanging = change(run_config, name="hanging", **{"train.guard.hang_seconds": 2.0})
    assert wait(start(train_with_full_log, True, hanging, log=tmp_path / "log"), 30) == [WATCHDOG_EXIT_CODE]


class ReadOnlyCheckpoints(CheckpointWriter):
    """A disk that refuses to remove a checkpoint."""

    refused = 0

    def remove_folder(self, path):
        self.refused += 1
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_old_checkpoint_that_cannot_be_removed_is_reported(run_config, change, capfd):
    disk = ReadOnlyCheckpoints()
    config = change(run_config, **{"train.checkpoint.keep_last": 1, "train.checkpoint.every": 1})
    assert train(config, checkpoint_writer=disk) == 0
    assert disk.refused >= 5
    printed = capfd.readouterr().err
    assert "an old checkpoint cannot be removed" in printed and "was not saved" not in printed
    assert len(list((config.folder / "checkpoints").iterdir())) == 6
    assert "failed_saves" not in rows(config.folder)[-1]


FILES = ["model.safetensors", "training.safetensors", "state.json", "config.json", "manifest.json"]


@pytest.fixture
def trained(run_config, unbroken, change):
    """Return the config of a copy of the uninterrupted run."""
    shutil.copytree(unbroken, run_config.folder)
    return run_config


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_checkpoint_is_set_aside(trained, unbroken, capfd, name, damage):
    file = trained.folder / "checkpoints" / "step_6" / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damage == "flip" else content[:-1])
    assert train(trained) == 0
    printed = capfd.readouterr().err
    assert str(file) in printed and "set aside as step_6.damaged, and the previous one is tried" in printed
    assert "resuming after step 4" in printed
    assert_same(unbroken, trained.folder)


def test_damaged_resume_from_is_refused(trained, change):
    path = trained.folder / "checkpoints" / "step_4"
    content = bytearray((path / "training.safetensors").read_bytes())
    content[-1] ^= 128
    (path / "training.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step_4/training\.safetensors is damaged"):
        train(change(trained, name="fork", **{"train.resume_from": str(path)}))
    assert path.exists()


def test_run_restarts_if_all_checkpoints_are_damaged(trained, unbroken):
    for step in (4, 6):
        (trained.folder / "checkpoints" / f"step_{step}" / "model.safetensors").unlink()
    assert train(trained) == 0
    names = {p.name for p in (trained.folder / "checkpoints").iterdir()}
    assert names == {"step_4", "step_6", "step_4.damaged", "step_6.damaged"}
    assert_same(unbroken, trained.folder)


class BitFlip(CheckpointWriter):
    """A disk that stores one bit of step_4's model wrongly."""

    flipped = 0

    def write_file(self, path, chunks):
        entry = super().write_file(path, chunks)
        if "step_4" in str(path) and "model" in path.name:
            content = bytearray(path.read_bytes())
            content[-7] ^= 2
            path.write_bytes(content)
            self.flipped += 1
        return entry


def test_bit_flip_while_writing_is_found(run_config, change):
    """Reading back finds the flipped bit before the previous checkpoint is removed."""
    disk = BitFlip()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: it differs from what was written"):
        train(change(run_config, **{"train.checkpoint.keep_last": 1, "train.steps": 4}), checkpoint_writer=disk)
    assert disk.flipped == 1
    assert [p.name for p in (run_config.folder / "checkpoints").iterdir()] == ["step_2"]


@pytest.mark.parametrize("broken", ["rename", "fsync"])
def test_filesystem_without_rename_or_sync_is_refused(run_config, monkeypatch, broken):
    def fails(*args, **options):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fails)
        with pytest.raises(ConfigError, match=r"runs.*cannot sync and rename a directory .*not supported"):
            train(run_config)
    assert not (run_config.folder / "run.json").exists()


@pytest.mark.parametrize("runs_dir", ["/proc/runs", "/proc/version"])
def test_folder_that_cannot_be_created_is_named(run_config, change, runs_dir):
    with pytest.raises(ConfigError, match=rf"^{runs_dir}/tiny cannot be written to \(.*choose another runs_dir="):
        train(change(run_config, runs_dir=runs_dir))


def test_damaged_validation_data_is_reported(run_config, change, tmp_path):
    data = shutil.copytree(run_config.data.path, tmp_path / "data")
    file = max(data.glob("validation/*/*.npy"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(RunError, match=rf"^data.path={data}: {file} is damaged .*\. Prepare the data again"):
        train(change(run_config, **{"data.path": str(data)}))


def test_run_does_not_start_on_a_full_disk(run_config):
    with (
        limit_file_size(0),
        pytest.raises(ConfigError, match=r"tiny cannot be written to \(.*Free some space, or choose"),
    ):
        train(run_config)
    assert train(run_config) == 0


def test_interrupted_rename_is_recovered(trained, unbroken):
    """If a rename copies file by file (object stores), a kill leaves a step_N that lacks files."""
    path = trained.folder / "checkpoints" / "step_6"
    for file in ("manifest.json", "training.safetensors"):
        (path / file).unlink()
    assert train(trained) == 0
    assert_same(unbroken, trained.folder)
