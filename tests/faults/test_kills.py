"""Kill a run at every stage of saving, and at random times. The resumed run must equal the uninterrupted one."""

import os
import random
import signal

import pytest
from processes import start, text, until, wait
from sameness import assert_same, rows

from glalm.config.run import RunConfig
from glalm.train.checkpoint import CheckpointWriter
from glalm.train.run_dir import newest_valid_checkpoint
from glalm.train.trainer import train

# The stage of a save at which the process is killed, the step of the newest complete checkpoint then, and whether saves
# are asynchronous. The run saves at steps 2, 4 and 6 and keeps two checkpoints.
STAGES = [
    ("before the folder is created", 2, True),
    ("before the first file", 2, True),
    ("in the middle of a file", 2, False),
    ("before the second file", 2, True),
    ("before the files are read back", 2, True),
    ("before the manifest", 2, True),
    ("before the rename", 2, True),
    ("after the rename, before the folder is synced", 4, False),
    ("before the old one is removed", 6, True),
    ("while the old one is removed", 6, False),
]


class KillingWriter(CheckpointWriter):
    """Write checkpoints, and kill this process at a stage of saving step 4, or of removing step 2."""

    def __init__(self, stage: str):
        self.stage = stage

    def reach(self, stage: str) -> None:
        if stage == self.stage:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_checkpoint(self, folder, step, files, group):
        if step == 4:
            self.reach("before the folder is created")
        super().write_checkpoint(folder, step, files, group)

    def write_file(self, path, chunks):
        if path.parent.name != ".step_4.tmp":
            return super().write_file(path, chunks)
        if path.name == "model.safetensors":
            self.reach("before the first file")
        if path.name == "training.safetensors":
            self.reach("before the second file")
            chunks = self.kill_midway(chunks)
        if path.name == "manifest.json":
            self.reach("before the manifest")
        entry = super().write_file(path, chunks)
        if path.name == "state.json":  # the last file before all are read back
            self.reach("before the files are read back")
        return entry

    def kill_midway(self, chunks):
        for number, chunk in enumerate(chunks):
            if number == 20:
                self.reach("in the middle of a file")
            yield chunk

    def rename_folder(self, source, target):
        if target.name == "step_4":
            self.reach("before the rename")
        super().rename_folder(source, target)
        if target.name == "step_4":
            self.reach("after the rename, before the folder is synced")
        if source.name == "step_2":
            if self.stage == "while the old one is removed":
                (target / "training.safetensors").unlink()
            self.reach("while the old one is removed")

    def remove_folder(self, path):
        if path.name == "step_2":
            self.reach("before the old one is removed")
        super().remove_folder(path)


def train_until_killed(stage: str, config: RunConfig) -> int:
    return train(config, checkpoint_writer=KillingWriter(stage))


@pytest.mark.parametrize("stage, newest, asynchronous", STAGES, ids=[stage[0].replace(" ", "-") for stage in STAGES])
def test_killed_at_a_stage_of_saving(run_config, change, unbroken, tmp_path, stage, newest, asynchronous):
    config = change(run_config, **{"train.checkpoint.asynchronous": asynchronous})
    log = tmp_path / "log"
    assert wait(start(train_until_killed, stage, config, log=log)) == [-signal.SIGKILL], text(log)
    checkpoints = config.folder / "checkpoints"
    assert newest_valid_checkpoint(checkpoints).name == f"step_{newest}"
    assert train(config) == 0
    assert {path.name for path in checkpoints.iterdir()} == {"step_4", "step_6"}
    assert_same(unbroken, config.folder)


@pytest.mark.slow
def test_killed_at_random_times(run_config, change, tmp_path):
    """Kill runs 50 times. Each run that finishes equals the uninterrupted one, with every step in its metrics once."""
    small = {"model.num_hidden_layers": 1, "model.hidden_size": 16, "model.intermediate_size": 16}
    often = {"train.steps": 150, "train.eval_every": 150, "train.eval_sequences": 2, "train.checkpoint.every": 2}
    config, log = change(run_config, **small, **often), tmp_path / "log"
    whole = change(config, name="whole")
    assert train(whole) == 0
    random.seed(0)
    kills, runs = 0, 0
    while kills < 50:
        run = change(config, name=f"run {runs}")
        [process] = start(train, run, log=log)
        if random.random() < 0.8:  # Most kills come after the start, in training.
            until(lambda p=process: not p.is_alive() or "parameters" in text(log))
        process.join(random.uniform(0, 0.3))
        if process.is_alive():
            process.kill()
            kills += 1
        if wait([process]) == [0]:
            assert_same(whole.folder, run.folder)
            runs += 1
    assert train(run) == 0
    assert_same(whole.folder, run.folder)
    assert [row["step"] for row in rows(run.folder)] == list(range(151))
    assert {p.name for p in (run.folder / "checkpoints").iterdir()} == {"step_148", "step_150"}
