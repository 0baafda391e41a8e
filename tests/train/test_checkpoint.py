import io
import json
import math
import os
import pickletools
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from glalm.config.run import OptimConfig
from glalm.data.files import file_sha256
from glalm.model.decoder import GLALMForCausalLM
from glalm.model.hf_config import GLALMConfig
from glalm.train import checkpoint, tensors
from glalm.train.checkpoint import CheckpointError
from glalm.train.optim import build_optimizers


def trained(seed: int = 0, steps: int = 2, tied: bool = False, name: str = "adamw"):
    torch.manual_seed(seed)
    config = GLALMConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_heads=2, intermediate_size=8, tie_word_embeddings=tied
    )
    model = GLALMForCausalLM(config)
    found = build_optimizers(model, OptimConfig(name=name))
    for _ in range(steps):
        ids = torch.randint(30, (2, 8))
        model(ids, labels=ids).loss.backward()
        for optimizer in found:
            optimizer.step()
            optimizer.zero_grad()
    return model, found


def save(folder, step: int, *contents):
    return checkpoint.write(folder, step, checkpoint.contents(step, *contents))


def saved(folder, step: int, state: dict | None = None):
    return save(folder, step, *trained(), state or {})


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_equal(tmp_path, tied):
    model, [optimizer] = trained(tied=tied)
    path = save(tmp_path, 7, model, [optimizer], {"tokens": 99})
    other, [other_optimizer] = trained(seed=1, steps=0, tied=tied)
    assert checkpoint.load(path, other, [other_optimizer]) == {"step": 7, "processes": 1, "tokens": 99}
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key, tensor in optimizer.state[a].items():
            assert torch.equal(tensor, other_optimizer.state[b][key]), (name, key)
    assert torch.equal(GLALMForCausalLM.from_pretrained(path).lm_head.weight, model.lm_head.weight)


def test_files_and_manifest(tmp_path):
    path = saved(tmp_path, 1)
    names = {p.name for p in path.iterdir()}
    assert names == {"config.json", "model.safetensors", "training.safetensors", "state.json", "manifest.json"}
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == names - {"manifest.json"}
    for file in path.iterdir():  # no pickle is written
        with pytest.raises(Exception):  # noqa: B017 (whatever the unpickler's disassembler says)
            pickletools.dis(file.read_bytes(), out=io.StringIO())


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json", "config.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_named(tmp_path, name, damage):
    path = saved(tmp_path, 1)
    file, content = path / name, bytearray((path / name).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    file.write_bytes(content[: len(content) - (damage == "cut")])
    if damage == "remove":
        file.unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(path, trained()[0])


def test_a_save_that_breaks_leaves_the_last_one(tmp_path, monkeypatch):
    first = saved(tmp_path, 1)

    def full_disk(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "fsync_path", full_disk)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [first]
    checkpoint.verify(first)


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """What a crash of the machine after the rename leaves must be whole, and the rename itself must last."""
    synced, renamed, fsync, rename = [], [], os.fsync, os.rename

    def syncing(fd):
        fsync(fd)
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))

    def renaming(source, target):
        renamed.append((set(synced), {str(source), *(str(p) for p in source.iterdir())}))
        rename(source, target)
        synced.clear()

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "rename", renaming)
    path = saved(tmp_path, 1)
    [(before, wanted)] = renamed
    assert before == wanted and len(wanted) == 1 + len(list(path.iterdir())) == 6
    assert synced == [str(tmp_path), str(tmp_path.parent)]


def test_the_extra_that_does_not_fit_is_left_alone(tmp_path):
    """As the norms of another train.guard.spike_window, or what an older checkpoint has not."""
    path = save(tmp_path, 1, *trained(), {}, {"a": torch.arange(3.0), "b": torch.ones(2)})
    extra = {"a": torch.zeros(3), "b": torch.full((4,), 7.0), "c": torch.full((1,), 7.0)}
    checkpoint.load(path, *trained(), extra)
    assert [t.tolist() for t in extra.values()] == [[0.0, 1.0, 2.0], [7.0] * 4, [7.0]]


def test_what_is_set_aside_again_leaves_what_was_before(tmp_path):
    asides = [checkpoint.set_aside(saved(tmp_path, 5, {"n": n}), "damaged") for n in (1, 2, 3)]
    assert [p.name for p in asides] == ["step_5.damaged", "step_5.damaged2", "step_5.damaged3"]
    assert [checkpoint.read_state(p)["n"] for p in asides] == [1, 2, 3]
    assert checkpoint.latest(tmp_path) is None


def test_latest_find_and_clean(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    for step in (2, 10, 9):
        saved(tmp_path, step)
    for name in (".step_11.tmp", "step_12.damaged"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path).name == checkpoint.newest_whole(tmp_path).name == "step_10"
    assert checkpoint.find(tmp_path, "step_9").name == "step_9"
    with pytest.raises(CheckpointError, match=r"no checkpoint step_3 .*there: step_2, step_9, step_10"):
        checkpoint.find(tmp_path, "step_3")
    for elsewhere in ("../" + tmp_path.name + "/step_9", "..", "."):
        with pytest.raises(CheckpointError, match=r"no checkpoint .* in"):
            checkpoint.find(tmp_path, elsewhere)
    checkpoint.clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_10", "step_12.damaged", "step_2", "step_9"]


def test_retention(tmp_path):
    """The last two, every fourth, and the two with the lowest validation loss; one without a loss is never best."""
    for step, loss in enumerate([5.0, 3.0, 4.0, 4.5, None, 3.5, 4.2, 4.1], 1):
        saved(tmp_path, step, {"val_loss": loss})
    checkpoint.prune(tmp_path, keep_last=2, keep_every=4, keep_best=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_2", "step_4", "step_6", "step_7", "step_8"]
    checkpoint.prune(tmp_path, keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_8"]


@pytest.mark.parametrize(
    "losses", [[math.nan, 3.0, 2.0, 4.0], [3.0, math.nan, 2.0, 4.0], [3.0, -math.inf, 2.0, math.nan]]
)
def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path, losses):
    for step, loss in enumerate(losses, 1):
        saved(tmp_path, step, {"val_loss": loss})
    checkpoint.prune(tmp_path, keep_last=1, keep_best=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_3", "step_4"]


def test_the_written_file_is_what_safetensors_reads(tmp_path):
    """Every dtype, a scalar, an empty tensor and one that is not contiguous, against the library's own reader."""
    made = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in tensors.DTYPES}
    made |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "turned": torch.rand(3, 5).T}
    entry = tensors.write(tmp_path / "all.safetensors", tensors.share(made, 0, 1))
    assert entry == {
        "bytes": (tmp_path / "all.safetensors").stat().st_size,
        "sha256": file_sha256(tmp_path / "all.safetensors"),
    }
    found = load_file(tmp_path / "all.safetensors")
    assert found.keys() == made.keys()
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in made.items())


def test_the_work_is_shared_by_size():
    """Each tensor is written once, by one of the processes, and none of them has much more than another."""
    made = {str(n): torch.zeros(n) for n in (100, 90, 50, 40, 30, 20, 10)}
    shares = [tensors.share(made, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(made)
    sizes = [sum(p.local.numel() for p in share.values()) for share in shares]
    assert max(sizes) - min(sizes) <= 30


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 7), max_size=3), wanted=st.tuples(st.integers(0, 7), st.integers(0, 7)))
def test_any_slices_make_up_any_other(tmp_path_factory, cuts, wanted):
    """A [7, 3] tensor in slices of rows, one a file, read as any other slice of its rows."""
    folder, whole = tmp_path_factory.mktemp("slices"), torch.arange(21.0).reshape(7, 3)
    borders, files = sorted({0, 7, *cuts}), []
    for a, b in pairwise(borders):
        files.append(folder / f"{a}.safetensors")
        tensors.write(files[-1], {"w": tensors.Piece(whole[a:b], (a, 0), (7, 3), 0, 1)})
    stored = tensors.index(files)
    a, b = sorted(wanted)
    part = tensors.Piece(torch.zeros(b - a, 3), (a, 0), (7, 3), 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "piece", lambda tensor, rank, world: part)
        tensors.read(stored, {"w": part.local})
    assert torch.equal(part.local, whole[a:b])
    if len(files) > 1:
        with pytest.raises(ValueError, match="w is not whole"):
            tensors.read(tensors.index(files[1:]), {"w": torch.zeros(7, 3)})


def test_muons_state_goes_the_same_way(tmp_path):
    model, found = trained(name="muon")
    path = save(tmp_path, 1, model, found, {})
    other, others = trained(seed=1, steps=0, name="muon")
    checkpoint.load(path, other, others)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        [state], [loaded] = ([o.state[p] for o in os if p in o.state] for os, p in ((found, a), (others, b)))
        assert state.keys() == loaded.keys() and all(torch.equal(state[k], loaded[k]) for k in state)


def test_another_model_is_refused(tmp_path):
    path = saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"holds another model: missing \[\], unexpected \['lm_head.weight'\]"):
        checkpoint.load(path, trained(tied=True)[0])
