import dataclasses
import json

import numpy as np
import pytest
import torch

from glalm.config.run import CheckpointConfig, DataConfig, OptimConfig, RunConfig, TrainConfig
from glalm.model.config import ModelConfig


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory):
    """A small prepared set: 200 documents of a made-up language in which each word predicts the next."""
    from glalm.prepare.pipeline import prepare_data

    random = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]

    def document(i: int) -> str:
        start, length = random.integers(len(words)), random.integers(40, 120)
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
