"""How a run reads its data: sources, document boundaries, and datasets that grow."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from injection import before_steps, fail

from glalm import IGNORE_INDEX
from glalm.config.strict import ConfigError
from glalm.data.files import read_jsonl
from glalm.data.loader import Windows, flatten_batch
from glalm.data.order import Order
from glalm.data.shards import TokenSet
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.prepare.pipeline import prepare_data
from glalm.train import trainer
from glalm.train.trainer import model_inputs
from glalm.train.training_data import TrainingData


@pytest.fixture(scope="module")
def two_sources(token_folder, tmp_path_factory):
    """Prepare a dataset of two sources: long documents and short ones."""
    root = tmp_path_factory.mktemp("two")
    for name, words in (("long", 60), ("short", 5)):
        lines = [json.dumps({"text": f"alpha {i} " + "beta gamma " * (words + i % 7)}) for i in range(60)]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    given = {"tokenizer": token_folder / "tokenizer.model", "shard_tokens": 2000, "progress": False}
    prepare_data([f"{name}={root / name}.jsonl" for name in ("long", "short")], root / "set", **given)
    return root / "set"


@pytest.fixture(scope="module")
def numbers(token_folder, tmp_path_factory):
    """Prepare a dataset of two sources in which no two windows of 16 tokens are equal."""
    root = tmp_path_factory.mktemp("numbers")
    for name, first in (("odd", 1_000_001), ("even", 1_000_000)):
        documents = [range(first + i, first + i + 20, 2) for i in range(0, 1200, 20)]
        lines = [json.dumps({"text": " ".join(map(str, document))}) for document in documents]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    given = {"tokenizer": token_folder / "tokenizer.model", "shard_tokens": 2000, "progress": False}
    prepare_data([f"{name}={root / name}.jsonl" for name in ("odd", "even")], root / "set", **given)
    return root / "set"


def rows(config) -> list[dict]:
    return read_jsonl(config.folder / "metrics.jsonl")


def weights(config) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(config.folder / "checkpoints" / f"step_{config.train.steps}" / "model.safetensors")


def tiny_model() -> CausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 48}
    return CausalLM(ModelConfig(**shape, initializer_range=0.3)).double()


def test_reset_equals_separate_documents(two_sources):
    """Compare loss and gradients of packed windows with those of each document's part, computed alone."""
    windows = Windows(TokenSet(two_sources, "train"), 48, reset_state=True)
    batch = windows.load_batch([0, 5, *range(len(windows) - 4, len(windows))])  # of both sources
    model = tiny_model()
    loss = model(**model_inputs(batch)).loss
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    bounds = flatten_batch(batch)["cu_seqlens"].tolist()
    ids, labels = (batch[name].flatten() for name in ("input_ids", "labels"))
    assert len(bounds) > 6 + 4  # Some documents begin within a window.
    nats, targets = 0, 0
    for a, b in pairwise(bounds):
        logits = model(ids[None, a:b]).logits[0]
        nats += F.cross_entropy(logits, labels[a:b], ignore_index=IGNORE_INDEX, reduction="sum")
        targets += (labels[a:b] != IGNORE_INDEX).sum()
        last = b == len(ids) or b % 48 == 0  # At a window's end, the label is the next window's token.
        assert last or labels[b - 1] == IGNORE_INDEX
        assert ids[a + 1 : b].tolist() == labels[a : b - 1].tolist()
    separate = nats / targets
    separate.backward()
    torch.testing.assert_close(loss.double(), separate, rtol=1e-6, atol=0)
    for gradient, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-8)


def test_document_boundaries_matter_and_micro_batches_do_not(run_config, change, two_sources):
    short = {"data.weights": {"long": 0.0, "short": 1.0}}  # Micro-batches then differ in their number of labels.
    config = change(run_config, **{"data.path": str(two_sources), "data.document_boundaries": "reset_state"}, **short)
    whole = change(config, name="whole", **{"train.micro_batch_size": 4})
    plain = change(config, name="plain", **{"data.document_boundaries": "ignore"})
    for run in (config, whole, plain):
        assert trainer.train(run) == 0
    for a, b in zip(rows(config)[:3], rows(whole)[:3], strict=True):
        for key in a.keys() & {"loss", "val_loss", "grad_norm"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    assert rows(config)[-1]["val_loss"] != pytest.approx(rows(plain)[-1]["val_loss"], rel=1e-4)


def test_tokens_of_each_source_are_counted_through_a_resume(run_config, change, two_sources):
    shares = {"data.path": str(two_sources), "data.weights": {"long": 0.25, "short": 0.75}, "train.steps": 40}
    config = change(run_config, **shares, **{"train.eval_every": 40, "train.checkpoint.every": 10})
    assert trainer.train(config) == 0
    last = rows(config)[-1]
    assert last["tokens/long"] + last["tokens/short"] == last["tokens"] == 40 * 4 * 16
    assert last["tokens/short"] / last["tokens"] == pytest.approx(0.75, abs=0.1)
    assert all(row["data_wait_seconds"] >= 0 for row in rows(config)[1:])

    again = change(config, name="again")
    with before_steps({26: fail}), pytest.raises(RuntimeError, match="injected"):
        trainer.train(again)
    assert trainer.train(again) == 0
    assert rows(again)[-1]["tokens/short"] == last["tokens/short"]
    assert all(torch.equal(t, weights(again)[n]) for n, t in weights(config).items())


@pytest.mark.parametrize(
    "weights, changes",
    [
        pytest.param(None, {"train.batch_size": 7}, id="larger batch"),
        pytest.param({"odd": 0.75, "even": 0.25}, {"train.batch_size": 2}, id="smaller batch"),
        pytest.param(None, {"data.seq_len": 32}, id="longer windows"),
        pytest.param({"odd": 0.75, "even": 0.25}, {"data.weights": {"odd": 0, "even": 1}}, id="other weights"),
    ],
)
def test_sources_are_counted_over_a_change_of_batches(run_config, change, numbers, monkeypatch, weights, changes):
    """Compare the metrics with the windows of all batches, through a change after 6 steps and a failure after it."""
    tokens = TokenSet(numbers, "train")
    windows = {length: Windows(tokens, length) for length in (16, 32)}
    known = {}  # {tokens of a window: its id among those of its length}
    for every in windows.values():
        rows_of_tokens = every.load_batch(range(len(every)))["input_ids"].tolist()
        known |= {tuple(row): i for i, row in enumerate(rows_of_tokens)}
    assert len(known) == sum(map(len, windows.values()))
    read = {}  # {step: [window id, ...]}
    train_step = trainer.Trainer.step

    def step(self, batch):
        read[self.state.step] = [known[tuple(row)] for row in batch["input_ids"].tolist()]
        return train_step(self, batch)

    monkeypatch.setattr(trainer.Trainer, "step", step)
    config = change(run_config, **{"data.path": str(numbers), "data.weights": weights, "train.micro_batch_size": 1})
    assert trainer.train(config) == 0
    config = change(config, **changes, **{"train.steps": 12, "train.allow_changes": ["train.steps", *changes]})
    with before_steps({4: fail}), pytest.raises(RuntimeError, match="injected"):
        trainer.train(config)
    assert trainer.train(config) == 0

    counts = {"even": 0, "odd": 0}  # Windows are numbered by the names of their sources.
    for i, ids in read.items():
        length = 16 if i < 6 else config.data.seq_len
        for window in ids:
            counts["even" if window < windows[length].source_windows["even"] else "odd"] += length
    last = rows(config)[-1]
    assert {name: last[f"tokens/{name}"] for name in counts} == counts
    assert sum(counts.values()) == last["tokens"]
    if "train.batch_size" in changes:  # The run read on at the next window.
        one_by_one = Order(1, 1, windows[16].source_windows, weights)
        ids = [window for i in range(12) for window in read[i]]
        assert ids == [one_by_one.window_ids(i).item() for i in range(len(ids))]


@pytest.mark.parametrize("weights", [None, {"odd": 0.75, "even": 0.25}])
def test_windows_are_named_for_steps_before_a_change_of_batches(run_config, change, numbers, weights):
    """A list of bad updates can begin before a resume. Each length has an order of its own, from window to window."""
    tokens = TokenSet(numbers, "train")
    given = {"data.path": str(numbers), "data.weights": weights, "train.batch_size": 7, "train.steps": 12}
    config = change(run_config, **given)
    training = TrainingData(config, tokens)
    config.resume_at(8, 4 * 4 * 16 + 4 * 2 * 32, [(0, 0, 4, 16), (4, 256, 2, 32)])
    read = {16: [], 32: []}
    for step in range(12):
        read[32 if 4 <= step < 8 else 16] += training.window_ids(step).tolist()
    assert [len(read[length]) for length in read] == [4 * 4 + 4 * 7, 4 * 2]
    for length, ids in read.items():
        one_by_one = Order(config.seed, 1, Windows(tokens, length).source_windows, weights)
        assert ids == [one_by_one.window_ids(i).item() for i in range(len(ids))]


def test_batches_follow_seed_and_weights(run_config, change, two_sources, monkeypatch):
    given = {"data.path": str(two_sources), "data.weights": {"long": 0.25, "short": 0.75}}
    config = change(run_config, seed=5, **given)
    batches = []
    train_step = trainer.Trainer.step

    def step(self, batch):
        batches.append(batch["input_ids"])
        return train_step(self, batch)

    monkeypatch.setattr(trainer.Trainer, "step", step)
    assert trainer.train(config) == 0
    windows = Windows(TokenSet(two_sources, "train"), 16)
    order = Order(5, 4, windows.source_windows, config.data.weights)
    expected = [windows.load_batch(order.window_ids(step))["input_ids"] for step in range(6)]
    assert torch.equal(torch.stack(batches), torch.stack(expected))


def test_one_source_has_no_counts_of_its_own(run_config):
    trainer.train(run_config)
    assert not [key for key in rows(run_config)[-1] if key.startswith("tokens/")]


def test_run_keeps_the_data_it_started_with(run_config, change, two_sources, tmp_path):
    """Stopped, resumed after shards were added: the same weights as if nothing had happened."""
    growing = shutil.copytree(two_sources, tmp_path / "growing")
    config, steady = (change(run_config, name=path.name, **{"data.path": str(path)}) for path in (growing, two_sources))
    with before_steps({5: fail}), pytest.raises(RuntimeError, match="injected"):
        trainer.train(config)
    (tmp_path / "more.txt").write_text("delta epsilon " * 3000)
    prepare_data([tmp_path / "more.txt"], growing, add=True, progress=False)
    assert TokenSet(growing, "train").num_tokens > TokenSet(two_sources, "train").num_tokens
    assert trainer.train(config) == trainer.train(steady) == 0
    assert all(torch.equal(t, weights(steady)[n]) for n, t in weights(config).items())
    prepare_data([tmp_path / "more.txt"], growing, vocab_size=300, overwrite=True, progress=False)
    with pytest.raises(ConfigError, match="prepared again"):
        trainer.train(config)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"long": 1.0}, "must name each source.*long, short"), ({"long": 0.0, "short": 0.0}, "one above 0")],
)
def test_wrong_weights_are_refused(run_config, change, two_sources, given, message):
    with pytest.raises(ConfigError, match=message):
        trainer.train(change(run_config, **{"data.path": str(two_sources), "data.weights": given}))
    assert not run_config.folder.exists()
