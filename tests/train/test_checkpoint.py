import hashlib
import io
import json
import math
import os
import pickletools
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from glalm.config.run import CheckpointConfig, OptimConfig
from glalm.data.files import file_sha256
from glalm.hf import GLALMForCausalLM
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.train import checkpoint, staging
from glalm.train.checkpoint import (
    CheckpointError,
    CheckpointSaver,
    CheckpointWriter,
    UnreadableCheckpoint,
    latest_checkpoint,
    list_checkpoints,
)
from glalm.train.optim import build_optimizers
from glalm.train.run_dir import newest_valid_checkpoint
from glalm.train.staging import TensorSlice
from glalm.train.state import TrainState


def train_tiny(seed: int = 0, steps: int = 2, tied: bool = False, **optim) -> TrainState:
    """Return the state of a tiny model after `steps` optimizer steps on random tokens."""
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_heads=2, intermediate_size=8, tie_word_embeddings=tied
    )
    model = CausalLM(config)
    state = TrainState(model, build_optimizers(model, OptimConfig(**optim)))
    for _ in range(steps):
        ids = torch.randint(30, (2, 8))
        model(ids, shift_labels=ids).loss.backward()
        for each in state.optimizers:
            each.step()
            each.zero_grad()
    return state


def make_guard(**tensors: torch.Tensor) -> SimpleNamespace:
    """Return a stand-in for UpdateGuard that has these tensors."""
    return SimpleNamespace(state_dict=lambda: tensors)


def save(folder: Path, step: int, state: TrainState | None = None, writer=None, **metadata) -> Path:
    """Save synchronously, prune nothing, and return the checkpoint."""
    state = state or train_tiny()
    state.step = step
    config = CheckpointConfig(asynchronous=False, keep_last=100)
    with CheckpointSaver(folder, config, writer=writer) as saver:
        saver.save(state, metadata)
        saver.finish()
    return folder / f"step_{step}"


def load(path: Path, state: TrainState) -> dict:
    checkpoint.verify_checkpoint(path)
    return checkpoint.load_train_state(path, state, seed=0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_equal(tmp_path, tied):
    state = train_tiny(tied=tied)
    state.tokens = 99
    path = save(tmp_path, 7, state)
    other = train_tiny(seed=1, steps=0, tied=tied)
    assert load(path, other) == {"step": 7, "processes": 1, "tokens": 99}
    assert (other.step, other.tokens) == (7, 99)
    [optimizer], [other_optimizer] = state.optimizers, other.optimizers
    for (name, a), b in zip(state.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert optimizer.state[a].keys() == other_optimizer.state[b].keys()
        for key, tensor in optimizer.state[a].items():
            assert torch.equal(tensor, other_optimizer.state[b][key]), (name, key)
    assert torch.equal(GLALMForCausalLM.from_pretrained(path).lm_head.weight, state.model.lm_head.weight)


@pytest.mark.parametrize("optim", [{"name": "muon"}, {"name": "muon", "neuron_beta": 0.9}])
def test_muon_round_trip_is_bit_equal(tmp_path, optim):
    state = train_tiny(**optim)
    other = train_tiny(seed=1, steps=0, **optim)
    load(save(tmp_path, 1, state), other)
    for a, b in zip(state.model.parameters(), other.model.parameters(), strict=True):
        [saved] = [optimizer.state[a] for optimizer in state.optimizers if a in optimizer.state]
        [loaded] = [optimizer.state[b] for optimizer in other.optimizers if b in optimizer.state]
        assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert any("mean_square" in x for x in state.optimizers[0].state.values()) == ("neuron_beta" in optim)


def test_files_and_manifest(tmp_path):
    path = save(tmp_path, 1)
    files = {p.name for p in path.iterdir()}
    assert files == {"config.json", "model.safetensors", "training.safetensors", "state.json", "manifest.json"}
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == files - {"manifest.json"}
    for file in path.iterdir():
        with pytest.raises(Exception):  # noqa: B017 (whatever the pickle disassembler raises)
            pickletools.dis(file.read_bytes(), out=io.StringIO())


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json", "config.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_named(tmp_path, name, damage):
    path = save(tmp_path, 1)
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    file.write_bytes(content[: len(content) - (damage == "cut")])
    if damage == "remove":
        file.unlink()
    with pytest.raises(CheckpointError, match=name):
        load(path, train_tiny())


@pytest.mark.parametrize("listed", ["nothing", "all but one", "one of two parts"])
def test_a_manifest_that_lists_too_little_is_damaged(tmp_path, listed):
    """Nothing differs from an empty list, so a manifest must list what every checkpoint has."""
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    files = manifest["files"]
    if listed == "nothing":
        files.clear()
    elif listed == "all but one":
        del files["training.safetensors"]
    else:
        files["model-00001-of-00002.safetensors"] = files.pop("model.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: it does not list all files"):
        checkpoint.verify_checkpoint(path)
    assert newest_valid_checkpoint(tmp_path) is None and names(tmp_path) == ["step_1.damaged"]


def test_an_unreadable_checkpoint_is_not_set_aside(tmp_path, monkeypatch):
    """A file that cannot be read may be undamaged."""
    path = save(tmp_path, 1)

    def refuse(file):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(checkpoint, "file_sha256", refuse)
    with pytest.raises(UnreadableCheckpoint, match=rf"cannot be read: Permission denied\. .* run: mv {path} "):
        newest_valid_checkpoint(tmp_path)
    assert names(tmp_path) == ["step_1"]


def test_only_exact_names_are_checkpoints(tmp_path):
    for name in ("step_2", "step_02", "step_٣", "step_-1", "step_4.damaged", "step_", ".step_5.tmp"):
        (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == {2: tmp_path / "step_2"}
    assert list_checkpoints(tmp_path / "nothing") == {}
    (tmp_path / "away").symlink_to(tmp_path / "disk")
    for unknown in ("away", "step_2/file"):
        (tmp_path / "step_2" / "file").touch()
        with pytest.raises(CheckpointError, match=f"The checkpoints in .*{unknown} cannot be listed"):
            list_checkpoints(tmp_path / unknown)


@pytest.mark.parametrize("kind", ["link", "file"])
def test_odd_entries_are_pruned(tmp_path, kind):
    """What a link among the checkpoints leads to is kept, and nothing is left behind."""
    elsewhere = save(tmp_path / "elsewhere", 1)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    if kind == "link":
        (folder / "step_1").symlink_to(elsewhere)
        (folder / ".step_2.tmp").symlink_to(elsewhere)
    else:
        (folder / "step_1").touch()
        (folder / ".step_2.tmp").touch()
    with CheckpointSaver(folder, CheckpointConfig(asynchronous=False, keep_last=1)) as saver:
        state = train_tiny()
        state.step = 2
        saver.save(state, {})
        assert saver.finish() == folder / "step_2"
    assert names(folder) == ["step_2"]
    checkpoint.verify_checkpoint(elsewhere)


class FullDisk(CheckpointWriter):
    """A disk that is full when state.json is written."""

    refused = 0

    def write_file(self, path, chunks):
        if path.name == "state.json":
            self.refused += 1
            raise OSError(28, "No space left on device")
        return super().write_file(path, chunks)


def test_failed_save_leaves_the_previous_checkpoint(tmp_path):
    first = save(tmp_path, 1)
    writer = FullDisk()
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, 2, writer=writer)
    assert writer.refused == 1
    assert list(tmp_path.iterdir()) == [first]
    checkpoint.verify_checkpoint(first)


def test_files_are_on_disk_before_the_rename(tmp_path, monkeypatch):
    """A checkpoint is complete even if the machine crashes right after the rename, and the rename itself survives."""
    synced = []
    renamed = []
    fsync = os.fsync
    rename = os.rename

    def record_fsync(descriptor):
        fsync(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def record_rename(source, target):
        renamed.append((set(synced), {str(source), *(str(path) for path in source.iterdir())}))
        rename(source, target)
        synced.clear()

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    path = save(tmp_path, 1)
    [(before, wanted)] = renamed
    assert before == wanted and len(wanted) == 1 + len(list(path.iterdir())) == 6
    assert synced == [str(tmp_path), str(tmp_path.parent)]


def test_guard_tensors_that_do_not_fit_keep_their_values(tmp_path):
    """The checkpoint may have another train.guard.spike_window, or be older than a tensor."""
    state = train_tiny()
    state.guard = make_guard(a=torch.arange(3.0), b=torch.ones(2))
    path = save(tmp_path, 1, state)
    other = train_tiny()
    other.guard = make_guard(a=torch.zeros(3), b=torch.full((4,), 7.0), c=torch.full((1,), 7.0))
    load(path, other)
    assert [t.tolist() for t in other.guard.state_dict().values()] == [[0.0, 1.0, 2.0], [7.0] * 4, [7.0]]


def test_another_model_is_refused(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"holds another model: missing \[\], unexpected \['lm_head.weight'\]"):
        load(path, train_tiny(tied=True))


def test_retention(tmp_path):
    """Pruning keeps the last two, every fourth, and the two of the lowest validation loss, never one without a loss."""
    for step, loss in enumerate([5.0, 3.0, 4.0, 4.5, None, 3.5, 4.2, 4.1], 1):
        save(tmp_path, step, val_loss=loss)
    CheckpointWriter().prune_checkpoints(tmp_path, CheckpointConfig(keep_last=2, keep_every=4, keep_best=2))
    assert names(tmp_path) == ["step_2", "step_4", "step_6", "step_7", "step_8"]
    CheckpointWriter().prune_checkpoints(tmp_path, CheckpointConfig(keep_last=1))
    assert names(tmp_path) == ["step_8"]


@pytest.mark.parametrize(
    "losses", [[math.nan, 3.0, 2.0, 4.0], [3.0, math.nan, 2.0, 4.0], [3.0, -math.inf, 2.0, math.nan]]
)
def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path, losses):
    for step, loss in enumerate(losses, 1):
        save(tmp_path, step, val_loss=loss)
    CheckpointWriter().prune_checkpoints(tmp_path, CheckpointConfig(keep_last=1, keep_best=1))
    assert names(tmp_path) == ["step_3", "step_4"]


# ------------------------------------------------------------------------------------------------------ staging.py


def test_written_file_is_valid_safetensors(tmp_path):
    """Compare every dtype, a scalar, an empty and a transposed tensor with what the safetensors library reads."""
    tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in staging.DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "transposed": torch.rand(3, 5).T}
    file = tmp_path / "all.safetensors"
    chunks = staging.encode_safetensors(staging.slices_to_save(tensors, 0, 1))
    entry = CheckpointWriter().write_file(file, chunks)
    assert entry == {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], t) and loaded[name].dtype == t.dtype for name, t in tensors.items())


def test_checksum_is_of_the_memory_not_of_the_file(tmp_path):
    """A disk that changes a byte during the write does not get a matching checksum."""
    file = tmp_path / "file"
    content = bytes(1 << 20)

    def corrupt_while_writing():
        yield content
        with open(file, "r+b") as other:
            other.write(b"1")
        yield b"end"

    entry = CheckpointWriter().write_file(file, corrupt_while_writing())
    assert file.read_bytes() == b"1" + content[1:] + b"end"
    assert entry["sha256"] == hashlib.sha256(content + b"end").hexdigest() != file_sha256(file)


def test_ranks_save_equally_much():
    """Each tensor is saved by one rank, and no rank has much more to write than another."""
    tensors = {str(n): torch.zeros(n) for n in (100, 90, 50, 40, 30, 20, 10)}
    assigned = [staging.slices_to_save(tensors, rank, 3) for rank in range(3)]
    assert sorted(name for slices in assigned for name in slices) == sorted(tensors)
    sizes = [sum(held.data.numel() for held in slices.values()) for slices in assigned]
    assert max(sizes) - min(sizes) <= 30


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 7), max_size=3), wanted=st.tuples(st.integers(0, 7), st.integers(0, 7)))
def test_any_slices_give_any_other_slice(tmp_path_factory, cuts, wanted):
    """Save a [7, 3] tensor as slices of rows, one per file, and read any other slice of its rows."""
    folder = tmp_path_factory.mktemp("slices")
    full = torch.arange(21.0).reshape(7, 3)
    files = []
    for a, b in pairwise(sorted({0, 7, *cuts})):
        files.append(folder / f"{a}.safetensors")
        held = TensorSlice(full[a:b], (a, 0), (7, 3))
        CheckpointWriter().write_file(files[-1], staging.encode_safetensors({"w": held}))
    a, b = sorted(wanted)
    target = TensorSlice(torch.zeros(b - a, 3), (a, 0), (7, 3))
    staging.read_slices(staging.index_safetensors(files), {"w": target})
    assert torch.equal(target.data, full[a:b])
    if len(files) > 1:
        with pytest.raises(CheckpointError, match="a part of w is in none of the files"):
            staging.read_tensors(staging.index_safetensors(files[1:]), {"w": torch.zeros(7, 3)})


# ------------------------------------------------------------------------------------------------- CheckpointSaver


class WaitingWriter(CheckpointWriter):
    """A writer that waits for `may_write` before each save."""

    def __init__(self):
        self.may_write = threading.Event()

    def write_checkpoint(self, *args):
        assert self.may_write.wait(30)
        super().write_checkpoint(*args)


def test_saving_does_not_block_training(tmp_path):
    """A save in flight holds the weights from when it was requested although they change; the next save waits."""
    state = train_tiny()
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    writer = WaitingWriter()
    with CheckpointSaver(tmp_path, CheckpointConfig(), writer=writer) as saver:
        state.step = 1
        saver.save(state, {})
        for p in state.model.parameters():
            p.data.add_(1.0)
        assert saver.in_flight and latest_checkpoint(tmp_path) is None
        writer.may_write.set()
        state.step = 2
        saver.save(state, {})
        saver.finish()
    for step, shift in ((1, 0.0), (2, 1.0)):
        other = train_tiny(seed=5, steps=0)
        load(tmp_path / f"step_{step}", other)
        assert all(torch.equal(p, before[name] + shift) for name, p in other.model.named_parameters())


def test_saver_prunes_by_its_config(tmp_path):
    state = train_tiny()
    config = CheckpointConfig(keep_last=1, keep_every=2, keep_best=1, asynchronous=False)
    with CheckpointSaver(tmp_path, config) as saver:
        for step, loss in enumerate([1.0, 4.0, 3.0, 2.0, 3.0], 1):
            state.step = step
            saver.save(state, {"val_loss": loss})
        saver.finish()
    assert names(tmp_path) == ["step_1", "step_2", "step_4", "step_5"]


def test_save_is_synchronous_without_host_memory(tmp_path, capfd, monkeypatch):
    """The system refuses the memory once. A later save, for which there is memory, is asynchronous again."""
    state = train_tiny()
    allocate = staging.HostBuffers.allocate
    requests = iter([1 << 50])  # more than any address space has

    def allocate_from_system(self, files):
        torch.empty(next(requests, 0), dtype=torch.uint8)
        allocate(self, files)

    monkeypatch.setattr(staging.HostBuffers, "allocate", allocate_from_system)
    writer = WaitingWriter()
    with CheckpointSaver(tmp_path, CheckpointConfig(keep_last=9), writer=writer) as saver:
        writer.may_write.set()
        state.step = 1
        saver.save(state, {})
        assert latest_checkpoint(tmp_path).name == "step_1" and not saver.in_flight
        assert saver.failures == 0 and not saver._buffers._buffers
        checkpoint.verify_checkpoint(tmp_path / "step_1")
        writer.may_write.clear()
        state.step = 2
        saver.save(state, {})
        assert saver.in_flight
        writer.may_write.set()
        saver.finish()
    printed = capfd.readouterr().err
    assert printed.count("rank 0 has no host memory to copy step 1: ") == 1 and "step 2" not in printed
    assert newest_valid_checkpoint(tmp_path).name == "step_2"
