import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from glalm.data.tokenizer import Tokenizer
from glalm.model import GLALMConfig, GLALMForCausalLM
from glalm.train import checkpoint
from glalm.train.loop import train

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts"))
export_hf = pytest.importorskip("export_hf")


def test_an_export_loads_in_transformers(run_config, token_folder, tmp_path):
    assert train(run_config) == 0
    (run_config.folder / "eval").mkdir()
    result = {"checkpoint": "step_6", "results": {"perplexity": 12.34, "by_length": [1]}}
    (run_config.folder / "eval" / "perplexity.json").write_text(json.dumps(result))
    out = tmp_path / "exported model"
    export_hf.export(run_config.folder, "latest", out)

    import dataclasses

    trained = GLALMForCausalLM(GLALMConfig(**dataclasses.asdict(run_config.model)))
    checkpoint.load(run_config.folder / "checkpoints" / "step_6", trained)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    ours, theirs = Tokenizer(token_folder / "tokenizer.model"), AutoTokenizer.from_pretrained(out)
    text = "alpha beta  gamma (delta) é"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs(text)["input_ids"][:1] == ours.before and theirs.decode(ours.encode(text)) == text
    ids = torch.tensor([ours.before + ours.encode(text)])
    assert torch.equal(loaded.eval()(ids).logits, trained.eval()(ids).logits)
    assert GenerationConfig.from_pretrained(out).eos_token_id == ours.eos_id == 2
    card = (out / "README.md").read_text()
    assert "| perplexity | perplexity | 12.34 |" in card and "384 (6 steps of 64)" in card and "seed | 1" in card
    assert not [p for p in out.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]


def test_errors_are_one_line(run_config, tmp_path):
    command = [sys.executable, export_hf.__file__, str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("CheckpointError: no checkpoint latest in")
