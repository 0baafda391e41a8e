"""A model that transformers shards over two processes: gradients, and the checkpoint that both write together."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from glalm.hf import GLALMConfig, GLALMForCausalLM

IDS = torch.arange(18).view(2, 9)


def train_save_and_load(rank: int, folder: str, port: int) -> None:
    """Write the gradients of the sharded model, and the logits of what it saves."""
    from transformers.distributed import DistributedConfig

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    sharding = DistributedConfig(fsdp_size=2)
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/whole", distributed_config=sharding).train()
    model(IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    model.save_pretrained(f"{folder}/parts", is_main_process=rank == 0, distributed_checkpoint=True)
    dist.barrier()
    loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/parts", distributed_config=sharding).eval()
    with torch.no_grad():
        logits = loaded(IDS).logits
    if rank == 0:
        save_file(gradients | {"logits": logits}, f"{folder}/results.safetensors")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_model_trains_saves_and_loads_as_a_whole_one(tied, tmp_path: Path):
    pytest.importorskip("transformers.distributed")
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 48}
    model = GLALMForCausalLM(GLALMConfig(**shape, layers="gla+mamba2", tie_word_embeddings=tied)).train()
    model.save_pretrained(tmp_path / "whole")
    # The parts replace the weights of another model.
    GLALMForCausalLM(model.config).save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(train_save_and_load, args=(str(tmp_path), port), nprocs=2)
    found = load_file(tmp_path / "results.safetensors")
    model(IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    with torch.no_grad():
        logits = model.eval()(IDS).logits
    torch.testing.assert_close(found["logits"], logits)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "parts")  # It also loads in one process.
    torch.testing.assert_close(whole(IDS).logits, logits)
    # torch itself refuses a missing last part, because the tensors then look smaller.
    min((tmp_path / "parts").glob("shard-*")).unlink()
    with pytest.raises(ValueError, match=r"numbers of .*: one of its files .* is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
