"""Training a SentencePiece tokenizer whose decode(encode(text)) is the text, to the last space."""

import hashlib
import heapq
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import sentencepiece

from glalm.data.files import atomic_write
from glalm.data.tokenizer import Tokenizer


def train_sentencepiece(
    texts: Iterable[str],
    path: str | os.PathLike,
    vocab_size: int,
    *,
    model_type: Literal["bpe", "unigram"] = "bpe",
    max_bytes: int = 32 * 2**20,
) -> Tokenizer:
    """Train a byte-pair encoding, or a unigram model, with byte fallback on `texts`, write it to `path`, and return it.

    The same texts in any order give the same file: at most `max_bytes` (UTF-8) of them are used, sampled by
    hash. Ids: unk 0, bos 1, eos 2, no pad. A newline is always a token of its own (its byte), so is each digit;
    runs of spaces may be one token. Raises ValueError if there is no text, or `vocab_size` does not suit it.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: name the file to write, {Path(path) / 'tokenizer.model'}")
    if vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size} must be at least 1, and in practice some hundreds")
    sample = sample_texts(texts, max_bytes)
    if not sample:
        raise ValueError("texts: no training text for a tokenizer; add documents, or hold out less of them")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(sample),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        # Less the source line and the condition that failed, and advice on an option of its own.
        reason = str(error).rpartition("] ")[2].partition(" Increase vocab_size or")[0]
        raise ValueError(f"vocab_size={vocab_size} does not suit these texts: {reason}") from error
    with atomic_write(Path(path)) as file:
        file.write(model.getvalue())
    return Tokenizer(path)


def sample_texts(texts: Iterable[str], max_bytes: int, chunk: int = 2**16) -> list[str]:
    """Chunks of `texts` (of `chunk` characters), at most `max_bytes` in all, those with the lowest hashes.

    One pass, in memory of order `max_bytes`. The result depends on the set of texts, not on their order.
    """
    kept: list[tuple[int, bytes]] = []  # a heap with the highest hash on top
    size = 0
    for text in texts:
        for start in range(0, len(text), chunk):
            piece = text[start : start + chunk].encode()
            heapq.heappush(kept, (-int.from_bytes(hashlib.sha256(piece).digest()[:8]), piece))
            size += len(piece)
            while size > max_bytes:
                size -= len(heapq.heappop(kept)[1])
    return [piece.decode() for _, piece in sorted(kept, reverse=True)]


def _lines(texts: Iterable[str]) -> Iterator[str]:
    # The trainer silently skips a sentence of more than 4192 bytes: 1000 characters are always fewer.
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), 1000):
                yield line[start : start + 1000]
