import dataclasses
import gc
import json
import keyword
import os
import random
import signal

import numpy as np
import pytest
import torch
from hypothesis import settings

from glalm.config.run import CheckpointConfig, DataConfig, OptimConfig, RunConfig, TrainConfig
from glalm.model.config import ModelConfig
from glalm.progress import show_log

settings.register_profile("no_deadline", deadline=None)  # A busy machine must not fail a test.
settings.load_profile("no_deadline")
show_log()  # Tests read on stderr what a command shows there.

WORDS = [*keyword.kwlist, "(a, b):", "'quoted'", "# comment", "==", "2024", "äöü"]


def pytest_configure():
    """Let processes of tests end at Ctrl-C, and let the workers of pytest-xdist share all GPUs."""
    # A shell that runs the suite in the background ignores Ctrl-C for it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Each worker counts the GPUs from another one on, so that cuda:0 is a different one, and tests of several see all.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    count = torch.cuda.device_count()
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(str(gpu) for gpu in range(count))).split(",")
        first = int(worker) % count
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[first:] + visible[:first])


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_logreport(report):
    """Print at once why a test on a GPU failed: a rented machine may be gone before pytest's summary."""
    if report.failed and "gpu" in report.keywords:
        print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)


def pytest_collection_finish():
    """Exempt all that exists from collections of garbage: each `train` starts one, which takes 0.4 s otherwise."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # Else the interpreter's last collection would leave objects, which some libraries report as leaks.


@pytest.fixture(autouse=True)
def restored_precision():
    """Let no test change how float32 products are computed in those after it, as training in bfloat16 does on a GPU."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.fp32_precision = "none"


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory):
    """A small prepared set: 200 documents of a made-up language in which each word predicts the next."""
    from glalm.prepare.pipeline import prepare_data

    generator = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]

    def document(i: int) -> str:
        start, length = generator.integers(len(words)), generator.integers(40, 120)
        return " ".join(words[(start + j * (1 + i % 2)) % len(words)] for j in range(length))

    folder = tmp_path_factory.mktemp("data")
    (folder / "words.jsonl").write_text("".join(json.dumps({"text": document(i)}) + "\n" for i in range(200)))
    prepare_data([folder / "words.jsonl"], folder / "words", vocab_size=300, progress=False)
    return folder / "words"


@pytest.fixture
def run_config(token_folder, tmp_path):
    """A run that takes a second: six steps of two micro-batches of two sequences of 16 tokens."""
    return RunConfig(
        name="tiny",
        runs_dir=str(tmp_path / "runs"),
        model=ModelConfig(
            vocab_size=320, hidden_size=32, num_hidden_layers=2, num_heads=2, intermediate_size=48, gate_low_rank_dim=4
        ),
        data=DataConfig(path=str(token_folder), seq_len=16),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2),
        train=TrainConfig(
            steps=6,
            batch_size=4,
            micro_batch_size=2,
            eval_every=3,
            eval_sequences=8,
            log_every=1,
            checkpoint=CheckpointConfig(every=2),
        ),
    )


@pytest.fixture
def change():
    """change(config, **{"train.steps": 3}): a copy with nested fields replaced."""

    def replaced(config, **changes):
        for path, value in changes.items():
            head, _, rest = path.partition(".")
            config = dataclasses.replace(
                config, **{head: replaced(getattr(config, head), **{rest: value}) if rest else value}
            )
        return config

    return replaced


def make_text(seed: float, lines: int) -> str:
    """Return lines that look like Python, the same ones for a seed."""
    rng = random.Random(seed)
    return "".join(f"{'    ' * rng.randrange(4)}{' '.join(rng.choices(WORDS, k=5))}\n" for _ in range(lines))


@pytest.fixture(scope="session")
def texts():
    """Texts of 60 documents of 1 to 60 lines."""
    return [make_text(seed, lines=seed + 1) for seed in range(60)]


@pytest.fixture(scope="session")
def corpus(texts, tmp_path_factory):
    """A .jsonl file of these texts."""
    path = tmp_path_factory.mktemp("texts") / "corpus" / "texts.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory):
    """A small prepared set, with several shards for each split. Tests read it and change only copies of it."""
    out = tmp_path_factory.mktemp("prepared") / "set"
    from glalm.prepare.pipeline import prepare_data

    prepare_data([corpus], out, vocab_size=400, shard_tokens=1000, progress=False)
    return out


@pytest.fixture(scope="session")
def hugging_face(texts, tmp_path_factory):
    """The folder of a byte-level Hugging Face tokenizer with a length limit and special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<s></s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    model.enable_truncation(16)
    folder = tmp_path_factory.mktemp("hugging_face")
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>").save_pretrained(folder)
    return folder
