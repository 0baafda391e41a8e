"""`glalm eval text=FILE`: a file is scored as it lies, beside the run's own results."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F

from glalm.config.strict import ConfigError, RunError
from glalm.data.shards import TokenSet
from glalm.evals.identity import TEXT_FILE, describe_conditions
from glalm.evals.inputs import open_windows
from glalm.evals.options import EvalConfig, ExtrapolationConfig, GenerateConfig
from glalm.evals.result_files import current_results, select_result
from glalm.evals.runner import evaluate
from glalm.hf import GLALMForCausalLM
from glalm.prepare.pipeline import prepare_data
from glalm.train.trainer import train

TEXTS = [" ".join(["alpha", "gamma", "beta", "delta"] * n) for n in (30, 50, 20)]


@pytest.fixture(scope="module")
def run(token_folder, tmp_path_factory):
    """A trained run on data without a test split, whose text is in the field "words"."""
    from glalm.config.run import DataConfig, OptimConfig, RunConfig, TrainConfig
    from glalm.model.config import ModelConfig

    folder = tmp_path_factory.mktemp("run")
    lines = (token_folder.parent / "words.jsonl").read_text().splitlines()
    rows = [json.dumps({"words": json.loads(line)["text"]}) for line in lines]
    (folder / "train.jsonl").write_text("\n".join(rows))
    held_out = {"validation": 0.2, "test": 0}
    given = {"tokenizer": token_folder / "tokenizer.model", "text_field": "words", "held_out": held_out}
    prepare_data([folder / "train.jsonl"], folder / "set", progress=False, **given)
    config = RunConfig(
        name="tiny",
        runs_dir=str(folder),
        model=ModelConfig(hidden_size=32, num_hidden_layers=1, num_heads=2, intermediate_size=48),
        data=DataConfig(str(folder / "set"), 16),
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
        train=TrainConfig(steps=3, batch_size=2, eval_sequences=4),
    )
    assert train(config) == 0
    return config


@pytest.fixture
def held_out(tmp_path):
    path = tmp_path / "held out.jsonl"
    path.write_text("".join(json.dumps({"words": text, "id": 3}) + "\n" for text in TEXTS))
    return path


def settings(run, **changes) -> EvalConfig:
    return EvalConfig(name=run.name, runs_dir=run.runs_dir, evals=["perplexity"], **changes)


def results_of(run, evaluator: str) -> dict:
    paths = sorted((run.folder / "eval").glob(f"{evaluator}*.json"))
    return {path.name: json.loads(path.read_text()) for path in paths}


@torch.no_grad()
def losses(run, ids: np.ndarray) -> torch.Tensor:
    """Nats of each token but the first, by transformers' forward pass."""
    model = GLALMForCausalLM.from_pretrained(run.folder / "checkpoints" / "step_3").eval()
    ids = torch.from_numpy(ids.astype(np.int64))[None]
    return F.cross_entropy(model(ids[:, :-1]).logits[0].double(), ids[0, 1:], reduction="none")


def token_stream(run) -> list[np.ndarray]:
    """The documents of the file by SentencePiece itself, each with its BOS and EOS."""
    processor = sentencepiece.SentencePieceProcessor(model_file=f"{run.data.path}/tokenizer.model")
    return [np.array([1, *processor.encode(text), 2]) for text in TEXTS]


def test_perplexity_is_that_of_the_files_windows_beside_the_runs_own(run, held_out, capsys):
    shutil.rmtree(run.folder / "eval", ignore_errors=True)  # of the other tests
    assert evaluate(settings(run)).keys() == {"perplexity"}
    own = (run.folder / "eval" / "perplexity.json").read_bytes()
    evaluate(settings(run, text=str(held_out)))
    assert (run.folder / "eval" / "perplexity.json").read_bytes() == own
    [name] = results_of(run, "perplexity").keys() - {"perplexity.json"}
    assert name.startswith("perplexity-held_out.jsonl-")
    record = results_of(run, "perplexity")[name]
    stream = np.concatenate(token_stream(run))
    windows = [stream[i * 16 : i * 16 + 17] for i in range((len(stream) - 1) // 16)]
    expected = torch.cat([losses(run, window) for window in windows]).mean().item()
    assert record["results"]["nats_per_token"] == pytest.approx(expected, abs=1e-5)
    assert record["results"]["tokens"] == 16 * len(windows)
    printed = capsys.readouterr().out
    assert f"held out.jsonl perplexity {math.exp(expected):.3f} over" in printed
    tail = len(stream) - 1 - 16 * len(windows)
    assert tail > 0 and f"; its last {tail} tokens fill no window of 16\n" in printed
    assert record["own_text"] is False and describe_conditions(record) == "held out.jsonl, windows of 16 tokens"
    main = select_result(current_results(run.folder), "perplexity")
    assert main["file"] == "eval/perplexity.json"


@pytest.mark.parametrize(
    "evaluator, option", [("perplexity", "train_length"), ("extrapolation", "extrapolation.max_length")]
)
def test_a_file_shorter_than_a_window_is_refused_with_the_length_that_fits(evaluator, option, stream):
    tokens = stream(5)
    tokens.split = TEXT_FILE
    with pytest.raises(ConfigError, match=rf"memory has 5 tokens, and a window of 5 reads 6; .* write {option}=4 or"):
        open_windows(tokens, 5, evaluator)
    tokens.split = "test"
    with pytest.raises(ConfigError, match="memory has at most 5 for test"):
        open_windows(tokens, 5, evaluator)


def test_the_same_content_is_not_scored_again_and_other_content_is(run, held_out, tmp_path, capsys):
    evaluate(settings(run, text=str(held_out)))
    before = results_of(run, "perplexity").keys()
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(held_out.read_bytes())
    capsys.readouterr()
    evaluate(settings(run, text=str(copy)))
    assert "is up to date" in capsys.readouterr().out
    copy.write_text(json.dumps({"words": TEXTS[0] + " zeta"}))
    evaluate(settings(run, text=str(copy)))
    assert len(results_of(run, "perplexity").keys() - before) == 1


def test_a_text_result_never_takes_the_place_of_a_missing_one(run, held_out):
    for path in (run.folder / "eval").glob("perplexity*"):
        path.unlink()
    evaluate(settings(run, text=str(held_out)))
    assert "perplexity.json" not in results_of(run, "perplexity")


def test_extrapolation_reads_the_file_without_a_test_split(run, held_out, capsys):
    options = ExtrapolationConfig(max_length=160, contexts=["stateful"])
    config = dataclasses.replace(settings(run, extrapolation=options), evals=["extrapolation"])
    with pytest.raises(RunError):
        evaluate(config)
    assert (
        "has no documents in its split test; write extrapolation.split=validation, or text=F" in capsys.readouterr().out
    )
    evaluate(dataclasses.replace(config, text=str(held_out)))
    [(name, record)] = results_of(run, "extrapolation").items()
    assert name.startswith("extrapolation-held_out.jsonl-") and record["settings"]["split"] == "file"
    assert (run.folder / "plots" / name.removesuffix(".json") / "extrapolation.png").is_file()
    document = token_stream(run)[1]
    expected = losses(run, document[:161])[152:160].mean().item()
    lengths = [len(document) for document in token_stream(run)]
    last = record["results"]["contexts"]["stateful"]["buckets"][19]
    assert (last["start"], last["end"]) == (152, 160) and last["documents"] == sum(n > 160 for n in lengths) >= 1
    if last["documents"] == 1:
        assert last["nats_per_token"] == pytest.approx(expected, abs=1e-5)


def test_prompts_are_the_beginnings_of_held_out_documents(run, held_out):
    config = dataclasses.replace(settings(run, generate=GenerateConfig(tokens=3)), evals=["generate"])
    evaluate(config)
    validation = TokenSet(run.data.path, "validation")
    processor = sentencepiece.SentencePieceProcessor(model_file=f"{run.data.path}/tokenizer.model")
    documents = [validation.read_document(i) for i in (0, validation.num_documents // 2)]
    record = results_of(run, "generate")["generate.json"]
    expected = [processor.decode(document[:12].tolist()) for document in documents]
    assert [text["prompt"] for text in record["results"]] == expected == record["settings"]["prompts"]
    evaluate(dataclasses.replace(config, text=str(held_out)))
    assert results_of(run, "generate")["generate.json"] == record
    prompts = [record["settings"]["prompts"] for record in results_of(run, "generate").values()]
    assert [processor.decode(document[:12].tolist()) for document in token_stream(run)[:2]] in prompts


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text": "nowhere.txt"}, r"text=nowhere.txt: there is no such file"),
        ({"text_field": "body"}, r"no field 'body'.*name one of them with text_field=FIELD"),
    ],
)
def test_what_is_wrong_with_the_file_is_said_once(run, held_out, changes, message, capsys):
    with pytest.raises(ConfigError, match=message):
        evaluate(settings(run, **({"text": str(held_out)} | changes)))
    assert "failed" not in capsys.readouterr().out


def test_a_file_in_place_of_prepared_data_is_refused(run, held_out):
    with pytest.raises(ConfigError, match=r"is a file, not a folder of prepared data.*write text="):
        evaluate(settings(run, data_path=str(held_out)))


def test_text_and_data_path_are_alternatives():
    with pytest.raises(ConfigError, match="text=a and data_path=b are alternatives"):
        EvalConfig(text="a", data_path="b")
