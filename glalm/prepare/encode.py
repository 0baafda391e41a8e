"""Turn records into token ids: a pure function of its arguments."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glalm.data.tokenizer import Tokenizer
from glalm.prepare.input_files import RecordBatch
from glalm.prepare.records import SkippedRecord, parse_records

HELD_OUT: Mapping[str, float] = {"validation": 0.05, "test": 0.1}  # shares of the documents


def check_shares(held_out: Mapping[str, float]) -> None:
    """Raise ValueError unless the shares are 0 or more and leave some documents for training."""
    shares = " ".join(f"--{split} {share:g}" for split, share in held_out.items())
    if not all(share >= 0 for share in held_out.values()):  # Also for NaN, for which any comparison is false.
        raise ValueError(f"{shares}: shares must be 0 or more.")
    if sum(held_out.values()) >= 1:
        advice = "Choose shares that sum below 1. To score a file as it lies, run: glalm eval name=RUN text=FILE"
        raise ValueError(f"{shares} leaves no documents for training. {advice}")


class EncodedDocument(NamedTuple):
    """One document of an `EncodedBatch`: the next `tokens` of its ids. `number` is that of its record."""

    number: int
    split: str
    source: str
    tokens: int
    text_bytes: int


class EncodedBatch(NamedTuple):
    """The documents of a batch of records, and the records that have none.

    `ids` are the tokens of all documents, end to end, each with its BOS and EOS tokens: [tokens].
    """

    ids: np.ndarray
    documents: list[EncodedDocument]
    skipped: list[SkippedRecord]

    def shift_numbers(self, before: int) -> "EncodedBatch":
        """Return the batch with the numbers that records have if `before` records precede those that were read."""
        skipped = [replace(record, number=before + record.number) for record in self.skipped]
        documents = [document._replace(number=before + document.number) for document in self.documents]
        return self._replace(skipped=skipped, documents=documents)


def encode_batch(
    tokenizer_path: Path, fingerprint: str, dtype: str, settings: dict, batch: RecordBatch
) -> EncodedBatch:
    """Tokenize the documents in a batch of records and assign each of them to a split.

    Args:
        fingerprint: The fingerprint of the tokenizer at `tokenizer_path`.
        dtype: The dtype of the ids, "uint16" or "uint32".
        settings: The settings of the set. Its held_out, text_field and source_field are those of `prepare_data`.

    Raises:
        ValueError: The tokenizer returned an id outside of its vocabulary.
    """
    tokenizer = open_tokenizer(tokenizer_path, fingerprint)
    bos_ids = np.array(tokenizer.bos_ids, dtype=np.int32)
    eos_ids = np.array(tokenizer.eos_ids, dtype=np.int32)
    parts = [np.empty(0, np.int32)]
    documents = []
    skipped = []
    for item in parse_records(batch.records, batch.first, settings["text_field"], settings["source_field"]):
        if isinstance(item, SkippedRecord):
            skipped.append(item)
            continue
        ids = tokenizer.encode_array(item.text)
        parts += (bos_ids, ids, eos_ids)
        data = item.text.encode()
        tokens = len(bos_ids) + len(ids) + len(eos_ids)
        split = split_of(data, settings["held_out"])
        documents.append(EncodedDocument(item.number, split, item.source or batch.source, tokens, len(data)))
    ids = np.concatenate(parts)
    if len(ids) and ids.max() >= tokenizer.vocab_size:
        vocabulary = f"its vocabulary has {tokenizer.vocab_size} ids"
        raise ValueError(f"{tokenizer_path} returned the token id {ids.max()}, but {vocabulary}.")
    return EncodedBatch(ids.astype(dtype), documents, skipped)


@lru_cache(maxsize=1)
def open_tokenizer(path: Path, fingerprint: str) -> Tokenizer:
    """Return the tokenizer at `path`, loaded once by each process.

    The fingerprint is part of the cache's key, because another tokenizer may have replaced the one at `path`.
    """
    return Tokenizer(path)


def split_of(text: str | bytes, held_out: Mapping[str, float] = HELD_OUT) -> str:
    """Return the split of a document, "train", "validation" or "test", which depends on the SHA-256 of its text alone.

    Therefore copies of a document are never on both sides, and a document stays in its split as a set grows.
    """
    data = text.encode() if isinstance(text, str) else text
    point = int.from_bytes(hashlib.sha256(data).digest()[:8]) / 2**64
    for split in ("test", "validation"):
        point -= held_out.get(split, 0)
        if point < 0:
            return split
    return "train"
