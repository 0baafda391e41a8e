"""Processes that share the tokens of each text evaluate as one process does."""

import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limited
from hypothesis import strategies as st
from parallel_runs import launched
from tiny import VOCAB_SIZE, llama, saved
from torch.utils._pytree import tree_flatten

from glalm.config.run import RunConfig
from glalm.config.strict import ConfigError
from glalm.data.files import read_jsonl
from glalm.evals.eval_model import EvalModel
from glalm.evals.evaluator import EvalContext
from glalm.evals.in_training import make_evaluator
from glalm.evals.options import (
    EvalConfig,
    EvalParallelConfig,
    ExtrapolationConfig,
    GenerateConfig,
    TrainEvalsConfig,
    TrainingRun,
)
from glalm.evals.runner import evaluate
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.kernels.context_parallel import ContextShard
from glalm.train.trainer import train

SHAPE = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 48}
CASES = {
    "gla": {"gla": {"short_conv": 4}},
    "gla, reset": {"document_boundaries": "reset_state"},
    "deltanet": {"mixer": "deltanet"},
    "attention": {"mixer": "attention"},
    "window, reset": {"layers": "mamba2+attention", "attention": {"window": 7}, "document_boundaries": "reset_state"},
}
# Buckets of two tokens: the last stretch of a text is seldom a multiple of the number of processes.
POSITIONS = ExtrapolationConfig(
    max_length=60, bucket=2, documents=5, split="train", contexts=["stateful", "sliding_window", "reset"]
)
TOLERANCE = 2e-3 if torch.cuda.is_available() else 2e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder of models with weights large enough that what came long ago matters."""
    folder = tmp_path_factory.mktemp("models")
    for name, changes in CASES.items():
        torch.manual_seed(0)
        config = GLALMConfig(**SHAPE | {"initializer_range": 0.3, "train_length": 16} | changes)
        GLALMForCausalLM(config).save_pretrained(folder / name)
    return folder


def settings(models: Path, data: Path, out: Path, name: str, context: int, **changes) -> EvalConfig:
    given = {"batch_size": 2, "evals": ["perplexity", "extrapolation"], "extrapolation": POSITIONS, "precision": "fp32"}
    return EvalConfig(
        checkpoint=str(models / name),
        data_path=str(data),
        out=str(out / name),
        parallel=EvalParallelConfig(context),
        **given | changes,
    )


def evaluating_run(config: RunConfig, out: Path, context: int) -> TrainingRun:
    """Return a run of two steps that evaluates before and after them."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)}
    fields["runs_dir"] = str(out)
    fields["train"] = dataclasses.replace(config.train, steps=2, eval_every=2, micro_batch_size=None, precision="fp32")
    fields["optim"] = dataclasses.replace(config.optim, eps=1e-4)  # Updates must not amplify the rounding of gradients.
    fields["parallel"] = dataclasses.replace(config.parallel, context=context)
    options = TrainEvalsConfig(
        evals=["perplexity", "extrapolation", "generate"],
        every=2,
        extrapolation=POSITIONS,
        generate=GenerateConfig(tokens=3, prompts=["alpha"]),
    )
    return TrainingRun(**fields, train_evals=options)


def read_results(out: Path, name: str) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((out / name / "eval").glob("*.json"))}


def assert_equal(found, expected, where: str) -> None:
    """Compare two JSON trees: numbers up to rounding, counts and all else exactly."""
    found_leaves, found_spec = tree_flatten(found)
    leaves, spec = tree_flatten(expected)
    assert found_spec == spec, where
    is_real = [isinstance(leaf, float) for leaf in leaves]
    for real, one, other in zip(is_real, found_leaves, leaves, strict=True):
        assert one == (pytest.approx(other, rel=TOLERANCE, abs=TOLERANCE) if real else other), where
    assert any(is_real)


def launch(out: Path, processes: int, evals: list[EvalConfig], runs: list[TrainingRun]) -> str:
    """Run sharing_runs.py in several processes, and return what it printed."""
    trees = {"eval": list(map(dataclasses.asdict, evals)), "train": list(map(dataclasses.asdict, runs))}
    (out / "trees.json").write_text(json.dumps(trees))
    done = launched([str(Path(__file__).with_name("sharing_runs.py")), str(out / "trees.json")], processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def alone(models, token_folder, tmp_path_factory) -> Path:
    """The results of this process alone."""
    out = tmp_path_factory.mktemp("alone")
    for name in CASES:
        evaluate(settings(models, token_folder, out, name, 1))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_results_are_those_of_one_process(models, token_folder, alone, run_config, tmp_path, processes):
    """Of four processes, two share a text in some cases, and four in the others."""
    groups = {name: processes if i % 2 else min(processes, 2) for i, name in enumerate(CASES)}
    evals = [settings(models, token_folder, tmp_path, name, context) for name, context in groups.items()]
    printed = launch(tmp_path, processes, evals, [evaluating_run(run_config, tmp_path / "shared", processes)])
    assert (f"{processes} to a text" in printed) == (processes > 1)
    for name in CASES:
        found = read_results(tmp_path, name)
        expected = read_results(alone, name)
        assert found.keys() == expected.keys() == {"perplexity", "extrapolation"}
        for evaluator, record in expected.items():
            assert found[evaluator]["identity"] == record["identity"]
            assert found[evaluator]["processes"] == processes
            assert_equal(found[evaluator]["results"], record["results"], f"{name}: {evaluator}")

    run = evaluating_run(run_config, tmp_path / "alone", 1)
    train(run, make_evaluator(run))
    shared, alone_rows = (rows_with_results(tmp_path / kind / "tiny/metrics.jsonl") for kind in ("shared", "alone"))
    assert shared.keys() == alone_rows.keys() == {0, 2}
    for step, expected in alone_rows.items():
        assert len(expected) > 3
        assert_equal(shared[step], expected, f"step {step}")


def rows_with_results(path: Path) -> dict[int, dict]:
    """Return {step: its results of evaluators}."""
    found = {}
    for row in read_jsonl(path):
        results = {key: value for key, value in row.items() if key.startswith(("perplexity/", "extrapolation/"))}
        if results:
            found[row["step"]] = results
    return found


@pytest.mark.slow
def test_what_does_not_share_reads_other_texts_and_says_so(tmp_path):
    model = GLALMForCausalLM(GLALMConfig(**SHAPE | {"vocab_size": VOCAB_SIZE, "train_length": 16}))
    config = EvalConfig(
        checkpoint=str(saved(tmp_path / "model", model)),
        out=str(tmp_path / "out"),
        parallel=EvalParallelConfig(2),
        evals=["generate"],
        generate=GenerateConfig(tokens=3, prompts=["alpha", "beta", "gamma"]),
    )
    printed = launch(tmp_path, 2, [config], [])
    assert printed.count("generate ignores parallel.context: each process reads texts of its own") == 1
    samples = read_results(tmp_path, "out")["generate"]["results"]
    assert [sample["prompt"] for sample in samples] == ["alpha", "beta", "gamma"]


@limited(max_examples=20, deadline=None)
@given(groups=st.integers(1, 4), size=st.integers(1, 3), items=st.integers(0, 9))
def test_a_group_has_one_share(groups, size, items):
    """Every group has items of its own, its processes have the same, and the results of all are in order."""
    contexts = []
    for rank in range(groups * size):
        context = EvalContext(ContextShard("", rank % size, size))
        context.rank = rank
        context.world_size = groups * size
        contexts.append(context)
    shares = [context.share(range(items)) for context in contexts]
    assert all(shares[rank] == shares[rank - rank % size] for rank in range(groups * size))
    for context in contexts:
        context._gather_or_raise = lambda action: shares
        assert context.groups == groups
        assert context.gather([]) == list(range(items))


def test_groups_exchange_results(thread_contexts):
    """Four processes in groups of two, as threads."""
    contexts = thread_contexts(4)
    for context in contexts:
        context.shard = ContextShard("", context.rank % 2, 2)
    with ThreadPoolExecutor(4) as pool:
        mapped = list(pool.map(lambda context: context.map(lambda item: item * 10, range(5)), contexts))
    assert mapped == [[0, 10, 20, 30, 40]] * 4


@pytest.mark.parametrize("T, size", [(10, 4), (12, 4), (3, 4)])
def test_every_process_gets_the_losses_of_the_whole_text(models, monkeypatch, T, size):
    """The model is left out, and of each process its piece is collected: this is about the cut alone."""
    model = EvalModel(GLALMForCausalLM.from_pretrained(models / "gla").eval())
    ids = torch.arange(2 * T).view(2, T)
    pieces = []
    monkeypatch.setattr(EvalModel, "forward_features", lambda self, ids, **_: (ids, None))
    monkeypatch.setattr(EvalModel, "_score_features", lambda self, ids, targets: 100.0 * ids + targets)
    monkeypatch.setattr("glalm.evals.eval_model.gather_tokens", lambda x, shard: pieces.append(x) or x)
    for rank in range(size):
        model.score_tokens(ids, ids + 1, shard=ContextShard("", rank, size))
    assert {piece.shape for piece in pieces} == {(2, -(-T // size))}
    torch.testing.assert_close(torch.cat(pieces, 1)[:, :T], 101.0 * ids + 1)


def test_a_state_needs_equal_shares(models):
    model = EvalModel(GLALMForCausalLM.from_pretrained(models / "gla"))
    ids = torch.zeros(1, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="4 processes cannot share 6 tokens equally"):
        model.score_tokens(ids, ids, return_state=True, shard=ContextShard("", 0, 4))


def test_what_cannot_be_shared_is_refused(models, token_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"parallel\.context=2 does not divide the number of processes, 1; .*start a"):
        evaluate(settings(models, token_folder, tmp_path, "gla", 2))
    with pytest.raises(ConfigError, match=r"parallel\.context must be positive, not 0"):
        EvalParallelConfig(0)
    model = EvalModel(GLALMForCausalLM.from_pretrained(models / "gla"), train_length=16)
    model.require_context_support(4)
    with pytest.raises(ConfigError, match=r"parallel\.context=3 does not divide the training length 16; set it to one"):
        model.require_context_support(3)
    hyena = EvalModel(GLALMForCausalLM(GLALMConfig(**SHAPE, mixer="hyena")), name="mine")
    hyena.require_context_support(1)
    with pytest.raises(
        ConfigError, match=re.escape("parallel.context=2: mine has the mixer hyena, which cannot share")
    ):
        hyena.require_context_support(2)
    with pytest.raises(ConfigError, match="transformers' LlamaForCausalLM cannot share a text between processes"):
        EvalModel(llama()).require_context_support(2)
