import dataclasses
import json
import random
import re
import shutil
import warnings

import numpy as np
import pytest
import torch

from glalm.config.strict import ConfigError
from glalm.data.files import read_jsonl
from glalm.data.shards import TokenSet
from glalm.evals import in_training as module
from glalm.evals.evaluator import Evaluator
from glalm.evals.in_training import copy_for_evaluation, copy_model, make_evaluator
from glalm.evals.inputs import open_checkpoint, open_split
from glalm.evals.options import (
    EvalConfig,
    ExtrapolationConfig,
    HarnessConfig,
    NeedleConfig,
    TrainEvalsConfig,
    TrainingRun,
)
from glalm.evals.runner import evaluate
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.prepare.pipeline import prepare_data
from glalm.train.random_states import preserve_random_states
from glalm.train.state import TrainState
from glalm.train.trainer import train

CHEAP = TrainEvalsConfig(
    evals=["extrapolation", "generate"],
    every=2,
    extrapolation=ExtrapolationConfig(max_length=160, documents=3, split="train"),
)


@pytest.fixture
def evaluating(run_config, change):
    """run_config, with the evaluators of CHEAP."""
    fields = {field.name: getattr(run_config, field.name) for field in dataclasses.fields(run_config)}
    return TrainingRun(**fields, train_evals=CHEAP)


def weights(config) -> bytes:
    return (config.folder / f"checkpoints/step_{config.steps}/model.safetensors").read_bytes()


def test_training_is_the_same_with_and_without(run_config, evaluating, change):
    run_config = change(run_config, name="without")
    train(run_config)
    train(evaluating, make_evaluator(evaluating))
    assert weights(run_config) == weights(evaluating)
    rows = {row["step"]: row for row in read_jsonl(evaluating.folder / "metrics.jsonl")}
    plain = {row["step"]: row for row in read_jsonl(run_config.folder / "metrics.jsonl")}
    assert [step for step, row in rows.items() if "extrapolation/2x" in row] == [0, 2, 4, 6]
    for step, row in rows.items():
        same = {key: row[key] for key in ("loss", "val_loss", "grad_norm") if key in row}
        assert same == {key: plain[step][key] for key in same}


def test_what_is_found_is_what_eval_finds_afterwards(evaluating):
    train(evaluating, make_evaluator(evaluating))
    row = read_jsonl(evaluating.folder / "metrics.jsonl")[-1]
    c = evaluating
    evaluate(EvalConfig(name=c.name, runs_dir=c.runs_dir, evals=["extrapolation"], extrapolation=CHEAP.extrapolation))
    results = json.loads((c.folder / "eval/extrapolation.json").read_text())["results"]
    ratios = results["contexts"]["stateful"]["ratios"]
    found = {f"extrapolation/{n}x": r["ratio"] for n, r in ratios.items()}
    assert len(found) == 4
    assert {key: value for key, value in row.items() if key.startswith("extrapolation/")} == pytest.approx(
        found, rel=1e-6
    )


def test_what_a_set_has_got_since_the_run_began_is_left_out(run_config, change, tmp_path):
    """In training and by eval.py: the numbers of one run are all of one text."""
    folder = shutil.copytree(run_config.data.path, tmp_path / "set")
    config = change(run_config, **{"data.path": str(folder)})
    train(config)
    before = TokenSet(folder, "validation").num_documents
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": "alpha omega " * n}) + "\n" for n in range(999)))
    prepare_data([f"more={tmp_path / 'more.jsonl'}"], folder, add=True, progress=False)
    assert TokenSet(folder, "validation").num_documents > before
    settings = EvalConfig(name=config.name, runs_dir=config.runs_dir, data_path=str(folder))
    model = CausalLM(config.model)
    afterwards = open_checkpoint(settings, config.folder / "checkpoints/step_6", torch.device("cpu"), "fp32")
    for eval_model in (copy_for_evaluation(model, "fp32", config, settings), afterwards):
        assert open_split(settings, eval_model, "validation").num_documents == before


def test_evaluators_are_given_what_the_config_says(evaluating, change, monkeypatch):
    seen = []

    class Idle(Evaluator):
        def __init__(self, model, config):
            seen.append((model, config))

        def run(self, context):
            return {}

        def summarize(self, results):
            return ["one", "two"]

    monkeypatch.setattr(module, "build_evaluator", lambda name, model, config: Idle(model, config))
    options = dataclasses.replace(
        CHEAP, evals=["generate"], batch_size=3, data_dir="tasks", needle=NeedleConfig(), harness=HarnessConfig(limit=5)
    )
    config = change(evaluating, train_evals=options, seed=7)
    model = CausalLM(config.model)
    texts = []
    assert make_evaluator(config)(TrainState(model, []), "bf16", int, lambda *text: texts.append(text)) == {}
    assert texts == [("generate", "one\ntwo", 0)]
    [(eval_model, settings)] = seen
    given = {name: getattr(settings, name) for name in ("batch_size", "data_dir", "extrapolation", "needle", "harness")}
    assert given == {name: getattr(options, name) for name in given}
    assert (settings.seed, settings.data_path) == (7, config.data.path)
    assert (eval_model.precision, eval_model.train_length, eval_model.run_config) == ("bf16", 16, config)
    assert (
        eval_model.tokenizer.vocab_size <= 320
        and eval_model.document_prefix == tuple(eval_model.tokenizer.bos_ids) != ()
    )


def test_random_states_are_kept():
    def draws() -> tuple:
        return random.random(), np.random.rand(), torch.rand(1).item()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draws()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with preserve_random_states(torch.device("cpu")):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
    assert draws() == expected


def test_the_copy_is_the_model_and_nothing_of_it_is_shared():
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 64}
    model = CausalLM(ModelConfig(**shape, tie_word_embeddings=True)).train()
    twin = copy_model(model)
    ids = torch.arange(20)[None]
    assert torch.equal(twin(ids).logits, model(ids).logits)
    assert model.training and not twin.training
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert model(ids).logits.abs().max() > 0


def test_a_failure_stops_at_once_or_never(evaluating, change, monkeypatch):
    calls = []

    class FailsLater(Evaluator):
        def run(self, context):
            calls.append(context)
            if len(calls) == 2:
                raise MemoryError("no room")
            return {"n": len(calls)}

        def summarize(self, results):
            return []

        def metrics(self, results):
            return {"n": results["n"], "none": None}

    monkeypatch.setattr(module, "build_evaluator", lambda name, model, config: FailsLater(model, config))
    evaluating = change(evaluating, **{"train_evals.evals": ["generate"]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(evaluating, make_evaluator(evaluating))
    assert any("evaluator generate: MemoryError: no room" in str(w.message) for w in caught)
    rows = read_jsonl(evaluating.folder / "metrics.jsonl")
    assert [row["generate/n"] for row in rows if "generate/n" in row] == [1, 3, 4]
    assert not any("generate/none" in row for row in rows)


def test_a_failure_after_a_restart_is_a_warning_too(evaluating, change, monkeypatch):
    evaluating = change(evaluating, **{"train.checkpoint.every": 2, "train.checkpoint.keep_last": 3})
    train(evaluating)
    for step in (4, 6):
        shutil.rmtree(evaluating.folder / f"checkpoints/step_{step}")

    def broken(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(module, "run_evaluator", broken)
    with pytest.warns(UserWarning, match="evaluator extrapolation: MemoryError: no room"):
        train(evaluating, make_evaluator(evaluating))
    assert (evaluating.folder / "checkpoints/step_6").is_dir()
    fork = {"name": "fork", "train.resume_from": str(evaluating.folder / "checkpoints/step_2")}
    with pytest.warns(UserWarning, match="evaluator extrapolation: MemoryError: no room"):
        train(change(evaluating, **fork), make_evaluator(change(evaluating, **fork)))


def test_what_cannot_be_evaluated_is_said_before_the_first_step(evaluating, change):
    config = change(evaluating, **{"train_evals.extrapolation.max_length": 3})
    with pytest.raises(ConfigError, match=r"^In train_evals: extrapolation.max_length=3 is under the training length"):
        train(config, make_evaluator(config))
    assert len(read_jsonl(config.folder / "metrics.jsonl")) == 0


def test_settings():
    message = "train_evals.evals: no evaluator is called genreate; did you mean generate"
    with pytest.raises(ConfigError, match=re.escape(message)):
        TrainEvalsConfig(evals=["genreate"])
    with pytest.raises(ConfigError, match=r"train_evals\.every must be positive"):
        TrainEvalsConfig(every=0)
    assert TrainEvalsConfig(harness=HarnessConfig(limit=5)).harness.limit == 5
