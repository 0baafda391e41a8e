import argparse
import dataclasses
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, GenerationConfig, pipeline

import glalm.hf  # noqa: F401 (registers the model)
from glalm.compat.export import export_run, format_scores, load_hf_tokenizer
from glalm.compat.fla import export_checkpoint
from glalm.config.stages import StageConfig
from glalm.config.strict import RunError
from glalm.data.tokenizer import Tokenizer
from glalm.evals import perplexity
from glalm.evals.evaluator import EvalContext
from glalm.evals.inputs import open_eval_model
from glalm.evals.options import EvalConfig
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.prepare.pipeline import prepare_data
from glalm.prepare.tokenizer_training import train_sentencepiece
from glalm.train import checkpoint
from glalm.train.trainer import train

CHECKPOINT_FILES = ("config.json", "model.safetensors", "state.json", "training.safetensors")
SCRIPT = Path(__file__).parents[2] / "scripts" / "export_hf.py"


def test_export_loads_in_transformers(run_config, token_folder, tmp_path):
    assert train(run_config) == 0
    (run_config.folder / "eval").mkdir()
    weights = checkpoint.weights_sha256(run_config.folder / "checkpoints" / "step_6")
    numbers = {"lambada_openai/acc": 0.125, "wikitext/word_perplexity": None}
    for name, checksum in (("zero_shot", weights), ("older_weights", "c0ffee")):
        result = {"checkpoint": "step_6", "checksum": checksum, "results": {"chance": 0.1}, "metrics": numbers}
        (run_config.folder / "eval" / f"{name}.json").write_text(json.dumps(result))
    record = json.loads((run_config.folder / "run.json").read_text())
    record["config"]["train"] |= {"init_from": f"{tmp_path}/initial", "resume_from": f"{tmp_path}/old/step_3"}
    record["config"]["train_evals"] = {"data_dir": f"{tmp_path}/tasks"}
    record["config"]["resume"] = str(run_config.folder)
    (run_config.folder / "run.json").write_text(json.dumps(record))
    out = tmp_path / "exported model"
    export_run(run_config.folder, "latest", out)

    trained = GLALMForCausalLM(GLALMConfig.from_model_config(run_config.model))
    checkpoint.load_model(run_config.folder / "checkpoints" / "step_6", trained)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    ours, theirs = Tokenizer(token_folder / "tokenizer.model"), AutoTokenizer.from_pretrained(out)
    text = "alpha beta  gamma (delta) é"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs(text)["input_ids"][:1] == ours.bos_ids and theirs.decode(ours.encode(text)) == text
    ids = torch.tensor([ours.bos_ids + ours.encode(text)])
    assert torch.equal(loaded.eval()(ids).logits, trained.eval()(ids).logits)
    assert GenerationConfig.from_pretrained(out).eos_token_id == ours.eos_id == 2
    card = (out / "README.md").read_text()
    assert str(Path(run_config.data.path).parent) not in card and run_config.runs_dir not in card
    assert str(tmp_path) not in card and '"init_from": "initial"' in card and '"data_dir": "tasks"' in card
    assert [line for line in card.splitlines() if "/acc" in line] == ["| zero_shot | lambada_openai/acc | 0.125 |"]
    assert "chance" not in card and "word_perplexity" not in card
    assert (
        card.partition("\n# ")[2].splitlines()[2].startswith("A causal language model, pretrained with glalm. To load")
    )
    assert "| token mixer | `gla` |" in card
    assert "384 (6 steps of 64)" in card and "seed | 1" in card
    assert not [p for p in out.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
    texts = ["alpha beta", "gamma"]
    generate = pipeline("text-generation", model=str(out))
    more = {"do_sample": False, "max_new_tokens": 3}
    assert generate(texts, batch_size=2, **more) == [generate(text, **more) for text in texts]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_may_read(umask, mode, run_config, build_model, tmp_path):
    """Of everything that is written through safetensors' own writer."""
    before = os.umask(umask)
    try:
        model = build_model()
        model.save_pretrained(tmp_path / "saved")
        export_checkpoint(model, tmp_path / "fla")
        model(torch.arange(4)[None], use_cache=True).past_key_values.save(tmp_path / "cache.safetensors")
    finally:
        os.umask(before)
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(paths) == 7 and {stat.S_IMODE(path.stat().st_mode) for path in paths} == {mode}


@pytest.mark.parametrize("kind", ["SentencePiece", "tokenizer.json"])
def test_padding_is_not_learnt_and_the_end_of_a_document_is(kind, token_folder, hugging_face, tmp_path):
    """In the way of docs/transformers.md, for the tokenizers of exported models."""
    path = token_folder / "tokenizer.model" if kind == "SentencePiece" else hugging_face
    load_hf_tokenizer(path, Tokenizer(path)).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding_side="right")
    examples = []
    for text in ("alpha", "alpha beta gamma"):
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        examples.append({"input_ids": ids, "labels": ids})
    short, long = (len(example["input_ids"]) for example in examples)
    batch = DataCollatorForSeq2Seq(tokenizer)(examples)
    assert batch["labels"][0].tolist() == examples[0]["labels"] + [-100] * (long - short)
    assert batch["labels"][0, short - 1] == Tokenizer(path).eos_id and batch["attention_mask"][0].sum() == short
    prompts = tokenizer(["alpha", "alpha beta gamma"], padding=True, padding_side="left")
    assert prompts["attention_mask"][0] == [0] * (long - short) + [1] * (short - 1)


def test_card_counts_steps_in_the_batches_that_they_had(run_config, change, tmp_path):
    """256 tokens are 4 steps of 64, and 2 of the 128 of the resumed run. Ten steps have 64 on average."""
    optim = dataclasses.replace(run_config.optim, warmup_steps=None, warmup_tokens=256)
    config = change(run_config, optim=optim)
    assert train(config) == 0
    for steps, batch_size in ((7, 8), (9, 2), (10, 4)):
        batch = {"train.steps": steps, "train.batch_size": batch_size}
        assert train(change(config, **batch, **{"train.allow_changes": [*batch]})) == 0
    export_run(config.folder, "latest", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "640 (10 steps)" in card and "4 steps of warm-up" in card


@pytest.mark.slow
def test_card_names_the_stages_of_a_run(run_config, tmp_path):
    stages = {
        "stable": StageConfig(tokens=192, schedule="constant"),
        "decay": StageConfig(tokens=64, schedule="linear", lr=0.0, seq_len=32, batch_size=2),
    }
    config = dataclasses.replace(run_config, train=dataclasses.replace(run_config.train, steps=None, stages=stages))
    assert train(config) == 0
    export_run(config.folder, "latest", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| stage stable | tokens 192, schedule constant |" in card
    assert "| stage decay | tokens 64, seq_len 32, batch_size 2, schedule linear, lr 0 |" in card
    assert "adamw, the schedules of the stages, peak 0.01" in card


def test_scores_on_the_card_say_what_they_are_of(tmp_path):
    """None is of a part of a task, of other text or of other weights without a word."""
    path = tmp_path / "checkpoints" / "step_6"
    path.mkdir(parents=True)
    files = {name: {"sha256": "c0ffee", "bytes": 1} for name in CHECKPOINT_FILES}
    (path / "manifest.json").write_text(json.dumps({"files": files}))
    (tmp_path / "eval").mkdir()
    text = {"data_path": "/private/foreign", "data_sha256": "f", "split": "validation", "seq_len": 32}
    for name, settings, weights in (
        ("perplexity", text, "c0ffee"),
        ("zero_shot", {"limit": 100, "num_fewshot": 5}, "c0ffee"),
        ("needle", {}, "other"),
    ):
        result = {
            "checkpoint": "step_6",
            "checksum": weights,
            "settings": settings,
            "results": {},
            "metrics": {"x": 0.5},
        }
        (tmp_path / "eval" / f"{name}.json").write_text(json.dumps(result))
    assert format_scores(path).splitlines()[2:] == [
        "| perplexity (validation split of foreign, windows of 32 tokens) | x | 0.5 |",
        "| zero_shot (only the first 100 questions of each task, 5 examples before each question) | x | 0.5 |",
    ]


@pytest.mark.parametrize("kind", ["SentencePiece", "transformers"])
def test_export_is_evaluated_like_its_run(kind, run_config, change, token_folder, tmp_path):
    data = token_folder
    if kind == "transformers":
        AutoTokenizer.from_pretrained(train_and_export(run_config, tmp_path / "first")).save_pretrained(
            tmp_path / "tokenizer"
        )
        data, tokenizer = tmp_path / "data", str(tmp_path / "tokenizer")
        prepare_data([token_folder.parent / "words.jsonl"], data, tokenizer=tokenizer, progress=False)
    run = change(run_config, name="reset", **{"data.document_boundaries": "reset_state", "data.path": str(data)})
    out = train_and_export(run, tmp_path / "out")
    found = []
    for checkpoint_, more in (("latest", {}), (str(out), {"data_path": str(data)})):
        config = EvalConfig(name=run.name, runs_dir=run.runs_dir, checkpoint=checkpoint_, **more)
        subject = open_eval_model(config, torch.device("cpu"))
        evaluator = perplexity.PerplexityEvaluator(subject, config)
        found.append(
            (subject.tokenizer.fingerprint, subject.document_prefix, evaluator.settings, evaluator.run(EvalContext()))
        )
    assert found[0] == found[1] and found[0][2]["document_boundaries"] == "reset_state"


def train_and_export(config, out: Path) -> Path:
    assert train(config) == 0
    export_run(config.folder, "latest", out)
    return out


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_generation_continues_beyond_the_training_length(run_config, tmp_path):
    out = train_and_export(run_config, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.full((1, 30), 7)  # The model was trained on windows of 16 tokens.
    assert model.generate(ids, attention_mask=ids.ne(0), eos_token_id=None).shape == (1, 50)


def test_tokenizer_that_transformers_misreads_is_not_exported(run_config, change, token_folder, tmp_path):
    english = [Path(module.__file__).read_text() for module in (argparse, perplexity)]
    train_sentencepiece(english, tmp_path / "unigram.model", 400, model_type="unigram")
    data = tmp_path / "data"
    prepare_data([token_folder.parent / "words.jsonl"], data, tokenizer=str(tmp_path / "unigram.model"), progress=False)
    with pytest.raises(RunError, match=r"nothing was exported.*--type bpe"):
        train_and_export(change(run_config, **{"data.path": str(data), "model.vocab_size": 400}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failed_export_leaves_nothing(run_config, tmp_path, monkeypatch):
    with monkeypatch.context() as broken, pytest.raises(OSError, match="full"):
        broken.setattr("glalm.compat.export.format_model_card", lambda *_: (_ for _ in ()).throw(OSError("full")))
        train_and_export(run_config, tmp_path / "to" / "out")
    assert not list((tmp_path / "to").iterdir())
    export_run(run_config.folder, "latest", tmp_path / "to" / "out")


def test_leftover_of_a_killed_export_is_removed(run_config, tmp_path):
    train(run_config)
    leftover = tmp_path / "to" / ".out.tmp"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(bytes(100))
    export_run(run_config.folder, "latest", tmp_path / "to" / "out")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["out"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "to" / "out").num_parameters() > 0


@pytest.mark.slow
def test_killed_export_is_repeated(run_config, tmp_path):
    """Kill it just before the folder gets its name."""
    train(run_config)
    script = (
        "import os, pathlib, runpy, sys; pathlib.Path.rename = lambda *_: os.kill(os.getpid(), 9); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [str(SCRIPT), str(run_config.folder), "--out", str(tmp_path / "to" / "out")]
    killed = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, timeout=300)
    assert killed.returncode == -9
    assert {path.name for path in (tmp_path / "to").iterdir()} == {".out.tmp", ".out.lock"}
    assert subprocess.run([sys.executable, *command], capture_output=True, timeout=300).returncode == 0
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["out"]


def test_tokenizer_of_another_model_is_refused(run_config, tmp_path):
    train(run_config)
    data = json.loads((run_config.folder / "data.json").read_text())
    data["tokenizer"]["fingerprint"] = "another"
    (run_config.folder / "data.json").write_text(json.dumps(data))
    with pytest.raises(RunError, match="has another tokenizer now than"):
        export_run(run_config.folder, "latest", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_errors_are_one_line(run_config, tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    message = f"CheckpointError: {tmp_path}/none is not the folder of a run, because it has no run.json."
    assert (done.returncode, done.stderr) == (1, f"{message}\n")
