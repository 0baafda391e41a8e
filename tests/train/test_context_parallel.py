"""Processes that share the tokens of sequences train as one process with whole sequences does."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from parallel_runs import check, launched, run

from glalm.config.run import RunConfig
from glalm.config.strict import ConfigError
from glalm.data.loader import flatten_batch, shard_batch
from glalm.model.mixers import MIXERS
from glalm.model.mixers.base import Mixer
from glalm.train.memory import estimate_memory
from glalm.train.state import BatchPlan

KINDS = {
    "plain": {},
    "segments": {"model.attention.window": 6, "train.tbptt_length": 32},
    "reset": {"data.document_boundaries": "reset_state", "train.micro_batch_size": 2},
}
MODES = {
    "window": {"model.layers": "gla+attention", "model.attention.window": 7},
    "fsdp2": {"parallel.mode": "fsdp2", "train.micro_batch_size": 2},
    "full": {"train.activation_checkpointing": "full"},
    "statistics": {"train.log_every": 1, "train.statistics_every": 1},
}
COMPILED = {"train.compile": True, "model.layers": "gla+deltanet", "model.gla.short_conv": 4}


@pytest.fixture
def config(run_config, change) -> RunConfig:
    """Return a config of two steps of four sequences, with updates that do not amplify the rounding of gradients."""
    given = {"train.steps": 2, "train.batch_size": 4, "train.micro_batch_size": None, "train.compile": False}
    return change(run_config, **given, **{"optim.lr": 1e-3, "optim.eps": 1e-4, "data.seq_len": 64})


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_training_equals_that_of_one_process(config, change, tmp_path, processes):
    """Compare losses, gradient norms, weights and the validation loss, for every mixer that can share sequences.

    Of four processes, two share a sequence in half of the cases, and four in the others.
    """
    cases = {}
    for mixer in (name for name, mixer in MIXERS.items() if mixer.supports_context):
        width = {"model.intermediate_size": 0} if mixer == "mamba" else {}
        cases |= {f"{mixer}, {kind}": {"model.mixer": mixer, **width, **more} for kind, more in KINDS.items()}
    cases |= MODES
    if processes == 2:  # Compiling takes a minute of each process.
        cases["compiled"] = COMPILED
    trees = {}
    for i, (name, changes) in enumerate(cases.items()):
        context = {"parallel.context": processes if i % 2 else 2}
        trees[name] = dataclasses.asdict(change(config, **changes, **context))
    (tmp_path / "trees.json").write_text(json.dumps(trees))
    script = str(Path(__file__).with_name("parallel_runs.py"))
    done = launched([script, str(tmp_path / "trees.json"), str(tmp_path / "found.pt")], processes)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    for name, changes in cases.items():
        whole = {key: value for key, value in changes.items() if not key.startswith("parallel.")}
        alone = change(config, **whole | {"train.compile": False})
        check(name, found[name], run(alone), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_shards_of_every_mixer_equal_whole_sequences(processes):
    """Compare losses, states and gradients in float64: packed or not, from a state, and with the shortest shards."""
    script = Path(__file__).parents[1] / "model" / "context_runs.py"
    done = launched([str(script)], processes)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shards_follow_the_segments():
    ids = torch.arange(16).expand(2, -1)
    batch = {"input_ids": ids, "labels": ids + 1}
    shard = shard_batch(batch, segment_length=8, rank=1, size=4)
    assert shard["input_ids"].tolist() == [[2, 3, 10, 11]] * 2
    assert shard["labels"].tolist() == [[3, 4, 11, 12]] * 2


def test_rows_of_a_shard_continue_documents():
    starts = torch.zeros(3, 12, dtype=torch.bool)
    for row, positions in enumerate([[0], [0, 4, 7], [0, 2, 8]]):
        starts[row, positions] = True
    ids = torch.arange(36).view(3, 12)
    shard = shard_batch({"input_ids": ids, "labels": ids, "starts": starts}, 12, rank=1, size=3)
    row = flatten_batch(shard)
    assert row["input_ids"].tolist() == [[4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31]]
    assert row["cu_seqlens"].tolist() == [0, 4, 7, 8, 12]
    # The first row is inside a document of 4 tokens so far, the second begins one, the third is inside one of 2 tokens.
    assert row["rows"].tolist() == [[0, 1, 3], [0, 2, 3], [4, 0, 2]]


def test_plan_of_groups(config, change):
    plan = BatchPlan.from_config(change(config, **{"parallel.context": 4, "train.tbptt_length": 32}), 8)
    assert (plan.data_parallel, plan.context_parallel, plan.world_size) == (2, 4, 8)
    assert (plan.micro_batch, plan.segments, plan.segment_length, plan.shard_length) == (2, 2, 32, 8)


def test_memory_of_a_shard(config, change):
    """Eight processes hold an eighth of the activations of a sequence."""
    parts = {}
    for context in (1, 8):
        given = change(config, **{"parallel.context": context, "train.batch_size": 8, "train.micro_batch_size": 1})
        plan = BatchPlan.from_config(given, 8)
        parts[context] = estimate_memory(given, plan, 8, bf16=False, compiled=False)
    assert parts[8]["activations"] == pytest.approx(parts[1]["activations"] / 8, rel=1e-3)
    assert parts[8]["weights"] == parts[1]["weights"]
    assert parts[8]["gathered keys and values"] == parts[1]["gathered keys and values"] == 0


def test_memory_of_gathered_keys_and_values(config, change):
    """A process holds those of all eight, and their gradients, for one layer."""
    given = {"model.mixer": "attention", "parallel.context": 8, "train.batch_size": 1}
    config = change(config, **given)
    parts = estimate_memory(config, BatchPlan.from_config(config, 8), 8, bf16=False, compiled=False)
    keys_and_values = 4 * 2 * config.model.hidden_size * config.data.seq_len
    assert parts["gathered keys and values"] == 2 * keys_and_values * 7 / 8


class Alone(Mixer):
    """A mixer that shares nothing."""


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parallel.context": 3}, "parallel.context=3 does not divide data.seq_len=64; set it to one of 1, 2, 4"),
        (
            {"parallel.context": 8, "train.tbptt_length": 4},
            "parallel.context=8 does not divide train.tbptt_length=4; set it to one of 1, 2, 4",
        ),
        ({"parallel.context": 0}, "parallel.context"),
        ({"parallel.context": 2, "model.mixer": "alone"}, "the mixer alone cannot share a sequence between processes"),
    ],
)
def test_what_cannot_be_shared_is_refused(config, change, monkeypatch, changes, message):
    monkeypatch.setitem(MIXERS, "alone", Alone)
    with pytest.raises(ConfigError, match=message):
        change(config, **changes)


def test_processes_must_form_groups(config, change):
    shared = change(config, **{"parallel.context": 4})
    with pytest.raises(ConfigError, match=r"parallel.context=4 does not divide the number of processes, 6"):
        BatchPlan.from_config(shared, 6)
    with pytest.raises(ConfigError, match=r"4 sequences, which cannot be divided evenly over 3 groups of 4 processes"):
        BatchPlan.from_config(shared, 12)
