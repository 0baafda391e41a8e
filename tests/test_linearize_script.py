"""scripts/linearize.py on a small Llama, and train.py from what it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from glalm.model import GLALMForCausalLM

ROOT = Path(__file__).parent.parent


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(intermediate_size=48, **shape)).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def run(*command) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)


def test_converted_fitted_and_trained_on(llama, token_folder, tmp_path):
    out = tmp_path / "out"
    options = ["--softmax-layers", 1, "--distil", 3, "--data", token_folder, "--batch-size", 2, "--seq-len", 16]
    made = run("scripts/linearize.py", llama, out, *options)
    assert made.returncode == 0, made.stderr
    model, source = GLALMForCausalLM.from_pretrained(out), LlamaForCausalLM.from_pretrained(llama)
    assert model.config.layer_mixers() == ["gla", "attention"]
    kept = model.model.layers[1].attn.q_proj.weight, source.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(*kept)

    train = ["train.py", "--config-dir", out / "configs", "model=linearized", f"train.init_from={out}", "name=on"]
    train += [
        f"runs_dir={tmp_path}",
        f"data.path={token_folder}",
        "data.seq_len=16",
        "train.steps=1",
        "train.batch_size=2",
    ]
    train += ["optim.lr=1e-9", "optim.min_lr=0", "optim.warmup_steps=0", "train.eval_sequences=4"]
    trained = run(*train)
    assert trained.returncode == 0, trained.stderr[-2000:]
    row = json.loads((tmp_path / "on" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["step"] == 0 and row["val_loss"] > 0
    [checkpoint] = (tmp_path / "on" / "checkpoints").glob("step_*")
    start = model.state_dict()
    end = load_file(checkpoint / "model.safetensors")
    assert all((end[n] - start[n]).abs().max() < 1e-6 for n in end)

    other = run(*train, "name=other", "model.num_hidden_layers=1", "model.layers=[gla]")
    assert other.returncode == 2
    assert "holds another model than model.*" in other.stderr and "model.num_hidden_layers: 2 -> 1" in other.stderr
    missing = run(*train, "name=missing", f"train.init_from={tmp_path}/nowhere")
    assert missing.returncode == 2 and "train.init_from=" in missing.stderr


def test_distillation_needs_data(llama, tmp_path):
    made = run("scripts/linearize.py", llama, tmp_path / "out", "--distil", 3)
    assert made.returncode == 2 and "--distil needs --data" in made.stderr


def test_data_of_a_larger_vocabulary_is_refused(token_folder, tmp_path):
    shape = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(intermediate_size=48, **shape)).save_pretrained(tmp_path / "llama")
    options = ["--distil", 1, "--data", token_folder, "--seq-len", 16]
    made = run("scripts/linearize.py", tmp_path / "llama", tmp_path / "out", *options)
    assert made.returncode == 2 and "has a vocabulary of 300" in made.stderr and "Traceback" not in made.stderr
