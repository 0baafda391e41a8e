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
