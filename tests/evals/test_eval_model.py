import json
import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from glalm import IGNORE_INDEX
from glalm.config.strict import ConfigError, RunError
from glalm.data.loader import Windows
from glalm.data.tokenizer import Tokenizer
from glalm.evals.eval_model import EvalModel
from glalm.evals.evaluator import EvalContext
from glalm.evals.inputs import count_learned_positions, open_eval_model, open_split
from glalm.evals.options import EvalConfig
from glalm.evals.perplexity import compute_perplexity
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.prepare.pipeline import prepare_data

CPU = torch.device("cpu")


def gemma2() -> Gemma2ForCausalLM:
    """Caps its logits after the head."""
    shape = {"vocab_size": tiny.VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**shape, **heads, final_logit_softcapping=2.0, initializer_range=0.3)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=tiny.VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    ).eval()


def gla() -> GLALMForCausalLM:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    return GLALMForCausalLM(GLALMConfig(vocab_size=tiny.VOCAB_SIZE, **shape, initializer_range=0.3)).eval()


def wanted(path, tmp_path, **changes) -> EvalConfig:
    return EvalConfig(checkpoint=str(path), runs_dir=str(tmp_path / "runs"), **changes)


MODELS = {"llama": tiny.llama, "gemma2": gemma2, "gpt2": gpt2, "gla": gla}


@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_the_cross_entropy_of_the_logits_and_carry_the_state(kind):
    model = MODELS[kind]()
    eval_model = EvalModel(model)
    ids = torch.randint(tiny.VOCAB_SIZE, (3, 41), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[0, :5] = IGNORE_INDEX
    with torch.no_grad():
        logits = model(ids[:, :-1], use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    whole, _ = eval_model.score_tokens(ids[:, :-1], targets)
    assert torch.allclose(whole, expected, atol=1e-4, rtol=1e-5)
    assert not whole[0, :5].any()
    state, parts = None, []
    for start in range(0, 40, 16):
        part = slice(start, start + 16)
        losses, state = eval_model.score_tokens(ids[:, :-1][:, part], targets[:, part], state, return_state=True)
        parts.append(losses)
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)


def test_which_models_give_hidden_states():
    assert EvalModel(tiny.llama())._head is not None
    assert EvalModel(gemma2())._head is None  # the head's output is not yet the logits
    assert EvalModel(gla())._head is not None


def test_a_forward_that_is_replaced_gives_the_scores(monkeypatch):
    """A cap on logits changes the small ones by less than float32 shows in most comparisons."""
    forward = GLALMForCausalLM.forward

    def cap(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output["logits"] = 300 * (output.logits / 300).tanh()
        return output

    monkeypatch.setattr(GLALMForCausalLM, "forward", cap)
    assert EvalModel(gla())._head is None


def test_learned_positions_bound_the_length():
    assert count_learned_positions(gpt2()) == 64
    assert count_learned_positions(tiny.llama()) is None
    with pytest.raises(ConfigError, match=r"max_length: model has learned positions for 64 tokens and cannot read 65"):
        EvalModel(gpt2(), max_length=64).require_length(65, "harness.max_length")


def test_perplexity_of_a_transformers_model_is_transformers_own(tmp_path):
    folder, model = tiny.saved(tmp_path / "baseline", tiny.llama()), tiny.llama()
    words, text = np.random.default_rng(0), tmp_path / "text"
    text.mkdir()
    for i in range(8):
        (text / f"{i}.txt").write_text(" ".join(words.choice(["alpha", "beta", "gamma"], 60)))
    prepare_data([text], tmp_path / "data", tokenizer=str(folder), held_out={"validation": 0.5}, progress=False)

    config = wanted(folder, tmp_path, data_path=str(tmp_path / "data"))
    eval_model = open_eval_model(config, CPU)
    assert (eval_model.name, eval_model.train_length, eval_model.run_config) == ("baseline", 64, None)
    windows = Windows(open_split(config, eval_model, "validation"), 64)
    found = compute_perplexity(eval_model, windows, 3, EvalContext())

    losses = []
    for i in range(len(windows)):
        ids = torch.from_numpy(windows[i].astype(np.int64))[None]
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gla"])
def test_a_saved_folder(kind, tmp_path):
    model = MODELS[kind]()
    folder = tiny.saved(tmp_path / "exported", model)
    eval_model = open_eval_model(wanted(folder, tmp_path), CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), eval_model.causal_lm.parameters(), strict=True))
    assert len(eval_model.checksum) == 64
    assert (eval_model.precision, eval_model.output_folder) == ("fp32", tmp_path / "runs" / "exported")
    assert eval_model.is_recurrent == (kind == "gla")
    assert eval_model.tokenizer.decode(eval_model.tokenizer.encode("a text")) == "a text"
    assert eval_model.document_prefix == (
        (1,) if kind == "gla" else ()
    )  # ours were trained on documents that <s> begins
    assert open_eval_model(wanted(folder, tmp_path, train_length=48, out="there"), CPU).train_length == 48


def test_another_config_of_the_same_weights_is_another_model(tmp_path):
    folder = tiny.saved(tmp_path / "llama", tiny.llama())
    before = open_eval_model(wanted(folder, tmp_path), CPU).checksum
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert open_eval_model(wanted(folder, tmp_path), CPU).checksum != before


def test_a_text_begins_as_transformers_tokenizer_has_it(tmp_path):
    folder = tiny.saved(tmp_path / "exported", tiny.llama(), adds_bos=True)
    assert open_eval_model(wanted(folder, tmp_path), CPU).document_prefix == (1,)


def test_what_is_no_model(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"there is no such folder\. Write latest or step_N"):
        open_eval_model(wanted("./nowhere/at/all", tmp_path), CPU)

    def offline(*_, **__):
        raise OSError("no network\nmore")

    monkeypatch.setattr("glalm.evals.inputs.snapshot_download", offline)
    with pytest.raises(
        ConfigError,
        match=r"someone/a-model: there is no such folder, and the hub gave no model of that name .*no network\)",
    ):
        open_eval_model(wanted("someone/a-model", tmp_path), CPU)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        open_eval_model(wanted(tmp_path, tmp_path), CPU)

    folder = tiny.saved(tmp_path / "exported", tiny.llama())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"do not fit its config\.json.*model\.norm\.weight"):
        open_eval_model(wanted(folder, tmp_path), CPU)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no \.safetensors"):
        open_eval_model(wanted(folder, tmp_path), CPU)


def test_results_never_land_in_another_models_run(tmp_path):
    folder = tiny.saved(tmp_path / "exported", tiny.llama())
    (tmp_path / "runs" / "exported").mkdir(parents=True)
    (tmp_path / "runs" / "exported" / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a run of that name; write out=FOLDER"):
        open_eval_model(wanted(folder, tmp_path), CPU)


def test_a_model_without_its_tokenizer(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "bare")
    eval_model = open_eval_model(wanted(tmp_path / "bare", tmp_path), CPU)
    with pytest.raises(ConfigError, match=r"evals=\[recall\]: bare has no readable tokenizer"):
        eval_model.require_tokenizer("recall")


def test_the_tokenizer_is_that_of_the_data_where_the_folder_has_none(tmp_path, token_folder):
    tiny.llama(vocab_size=1000).save_pretrained(tmp_path / "bare")
    opened = open_eval_model(wanted(tmp_path / "bare", tmp_path, data_path=str(token_folder)), CPU)
    assert opened.require_tokenizer("generate").fingerprint == Tokenizer(token_folder / "tokenizer.model").fingerprint


def test_a_warning_says_why_a_tokenizer_cannot_be_used(tmp_path, caplog):
    folder = tiny.saved(tmp_path / "exported", tiny.llama())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert open_eval_model(wanted(folder, tmp_path), CPU).tokenizer is None
    assert "names no end-of-document (EOS) token" in caplog.text


def test_data_of_another_tokenizer(tmp_path, token_folder):
    folder = tiny.saved(tmp_path / "exported", tiny.llama(vocab_size=400))
    config = wanted(folder, tmp_path, data_path=str(token_folder))
    with pytest.raises(ConfigError, match="prepared with another tokenizer than exported has"):
        open_split(config, open_eval_model(config, CPU), "validation")
    small = tiny.saved(tmp_path / "small", tiny.llama())
    config = wanted(small, tmp_path, data_path=str(token_folder))
    with pytest.raises(ConfigError, match="a vocabulary of 300, the model one of 260"):
        open_split(config, open_eval_model(config, CPU), "validation")
    with pytest.raises(ConfigError, match="is not a checkpoint of a run: write data_path="):
        open_split(wanted(small, tmp_path), open_eval_model(config, CPU), "validation")


@pytest.mark.parametrize("content", ["", "[]", pytest.param("[" * 9999, id="too deep")])
def test_a_damaged_config_of_a_models_folder_is_named(content, tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config.json is damaged"):
        open_eval_model(wanted(tmp_path, tmp_path), torch.device("cpu"))
