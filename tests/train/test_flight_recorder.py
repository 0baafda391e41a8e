"""The record of the last collectives: torch's settings, and the files that a process writes when its run is ended."""

import os
import pickle
import time

import pytest
import torch
from torch import distributed

from glalm.train import flight_recorder, parallel
from glalm.train.flight_recorder import enable_flight_recorder, write_flight_record
from glalm.train.watchdog import WATCHDOG_EXIT_CODE, Watchdog


def test_recorder_is_on_with_its_files_in_the_runs_folder(tmp_path):
    environ = {}
    enable_flight_recorder(tmp_path, environ)
    assert environ == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/flight_record_rank_",
    }


def test_settings_of_the_user_stay_under_either_of_torchs_names(tmp_path):
    own = {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/elsewhere/rank_",
    }
    environ = dict(own)
    enable_flight_recorder(tmp_path, environ)
    assert environ == own


@pytest.fixture
def collective():
    """Let this process, as a group of its own, sum a tensor over gloo."""
    parallel.join_process_group(use_cpu=True, always=True)
    distributed.all_reduce(torch.ones(3, 7))
    yield
    parallel.leave_process_group()


def test_record_holds_the_last_collective(tmp_path, collective):
    (written,) = write_flight_record(tmp_path, 0, since=0.0)
    assert written == tmp_path / "flight_record_rank_0"
    last = pickle.loads(written.read_bytes())["entries"][-1]
    assert last["profiling_name"] == "gloo:all_reduce" and last["input_sizes"] == [[3, 7]]
    assert any(frame["filename"] == __file__ for frame in last["frames"])


def test_records_of_earlier_starts_are_not_named(tmp_path, collective):
    now = time.time()
    for rank, age in ((1, 3600), (2, 0)):
        path = tmp_path / f"flight_record_rank_{rank}"
        path.touch()
        os.utime(path, (now - age, now - age))
    names = [path.name for path in write_flight_record(tmp_path, 0, since=now - 60)]
    assert names == ["flight_record_rank_0", "flight_record_rank_2"]


def test_a_disk_that_does_not_answer_holds_nobody_up(tmp_path, collective, monkeypatch):
    monkeypatch.setattr(flight_recorder, "DUMP_SECONDS", 0.1)
    os.mkfifo(tmp_path / "flight_record_rank_0")  # Opening it waits for a reader.
    assert write_flight_record(tmp_path, 0, since=0.0) == []
    assert write_flight_record(tmp_path / "missing", 0, since=0.0) == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_watchdog_names_the_records_that_exist(tmp_path, collective, monkeypatch, capsys, world_size):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    (tmp_path / "flight_record_rank_1").touch()
    guard = Watchdog(None, tmp_path)
    guard._start_time -= 1
    guard.world_size = world_size
    guard._exit("rank 1 hangs: in step 3 for 1800 s")
    records = f". Last collectives: {tmp_path}/flight_record_rank_0, {tmp_path}/flight_record_rank_1"
    expected = "rank 0 ends the run: rank 1 hangs: in step 3 for 1800 s" + (records if world_size > 1 else "")
    assert capsys.readouterr().err == f"{expected}\n" and codes == [WATCHDOG_EXIT_CODE]
