"""Runs in stages: the same bits however they are interrupted, branches, metrics, and what is refused."""

import dataclasses
import json
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from injection import before_steps, send_signal
from safetensors.torch import load_file

from glalm.config.run import OptimConfig, RunConfig, TrainConfig
from glalm.config.stages import StageConfig
from glalm.config.strict import ConfigError
from glalm.data.files import read_jsonl
from glalm.data.loader import Windows
from glalm.data.order import Order
from glalm.data.shards import TokenSet
from glalm.prepare.pipeline import prepare_data
from glalm.train import parallel, trainer
from glalm.train.state import plan_batches

STABLE = StageConfig(tokens=192, schedule="constant")  # three steps of 4 windows of 16 tokens
DECAY = StageConfig(  # three steps of 2 windows of 48 tokens
    tokens=288,
    seq_len=48,
    batch_size=2,
    weights={"books": 0.75, "code": 0.25},
    document_boundaries="reset_state",
    schedule="linear",
    lr=1e-3,
)
TIMES = ("tokens_per_second", "tokens_per_second_per_gpu", "mfu", "data_wait_seconds")


@pytest.fixture(scope="module")
def two_sources(token_folder, tmp_path_factory):
    """Prepare a dataset of two sources with documents of some tens of tokens."""
    root = tmp_path_factory.mktemp("sources")
    for name, words in (("books", "alpha beta "), ("code", "gamma delta ")):
        lines = [json.dumps({"text": f"{i} " + words * (8 + i % 7)}) for i in range(80)]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    given = {"tokenizer": token_folder / "tokenizer.model", "shard_tokens": 2000, "progress": False}
    prepare_data([f"{name}={root / name}.jsonl" for name in ("books", "code")], root / "set", **given)
    return root / "set"


def in_stages(config: RunConfig, **stages: StageConfig) -> RunConfig:
    """Return the config with these stages, whose tokens are numbers."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=None, stages=stages))


@pytest.fixture
def staged(run_config, change, two_sources) -> RunConfig:
    config = change(run_config, **{"data.path": str(two_sources), "data.weights": {"books": 0.5, "code": 0.5}})
    return in_stages(change(config, **{"train.checkpoint.every": 100}), stable=STABLE, decay=DECAY)


def rows(config: RunConfig) -> list[dict]:
    found = read_jsonl(config.folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in found]


def tensors(config: RunConfig, step: int) -> dict[str, torch.Tensor]:
    folder = config.folder / "checkpoints" / f"step_{step}"
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Hold the tensors and rows of an uninterrupted run, once the first test has run it."""
    return {}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("stops", [[3, 1], *(pytest.param([n], marks=SLOW) for n in (1, 2, 4, 5))])
def test_a_run_that_is_interrupted_in_and_at_borders_ends_with_the_same_bits(staged, change, unbroken, stops):
    """Each number counts the steps of one start of the run, so that [3, 1] stops after the steps 3 and 4."""
    if not unbroken:
        whole = change(staged, name="whole")
        assert trainer.train(whole) == 0
        unbroken.update(tensors=tensors(whole, 6), rows=rows(whole))
    for steps in stops:
        with before_steps({steps: partial(send_signal, signal.SIGINT)}):
            assert trainer.train(staged) == signal.SIGINT
    assert trainer.train(staged) == 0
    assert_same_tensors(tensors(staged, 6), unbroken["tensors"])
    assert rows(staged) == unbroken["rows"]


@pytest.mark.parametrize("stop", [3, pytest.param(5, marks=SLOW)])
def test_a_run_whose_batch_and_length_grow_within_a_stage_resumes_with_the_same_bits(run_config, change, stop):
    """2 steps of 2 x 16 tokens, 2 of 4 x 16 and 2 of 2 x 32."""
    batches = [(0.0, 32), (64.0, 64)]
    lengths = [(0.0, 16), (192.0, 32)]
    growing = StageConfig(tokens=320, batch_schedule=batches, seq_len_schedule=lengths)
    config = in_stages(change(run_config, **{"train.checkpoint.every": 100}), all=growing)
    whole = change(config, name="whole")
    assert trainer.train(whole) == 0
    assert [row["tokens"] for row in rows(whole)[1:]] == [32, 64, 128, 192, 256, 320]
    with before_steps({stop: partial(send_signal, signal.SIGINT)}):
        assert trainer.train(config) == signal.SIGINT
    assert trainer.train(config) == 0
    assert_same_tensors(tensors(config, 6), tensors(whole, 6))
    assert rows(config) == rows(whole)


@given(
    starts=st.lists(st.integers(1, 4000), max_size=4, unique=True),
    batches=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    lengths=st.lists(st.sampled_from([16, 32, 64]), min_size=5, max_size=5),
)
@settings(max_examples=25)
def test_steps_of_a_schedule_are_where_its_pieces_are(starts, batches, lengths):
    """Each step has the batch and length of the last piece that begins at or before the tokens that precede it."""
    begins = [0, *sorted(starts)]
    batch_pieces = [(float(tokens), 64 * batch) for tokens, batch in zip(begins, batches, strict=False)]
    length_pieces = [(float(tokens), length) for tokens, length in zip(begins, lengths, strict=False)]
    stage = StageConfig(tokens=9000, batch_schedule=batch_pieces, seq_len_schedule=length_pieces)
    optim = OptimConfig(warmup_steps=0)
    try:
        config = RunConfig(optim=optim, train=TrainConfig(steps=None, batch_size=4, stages={"all": stage}))
    except ConfigError as error:
        assert "has no step" in str(error)  # A piece is shorter than the step before it.
        return
    tokens = 0
    for step in range(1, config.steps + 1):
        piece = max(i for i, begin in enumerate(begins) if begin <= tokens)
        phase = config.phase_at(step)
        assert (phase.config.tokens_per_step, phase.config.data.seq_len) == (64 * batches[piece], lengths[piece])
        tokens += 64 * batches[piece]
        assert config.tokens_at(step) == tokens
    assert tokens >= 9000 > tokens - phase.config.tokens_per_step


def test_each_step_reads_the_windows_of_its_stage(staged, two_sources, monkeypatch):
    batches = []
    train_step = trainer.Trainer.step

    def step(self, batch):
        batches.append(batch)
        return train_step(self, batch)

    monkeypatch.setattr(trainer.Trainer, "step", step)
    assert trainer.train(staged) == 0
    tokens = TokenSet(two_sources, "train")
    short = Windows(tokens, 16)
    long = Windows(tokens, 48, reset_state=True)
    first = Order(1, 4, short.source_windows, {"books": 0.5, "code": 0.5})
    second = Order(1, 2, long.source_windows, {"books": 0.75, "code": 0.25})
    expected = [short.load_batch(first.window_ids(i)) for i in range(3)]
    expected += [long.load_batch(second.window_ids(i)) for i in range(3)]
    for found, batch in zip(batches, expected, strict=True):
        assert found.keys() == batch.keys()
        assert all(torch.equal(found[name], batch[name]) for name in batch)


def test_a_batch_that_no_stage_has_need_not_be_divisible(staged, change):
    """Validation reads as many windows of 16 tokens at once as have the tokens of a micro-batch of 2 x 48."""
    stages = {"stable": dataclasses.replace(STABLE, batch_size=3), "decay": dataclasses.replace(DECAY, batch_size=6)}
    others = {"train.batch_size": 4, "train.micro_batch_size": None, "train.eval_sequences": 18}
    config = in_stages(change(staged, **others), **stages)
    assert [plan.micro_batch for plan in plan_batches(config, 3)] == [1, 2]
    accelerator = parallel.start_processes(config)
    plans = trainer.check_devices_and_plan_batches(config, SimpleNamespace(num_processes=3, device=accelerator.device))
    training = trainer.Trainer(config, plans, accelerator)
    batches = training.iterate_validation_batches(Windows(TokenSet(config.data.path, "train"), 16))
    assert next(batches)["labels"].shape == (6, 16)


def test_metrics_count_tokens_of_stages_and_sources_and_end_each_stage_with_a_validation(staged):
    staged.train.log_every = 100
    assert trainer.train(staged) == 0
    border, last = rows(staged)[1:]
    assert (border["step"], border["tokens"], border["lr"]) == (3, 192, 1e-2)
    assert (last["step"], last["tokens"], last["lr"]) == (6, 480, pytest.approx(1e-3))
    assert "val_loss" in border and "val_loss" in last
    assert border["stage_tokens/stable"] == 192 and "stage_tokens/decay" not in border
    assert last["stage_tokens/stable"] == 192 and last["stage_tokens/decay"] == 288
    for source in ("books", "code"):
        parts = [last[f"stage_tokens/{stage}/{source}"] for stage in ("stable", "decay")]
        assert last[f"tokens/{source}"] == sum(parts) and parts[1] % 48 == 0
    assert last["tokens/books"] + last["tokens/code"] == 480


def test_a_stage_cut_in_two_changes_no_bit(run_config, change):
    """The data goes on where it was, over a border of stages with the same settings."""
    whole = change(run_config, **{"optim.schedule": "constant"})
    cut = in_stages(change(whole, name="cut"), one=StageConfig(tokens=100), two=StageConfig(tokens=284))
    assert trainer.train(whole) == trainer.train(cut) == 0
    assert [steps.stop for steps in cut.stage_steps.values()] == [3, 7]
    assert_same_tensors(tensors(whole, 6), tensors(cut, 6))
    untagged = [{name: value for name, value in row.items() if "stage" not in name} for row in rows(cut)]
    losses = [[(row["step"], row.get("loss")) for row in found] for found in (untagged, rows(whole))]
    assert losses[0] == losses[1]


def test_branches_start_at_the_end_of_a_stage(staged, change):
    """Stages that have not begun may differ. Those that have must not."""
    keep = change(staged, **{"train.checkpoint.keep_last": 1})
    assert trainer.train(keep) == 0
    border = keep.folder / "checkpoints" / "step_3"
    assert border.is_dir()
    start = change(keep, name="branch", **{"train.resume_from": str(border)})
    longer = dataclasses.replace(DECAY, tokens=384, weights={"books": 1, "code": 0})
    branch = in_stages(start, stable=STABLE, books=longer)
    assert trainer.train(branch) == 0
    assert [row["step"] for row in rows(branch)] == [4, 5, 6, 7]
    assert rows(branch)[-1]["stage_tokens/books/code"] == 0
    only_books = dataclasses.replace(STABLE, weights={"books": 1, "code": 0})
    with pytest.raises(ConfigError, match=r"another config:\n  train.stages.stable.weights.books: None -> 1"):
        trainer.train(in_stages(change(start, name="other"), stable=only_books, books=longer))
    larger = dataclasses.replace(STABLE, batch_size=3)
    allowed = change(start, name="larger", **{"train.allow_changes": ["train.stages"]})
    with pytest.raises(ConfigError, match=r"step 3 has trained on 192 tokens, but by train\.stages the run has 144"):
        trainer.train(in_stages(allowed, stable=larger, books=longer))


def test_a_run_without_stages_continues_in_stages(run_config, change, two_sources):
    """To allow the stages is to allow their order. The first stage has the tokens of the checkpoint."""
    only_books = {"data.path": str(two_sources), "data.weights": {"books": 1, "code": 0}}
    config = change(run_config, **only_books, **{"optim.schedule": "constant", "train.steps": 2})
    assert trainer.train(config) == 0
    assert rows(config)[-1]["tokens/books"] == 128
    start = change(config, name="branch", **{"train.resume_from": str(config.folder / "checkpoints" / "step_2")})
    only_code = change(start, **{"data.weights": {"books": 0, "code": 1}})
    branch = in_stages(only_code, stable=StageConfig(tokens=128), decay=StageConfig(tokens=192, seq_len=48))
    branch.train.allow_changes = ["train", "data.weights"]
    assert trainer.train(branch) == 0
    [last] = rows(branch)
    assert (last["step"], last["tokens"]) == (3, 320)
    assert (last["tokens/books"], last["tokens/code"]) == (128, 192)
    assert (last["stage_tokens/stable/books"], last["stage_tokens/stable/code"]) == (128, 0)
    assert (last["stage_tokens/decay/books"], last["stage_tokens/decay/code"]) == (0, 192)
    del branch.train.stages["decay"]
    with pytest.raises(ConfigError, match=r"step_3 is beyond the run's last step, 2\. Give train\.stages more tokens"):
        trainer.train(dataclasses.replace(branch))


@pytest.mark.parametrize(
    "changes, message",
    [
        # The two sources have 2,000 and 2,024 tokens.
        # The sources have 3,203 and 2,624 tokens.
        ({"seq_len": 4000}, r"In train.stages.decay: .*length=4000 need 4001 tokens of a source, but .* at most 3203"),
        ({"weights": {"poems": 1.0}}, r"In train.stages.decay: weights=.* must name each source"),
    ],
)
def test_data_that_does_not_fit_a_stage_is_refused(staged, changes, message):
    config = in_stages(staged, stable=STABLE, decay=dataclasses.replace(DECAY, tokens=1e6, **changes))
    with pytest.raises(ConfigError, match=message):
        trainer.train(config)
    assert not config.folder.exists()
