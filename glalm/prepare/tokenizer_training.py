"""Train a SentencePiece tokenizer for which decode(encode(text)) is the text, to the last space."""

import hashlib
import heapq
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Literal

import sentencepiece

from glalm.data.files import atomic_write
from glalm.data.tokenizer import Tokenizer
from glalm.prepare.encode import split_of
from glalm.prepare.input_files import FileInput, Input, read_batches
from glalm.prepare.records import SkippedRecord, parse_records
from glalm.progress import ProgressBar

MAX_INPUT_BYTES = 2**32  # of input that `train_on_inputs` reads
# SentencePiece skips a sentence of more than 4192 bytes without a warning; 1000 characters are at most 4000 bytes.
MAX_SENTENCE_CHARACTERS = 1000


def train_sentencepiece(
    texts: Iterable[str],
    path: str | os.PathLike,
    vocab_size: int,
    *,
    model_type: Literal["bpe", "unigram"] = "bpe",
    max_bytes: int = 32 * 2**20,
) -> Tokenizer:
    """Train a SentencePiece model with byte fallback on `texts`, write it to `path`, and return it.

    A newline is always a token of its own (its byte), and so is each digit. Runs of spaces may be one token. The ids
    are unk 0, bos 1, eos 2, without a padding token. The same texts in any order give the same file.

    Args:
        path: The .model file to write.
        max_bytes: The size in UTF-8 of the sample of `texts` that is used; see `sample_texts`.

    Raises:
        ValueError: There is no text, or `vocab_size` does not fit it.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder. Name the file to write, such as {Path(path) / 'tokenizer.model'}.")
    if vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size} must be at least 1, and in practice some hundreds.")
    sample = sample_texts(texts, max_bytes)
    if not sample:
        raise ValueError("There is no text to train a tokenizer on. Add documents, or hold out fewer of them.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_cut_lines(sample),
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
        # Drop SentencePiece's source location in front, and its advice about an option that we do not offer at the end.
        reason = str(error).rpartition("] ")[2].partition(" Increase vocab_size or")[0]
        raise ValueError(f"--vocab-size {vocab_size} does not fit these texts: {reason}") from error
    with atomic_write(Path(path)) as file:
        file.write(model.getvalue())
    return Tokenizer(path)


def train_on_inputs(inputs: list[Input], settings: dict, path: Path, bar: ProgressBar) -> Tokenizer:
    """Train a tokenizer on the training documents of `inputs`, as the settings of a set say, and write it to `path`.

    Raises:
        ValueError: The inputs are too large, or not local, so that they are not read twice; or they have no text.
    """
    size = sum(source_input.size for source_input in inputs)
    problem = ""
    if size > MAX_INPUT_BYTES:
        problem = f"These sources have {size:,} bytes, but a tokenizer is trained on at most {MAX_INPUT_BYTES:,}."
    if not all(isinstance(source_input, FileInput) for source_input in inputs):
        problem = "These sources would be downloaded twice to train a tokenizer."
    if problem:
        advice = "Train one on a part of the text with glalm tokenizer, or choose an existing one, and name "
        raise ValueError(f"{problem} {advice}it with --tokenizer.")
    texts = read_training_texts(inputs, settings["held_out"], settings["text_field"], bar)
    return train_sentencepiece(texts, path, settings["tokenizer"]["vocab_size"])


def read_training_texts(
    inputs: list[Input], held_out: Mapping[str, float], text_field: str, bar: ProgressBar
) -> Iterator[str]:
    """Yield the text of the documents of `inputs` that are not held out. At the end, log how many records were bad.

    Raises:
        ValueError: There are bad records and no documents. The message names the first of them.
    """
    starts = [0, *accumulate(source_input.size for source_input in inputs)]
    bar.start_task("reading", starts[-1])
    documents = 0
    bad = 0
    first_error = ""
    for batch in read_batches(inputs, [text_field]):
        for item in parse_records(batch.records, batch.first, text_field, None):
            if isinstance(item, SkippedRecord):
                if item.reason != "empty":
                    bad += 1
                    first_error = first_error or f"{inputs[batch.input_index]}:{item.number}: {item.detail}"
            elif split_of(item.text, held_out) == "train":
                documents += 1
                yield item.text
        bar.update(starts[batch.input_index] + batch.bytes_read, status=f"{documents:,} documents")
    if first_error and not documents:
        raise ValueError(f"There is no text to train a tokenizer on. {first_error}")
    if bad:
        bar.log(f"The tokenizer is trained without {bad:,} bad records, of which the first is {first_error}")


def sample_texts(texts: Iterable[str], max_bytes: int, chunk: int = 2**16) -> list[str]:
    """Return the chunks of `texts` that have the lowest hashes: as many as fit in `max_bytes`, up to the first that
    does not.

    The result depends on the texts and not on their order. They are read once, in memory of order `max_bytes`.

    Args:
        max_bytes: The maximum size of the result in UTF-8.
        chunk: The characters of a chunk.
    """
    heap: list[tuple[int, bytes]] = []  # (-hash, chunk): the highest hash is on top
    size = 0
    # What was popped must not leave room for a chunk of a higher hash, which would be popped itself in another order.
    limit = 2**64
    for text in texts:
        for start in range(0, len(text), chunk):
            piece = text[start : start + chunk].encode()
            value = int.from_bytes(hashlib.sha256(piece).digest()[:8])
            if value >= limit:
                continue
            heapq.heappush(heap, (-value, piece))
            size += len(piece)
            while size > max_bytes:
                popped, last = heapq.heappop(heap)
                limit = -popped
                size -= len(last)
    return [piece.decode() for _, piece in sorted(heap, reverse=True)]


def _cut_lines(texts: Iterable[str]) -> Iterator[str]:
    """Yield SentencePiece's sentences: the lines of `texts` that are not empty, cut to MAX_SENTENCE_CHARACTERS."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), MAX_SENTENCE_CHARACTERS):
                yield line[start : start + MAX_SENTENCE_CHARACTERS]
