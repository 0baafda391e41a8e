"""scripts/linearize.py on a small Llama, and train.py from what it writes."""

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from glalm.hf import GLALMForCausalLM

ROOT = Path(__file__).parents[2]


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


@pytest.fixture
def script(monkeypatch, capsys):
    """The script in this process: from its arguments to its exit code and what it says on stderr."""
    spec = spec_from_file_location("linearize_script", ROOT / "scripts/linearize.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["linearize.py", *map(str, arguments)])
        return module.main(), capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    "options, message",
    [
        (["--distil", 3], "--distil needs --data"),
        (["--distil", -2, "--data", "set"], "--distil -2 must be at least 0"),
        (["--distil", 1, "--data", "set", "--batch-size", 0], "--batch-size 0 must be at least 1"),
        (["--distil", 1, "--data", "set", "--seq-len", 0], "--seq-len 0 must be at least 1"),
        (["--distil", 1, "--data", "set", "--device", "foo"], "--device foo cannot be used here"),
        (["--distil", 1, "--data", "set", "--device", "cuda:99"], "--device cuda:99 cannot be used here"),
    ],
)
def test_what_cannot_work_is_refused_before_the_llama_is_loaded(script, tmp_path, options, message):
    code, said = script(tmp_path / "no-llama", tmp_path / "out", *options)
    assert code == 2 and said.startswith(f"ConfigError: {message}")


def test_nothing_is_overwritten(script, llama):
    before = {file: file.read_bytes() for file in llama.iterdir()}
    code, said = script(llama, llama)
    assert code == 2 and f"{llama} exists. Choose another OUT" in said
    assert {file: file.read_bytes() for file in llama.iterdir()} == before
    assert f"{llama} exists" in script(llama / "no-llama", llama)[1]  # nor is anything loaded first


@pytest.mark.parametrize("steps, what", [(6, "step 2: the loss is nan"), (1, "the logits after step 1 are not finite")])
def test_a_distillation_that_diverged_is_not_written(script, llama, token_folder, tmp_path, steps, what):
    options = ["--data", token_folder, "--batch-size", 2, "--seq-len", 16, "--lr", 1e30, "--device", "cpu"]
    code, said = script(llama, tmp_path / "out", "--distil", steps, *options)
    assert code == 1 and f"RunError: {what}" in said and "--lr than 1e+30" in said
    assert not (tmp_path / "out").exists()


def test_data_of_a_larger_vocabulary_is_refused(token_folder, tmp_path):
    shape = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(intermediate_size=48, **shape)).save_pretrained(tmp_path / "llama")
    options = ["--distil", 1, "--data", token_folder, "--seq-len", 16]
    made = run("scripts/linearize.py", tmp_path / "llama", tmp_path / "out", *options)
    assert made.returncode == 2 and "has a vocabulary of 300" in made.stderr and "Traceback" not in made.stderr
