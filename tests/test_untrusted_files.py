"""Files of others are read without running code that they bring, and without asking on the terminal."""

import ast
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from glalm.compat.export import load_hf_tokenizer
from glalm.config.strict import ConfigError
from glalm.data.tokenizer import Tokenizer
from glalm.evals.inputs import open_pretrained
from glalm.evals.options import EvalConfig
from glalm.hf import GLALMConfig, GLALMForCausalLM

ROOT = Path(__file__).parents[1]
SOURCES = [path for room in ("glalm", "scripts", "benchmarks", "examples") for path in (ROOT / room).rglob("*.py")]
PICKLES = {"torch.load", "pickle.load", "pickle.loads", "numpy.load", "np.load"}
# These read what processes that they have started send through a pipe, and no files.
PIPES = {ROOT / "glalm/launcher.py", ROOT / "glalm/prepare/workers.py"}


@pytest.fixture
def no_terminal(monkeypatch):
    """Fail if anything asks on the terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked on the terminal"))


@pytest.fixture
def code_folder(tmp_path):
    """Return a folder with a tokenizer and a config that name classes in a file of the folder."""
    folder = tmp_path / "brings code"
    folder.mkdir()
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<e>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["the cat runs over a stone"], trainer)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Mine", "eos_token": "<e>", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    return folder


def test_code_of_a_tokenizer_is_not_run(code_folder, no_terminal):
    with pytest.raises(ValueError, match=r"Without auto_map in tokenizer_config\.json, tokenizer\.json is"):
        Tokenizer(code_folder)
    settings = json.loads((code_folder / "tokenizer_config.json").read_text())
    del settings["auto_map"]
    (code_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(code_folder)
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert load_hf_tokenizer(code_folder, tokenizer).encode("the cat") == tokenizer.encode("the cat")
    assert not (code_folder / "ran").exists()


@pytest.mark.parametrize("model_type", ["mine", "glalm"])
def test_code_of_a_model_is_not_run(model_type, code_folder, no_terminal):
    GLALMForCausalLM(GLALMConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_heads=2)).save_pretrained(
        code_folder
    )
    tree = json.loads((code_folder / "config.json").read_text())
    names = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    (code_folder / "config.json").write_text(json.dumps(tree | {"model_type": model_type, "auto_map": names}))
    config = EvalConfig(checkpoint=str(code_folder))
    if model_type == "glalm":
        assert type(open_pretrained(config, code_folder, torch.device("cpu"), "fp32").causal_lm) is GLALMForCausalLM
    else:
        with pytest.raises(ConfigError, match="transformers cannot load"):
            open_pretrained(config, code_folder, torch.device("cpu"), "fp32")
    assert not (code_folder / "ran").exists()


def test_nothing_is_loaded_that_may_run_code():
    for path in SOURCES:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            assert name not in PICKLES or path in PIPES, f"{path}:{call.lineno}: {name}"
            if name.startswith("Auto") and name.endswith(".from_pretrained"):
                trusts = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "trust_remote_code"]
                assert trusts == ["False"], f"{path}:{call.lineno}: give trust_remote_code=False"
