"""Run `glalm linearize` on a small Llama, and train from the model that it writes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from glalm.commands.checkpoints import linearize_llama
from glalm.compat import linearize
from glalm.hf import GLALMForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(intermediate_size=48, **shape)).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def run_script(*command) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_convert_distil_and_train(llama, token_folder, tmp_path):
    out = tmp_path / "out"
    options = ["--softmax-layers", 1, "--distil", 3, "--data", token_folder, "--batch-size", 2, "--seq-len", 16]
    done = run_script("scripts/linearize.py", llama, out, *options)
    assert done.returncode == 0, done.stderr
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
    trained = run_script(*train)
    assert trained.returncode == 0, trained.stderr[-2000:]
    row = json.loads((tmp_path / "on" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["step"] == 0 and row["val_loss"] > 0
    [checkpoint] = (tmp_path / "on" / "checkpoints").glob("step_*")
    start = model.state_dict()
    end = load_file(checkpoint / "model.safetensors")
    assert all((end[n] - start[n]).abs().max() < 1e-6 for n in end)

    other = run_script(*train, "name=other", "model.num_hidden_layers=1", "model.layers=[gla]")
    assert other.returncode == 2
    assert "holds another model than model.*" in other.stderr and "model.num_hidden_layers: 2 -> 1" in other.stderr
    missing = run_script(*train, "name=missing", f"train.init_from={tmp_path}/nowhere")
    assert missing.returncode == 2 and "train.init_from=" in missing.stderr


@pytest.fixture
def run_linearize(monkeypatch, capsys):
    """run_linearize(*arguments) runs the command in this process and returns its exit code and stderr."""

    def run_main(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["linearize.py", *map(str, arguments)])
        return linearize_llama(), capsys.readouterr().err

    return run_main


@pytest.mark.parametrize(
    "options, message",
    [
        (["--distil", 3], "--distil needs --data"),
        (["--distil", -2, "--data", "set"], "--distil -2 must be at least 0"),
        (["--distil", 1, "--data", "set", "--batch-size", 0], "--batch-size 0 must be at least 1"),
        (["--distil", 1, "--data", "set", "--seq-len", 0], "--seq-len 0 must be at least 1"),
        (["--distil", 1, "--data", "set", "--lr", "nan"], "--lr nan must be positive and finite"),
        (["--distil", 1, "--data", "set", "--lr", -1], "--lr -1.0 must be positive and finite"),
        (["--data", "set"], "--data is for --distil. Add --distil STEPS"),
        (["--seq-len", 128], "--seq-len is for --distil. Add --distil STEPS"),
        (["--distil", 1, "--data", "set", "--device", "foo"], "--device foo cannot be used here"),
        (["--distil", 1, "--data", "set", "--device", "cuda:99"], "--device cuda:99 cannot be used here"),
    ],
)
def test_bad_options_are_errors_before_the_llama_is_loaded(run_linearize, tmp_path, options, message):
    code, stderr = run_linearize(tmp_path / "no-llama", tmp_path / "out", *options)
    assert code == 2 and stderr.startswith(f"ConfigError: {message}")


def test_a_missing_llama_is_an_error(run_linearize, tmp_path):
    code, stderr = run_linearize(tmp_path / "no-llama", tmp_path / "out")
    assert (code, stderr.count("no-llama is not a folder. Name one with a config.json")) == (2, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--softmax-layers", 2], r"softmax_layers: the model has no layers \[2\], only 0 to 1"),
        (["--softmax-layers", 0, 1, "--distil", 1, "--data", "SET"], "--softmax-layers names every layer"),
        (["--distil", 1, "--data", "no-set"], r"--data no-set: no-set/manifest\.json is missing"),
        (["--distil", 1, "--data", "SET", "--seq-len", 10**6], "--seq-len 1000000: Windows of length=1000000 need"),
    ],
)
def test_what_does_not_fit_is_an_error_before_the_llama_is_loaded(
    run_linearize, llama, token_folder, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr(linearize, "load_llama", lambda *_: pytest.fail("The Llama is loaded."))
    options = [token_folder if option == "SET" else option for option in options]
    code, stderr = run_linearize(llama, tmp_path / "out", *options)
    assert code == 2 and re.search(f"ConfigError: {message}", stderr)


def test_a_folder_that_cannot_be_created_is_an_error_before_the_llama_is_loaded(run_linearize, llama, monkeypatch):
    monkeypatch.setattr(linearize, "load_llama", lambda *_: pytest.fail("The Llama is loaded."))
    code, stderr = run_linearize(llama, llama / "config.json" / "out")
    assert code == 2 and "NotADirectoryError: " in stderr and str(llama / "config.json") in stderr


def test_a_failed_conversion_leaves_no_folder(run_linearize, llama, tmp_path, monkeypatch):
    def save_a_part(model, folder):
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(GLALMForCausalLM, "save_pretrained", save_a_part)
    assert run_linearize(llama, tmp_path / "out")[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_data_with_larger_vocabulary_is_an_error(run_linearize, token_folder, tmp_path):
    LlamaConfig(vocab_size=100).save_pretrained(tmp_path / "llama")  # It has no weights that could be loaded.
    options = ["--distil", 1, "--data", token_folder, "--seq-len", 16]
    code, stderr = run_linearize(tmp_path / "llama", tmp_path / "out", *options)
    assert code == 2 and re.search("ConfigError: .* has a vocabulary of 300, but .* has one of 100", stderr)


def test_existing_folder_is_not_overwritten(run_linearize, llama):
    before = {file: file.read_bytes() for file in llama.iterdir()}
    code, stderr = run_linearize(llama, llama)
    assert code == 2 and f"{llama} exists. Choose another OUT" in stderr
    assert {file: file.read_bytes() for file in llama.iterdir()} == before
    assert f"{llama} exists" in run_linearize(llama / "no-llama", llama)[1]  # nor is anything loaded first


@pytest.mark.parametrize("steps, what", [(6, "step 2: the loss is nan"), (1, "the logits after step 1 are not finite")])
def test_diverged_distillation_writes_nothing(run_linearize, llama, token_folder, tmp_path, steps, what):
    options = ["--data", token_folder, "--batch-size", 2, "--seq-len", 16, "--lr", 1e30, "--device", "cpu"]
    code, stderr = run_linearize(llama, tmp_path / "out", "--distil", steps, *options)
    assert code == 1 and f"RunError: {what}" in stderr and "--lr than 1e+30" in stderr
    assert not (tmp_path / "out").exists()
