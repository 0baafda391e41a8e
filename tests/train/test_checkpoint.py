import io
import json
import pickletools

import pytest
import torch

from glalm.config import OptimConfig
from glalm.model import GLALMConfig, GLALMForCausalLM
from glalm.train import checkpoint
from glalm.train.checkpoint import CheckpointError
from glalm.train.optim import adamw


def trained(seed: int = 0, steps: int = 2, tied: bool = False):
    torch.manual_seed(seed)
    config = GLALMConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_heads=2, intermediate_size=8, tie_word_embeddings=tied
    )
    model = GLALMForCausalLM(config)
    optimizer = adamw(model, OptimConfig())
    for _ in range(steps):
        ids = torch.randint(30, (2, 8))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_equal(tmp_path, tied):
    model, optimizer = trained(tied=tied)
    path = checkpoint.save(tmp_path, 7, model, optimizer, {"tokens": 99})
    other, other_optimizer = trained(seed=1, steps=0, tied=tied)
    assert checkpoint.load(path, other, other_optimizer) == {"step": 7, "tokens": 99}
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key, tensor in optimizer.state[a].items():
            assert torch.equal(tensor, other_optimizer.state[b][key]), (name, key)
    assert torch.equal(GLALMForCausalLM.from_pretrained(path).lm_head.weight, model.lm_head.weight)


def test_files_and_manifest(tmp_path):
    path = checkpoint.save(tmp_path, 1, *trained(), {})
    names = {p.name for p in path.iterdir()}
    assert names == {"config.json", "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == names - {"manifest.json"}
    for file in path.iterdir():  # no pickle is written
        with pytest.raises(Exception):  # noqa: B017 (whatever the unpickler's disassembler says)
            pickletools.dis(file.read_bytes(), out=io.StringIO())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_named(tmp_path, name, damage):
    path = checkpoint.save(tmp_path, 1, *trained(), {})
    file, content = path / name, bytearray((path / name).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    file.write_bytes(content[: len(content) - (damage == "cut")])
    if damage == "remove":
        file.unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(path, *trained())


def test_a_save_that_breaks_leaves_the_last_one(tmp_path, monkeypatch):
    model, optimizer = trained()
    first = checkpoint.save(tmp_path, 1, model, optimizer, {})

    def full_disk(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, model, optimizer, {})
    assert checkpoint.latest(tmp_path) == first
    checkpoint.verify(first)
    checkpoint.clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_latest_find_and_prune(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    model, optimizer = trained()
    for step in (2, 10, 9):
        checkpoint.save(tmp_path, step, model, optimizer, {})
    (tmp_path / ".step_11.tmp").mkdir()
    assert checkpoint.latest(tmp_path).name == "step_10"
    assert checkpoint.find(tmp_path, "step_9").name == "step_9"
    with pytest.raises(CheckpointError, match=r"no checkpoint step_3 .*there: step_2, step_9, step_10"):
        checkpoint.find(tmp_path, "step_3")
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_10", "step_9"]


def test_another_model_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, *trained(), {})
    with pytest.raises(CheckpointError, match=r"holds another model: missing \[\], unexpected \['lm_head.weight'\]"):
        checkpoint.load(path, *trained(tied=True))
