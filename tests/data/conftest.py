import json
import keyword
import random

import pytest

from glalm.data.prepare import prepare

WORDS = [*keyword.kwlist, "(a, b):", "'quoted'", "# comment", "==", "2024", "äöü"]


def some_text(seed: int, lines: int) -> str:
    rng = random.Random(seed)
    return "".join(f"{'    ' * rng.randrange(4)}{' '.join(rng.choices(WORDS, k=5))}\n" for _ in range(lines))


@pytest.fixture(scope="session")
def texts():
    """60 documents of 1 to 60 lines."""
    return [some_text(seed, lines=seed + 1) for seed in range(60)]


@pytest.fixture(scope="session")
def corpus(texts, tmp_path_factory):
    """A .jsonl of these texts."""
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory):
    """A small set, its streams in several shards. To be read, not changed."""
    out = tmp_path_factory.mktemp("prepared") / "set"
    prepare([corpus], out, vocab_size=400, shard_tokens=1000, progress=False)
    return out
