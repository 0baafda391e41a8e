import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from glalm.data.tokenizer import Tokenizer
from glalm.model import GLALMConfig, GLALMForCausalLM
from glalm.strict import RunError
from glalm.train import checkpoint
from glalm.train.loop import train

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts"))
export_hf = pytest.importorskip("export_hf")


def test_an_export_loads_in_transformers(run_config, token_folder, tmp_path):
    assert train(run_config) == 0
    (run_config.folder / "eval").mkdir()
    weights = checkpoint.weights_sha256(run_config.folder / "checkpoints" / "step_6")
    numbers = {"lambada_openai/acc": 0.125, "wikitext/word_perplexity": None}
    for name, checksum in (("zero_shot", weights), ("older_weights", "c0ffee")):
        result = {"checkpoint": "step_6", "checksum": checksum, "results": {"chance": 0.1}, "metrics": numbers}
        (run_config.folder / "eval" / f"{name}.json").write_text(json.dumps(result))
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
    assert [line for line in card.splitlines() if "/acc" in line] == ["| zero_shot | lambada_openai/acc | 0.125 |"]
    assert "chance" not in card and "word_perplexity" not in card
    assert "384 (6 steps of 64)" in card and "seed | 1" in card
    assert not [p for p in out.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]


def test_a_tokenizer_that_the_model_was_not_trained_with_is_refused(run_config, tmp_path):
    train(run_config)
    data = json.loads((run_config.folder / "data.json").read_text())
    data["tokenizer"]["fingerprint"] = "another"
    (run_config.folder / "data.json").write_text(json.dumps(data))
    with pytest.raises(RunError, match="has another tokenizer now than"):
        export_hf.export(run_config.folder, "latest", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line(run_config, tmp_path):
    command = [sys.executable, export_hf.__file__, str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("CheckpointError: no checkpoint latest in")
