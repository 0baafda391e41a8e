"""The bytes of targets, against the bytes of the texts themselves."""

import json
import math
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm import IGNORE_INDEX
from glalm.data.loader import Windows, spaced_windows
from glalm.data.shards import TokenSet
from glalm.data.text_bytes import bits_per_byte, count_target_bytes, measure_bytes_per_target
from glalm.data.tokenizer import Tokenizer
from glalm.prepare.pipeline import prepare_data

TEXTS = ["one, two", "  漢字と\n仮名 ", "é" * 9 + "\U0001f600" * 5, "a", "x = [1, 2]\n\ttab"] * 3


def prepare(folder, texts, tokenizer_path) -> TokenSet:
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_data([folder / "texts.jsonl"], folder / "set", tokenizer=str(tokenizer_path), held_out={}, progress=False)
    return TokenSet(folder / "set", "train")


@pytest.mark.parametrize("kind", ["SentencePiece", "byte-level"])
@pytest.mark.parametrize("reset_state", [False, True])
def test_windows_have_the_bytes_of_the_texts(kind, token_folder, hugging_face, tmp_path, reset_state):
    """All windows together have those of all texts, but for what is no target: where a text begins without a BOS, and
    what fills no window at the end."""
    path = token_folder / "tokenizer.model" if kind == "SentencePiece" else hugging_face
    tokenizer = Tokenizer(path)
    tokens = prepare(tmp_path, ["a start", *TEXTS, "." * 100], path)
    stream = tokens.read_tokens(0, tokens.num_tokens)
    assert tokens.text_bytes == sum(len(text.encode()) for text in TEXTS) + 107
    for length in (1, 5, 32):
        windows = Windows(tokens, length, reset_state)
        end = length * len(windows) + 1
        untrained = [stream[end:]]
        if not tokenizer.bos_ids:
            starts = tokens.document_starts(0, end if reset_state else 1)
            untrained += [stream[start : start + 1] for start in starts]
        expected = tokens.text_bytes - sum(len(tokenizer.decode(part).encode()) for part in untrained)
        counts = count_target_bytes(windows, range(len(windows)), tokenizer)
        is_exact = kind == "SentencePiece"
        assert counts.sum() == pytest.approx(expected, abs=0 if is_exact else 2 * len(windows)), length
        ids = spaced_windows(windows, 3)
        targets = sum(int((windows.load_batch([i])["labels"] != IGNORE_INDEX).sum()) for i in ids)
        assert measure_bytes_per_target(windows, ids, tokenizer) == pytest.approx(counts[ids].sum() / targets)


CHARACTERS = st.characters(codec="utf-8", exclude_characters="\ufffd")  # Decoding writes it for a part of another.


@given(st.lists(st.text(CHARACTERS, max_size=12), min_size=1, max_size=4), st.integers(1, 6))
@settings(max_examples=15)
def test_windows_of_any_text_have_its_bytes(token_folder, texts, length):
    """Of a tokenizer with BOS and byte fallback, whatever character a window cuts."""
    tokenizer = Tokenizer(token_folder / "tokenizer.model")
    documents = [[*tokenizer.bos_ids, *tokenizer.encode(text), *tokenizer.eos_ids] for text in texts]
    stream = np.array([*chain.from_iterable(documents), *[tokenizer.eos_id] * length])
    windows = Windows(Stream(stream), length)
    counts = count_target_bytes(windows, range(len(windows)), tokenizer)
    assert counts.sum() == sum(len(text.encode()) for text in texts)


def test_a_tokenizer_that_changes_texts_has_the_bytes_of_the_manifest(token_folder, tmp_path):
    tokens = prepare(tmp_path, TEXTS, token_folder / "tokenizer.model")
    tokenizer = Tokenizer(token_folder / "tokenizer.model")
    tokenizer.round_trips = False
    windows = Windows(tokens, 8)
    counts = count_target_bytes(windows, [0, 1], tokenizer)
    assert counts == pytest.approx([8 * tokens.text_bytes / tokens.num_tokens] * 2)


def test_bits_per_byte_of_uniform_bytes():
    assert bits_per_byte(math.log(256), bytes_per_token=1) == pytest.approx(8)
    assert bits_per_byte(math.log(256), bytes_per_token=4) == pytest.approx(2)


class Stream:
    """As much of a TokenSet as windows read, in memory."""

    is_complete = True

    def __init__(self, stream: np.ndarray):
        self.stream = stream
        self.source_tokens = {"memory": len(stream)}

    def read_tokens(self, start: int, stop: int) -> np.ndarray:
        return self.stream[start:stop]
