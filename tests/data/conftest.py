import json
import keyword
import random

import pytest
from hypothesis import settings

from glalm.prepare.pipeline import prepare_data

settings.register_profile("no_deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no_deadline")

WORDS = [*keyword.kwlist, "(a, b):", "'quoted'", "# comment", "==", "2024", "äöü"]


def some_text(seed: float, lines: int) -> str:
    rng = random.Random(seed)
    return "".join(f"{'    ' * rng.randrange(4)}{' '.join(rng.choices(WORDS, k=5))}\n" for _ in range(lines))


@pytest.fixture(scope="session")
def texts():
    """60 documents of 1 to 60 lines."""
    return [some_text(seed, lines=seed + 1) for seed in range(60)]


@pytest.fixture(scope="session")
def corpus(texts, tmp_path_factory):
    """A .jsonl of these texts."""
    path = tmp_path_factory.mktemp("texts") / "corpus" / "texts.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory):
    """A small set, its streams in several shards. To be read, not changed."""
    out = tmp_path_factory.mktemp("prepared") / "set"
    prepare_data([corpus], out, vocab_size=400, shard_tokens=1000, progress=False)
    return out


@pytest.fixture(scope="session")
def hugging_face(texts, tmp_path_factory):
    """A folder with a byte-level tokenizer of Hugging Face, with a length limit and special tokens."""
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
