"""Blocks of records to tokens, on all cores, in the order in which they were read."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glalm.data.tokenizer import Tokenizer
from glalm.prepare.records import BadDocument, Record, extract_document, is_blank, size_of
from glalm.prepare.workers import bind_to_parent

HELD_OUT: Mapping[str, float] = {"validation": 0.05, "test": 0.1}
AHEAD = 2**23  # bytes of records a worker that are under way at once


class Block(NamedTuple):
    """Neighbouring records of input number `input`, from record number `first` (of 0, 1, ...) on.

    position: bytes of the input that were read by their end. last: whether the input ends with them.
    """

    input: int
    source: str
    first: int
    records: list[Record]
    size: int
    position: int
    last: bool


class Encoded(NamedTuple):
    """ids: the tokens of all documents of a block, framed, end to end. documents: their split, source, number of
    tokens and bytes of text. skipped: the number of a record, the reason and a detail."""

    ids: np.ndarray
    documents: list[tuple[str, str, int, int]]
    skipped: list[tuple[int, str, str]]


@dataclass(frozen=True)
class Recipe:
    """How a record becomes tokens. tokenizer: its path. dtype: of the ids."""

    tokenizer: Path
    dtype: str
    held_out: Mapping[str, float]
    text_field: str
    source_field: str | None

    def encoder(self) -> Callable[[Block], Encoded]:
        tokenizer = Tokenizer(self.tokenizer)
        before, after = (np.array(ids, dtype=np.int32) for ids in (tokenizer.bos_ids, tokenizer.eos_ids))

        def encode(block: Block) -> Encoded:
            parts, documents, skipped = [], [], []
            for number, record in enumerate(block.records, start=block.first):
                if is_blank(record):
                    continue
                try:
                    text, source = extract_document(record, self.text_field, self.source_field)
                except BadDocument as bad:
                    skipped.append((number, *bad.args))
                    continue
                ids = tokenizer.encode_array(text)
                parts += (before, ids, after)
                data = text.encode()
                tokens = len(before) + len(ids) + len(after)
                documents.append((split_of(data, self.held_out), source or block.source, tokens, len(data)))
            ids = np.concatenate([np.empty(0, np.int32), *parts])
            if len(ids) and ids.max() >= tokenizer.vocab_size:
                raise ValueError(f"{self.tokenizer}: gave id {ids.max()}, its vocabulary is {tokenizer.vocab_size}")
            return Encoded(ids.astype(self.dtype), documents, skipped)

        return encode


def split_of(text: str | bytes, held_out: Mapping[str, float] = HELD_OUT) -> str:
    """The split of the document `text` (or its UTF-8): "train", "validation" or "test", by its sha256."""
    data = text.encode() if isinstance(text, str) else text
    point = int.from_bytes(hashlib.sha256(data).digest()[:8]) / 2**64
    for split in ("test", "validation"):
        point -= held_out.get(split, 0)
        if point < 0:
            return split
    return "train"


def blocks_of(
    records: Iterable[tuple[list[Record], int]], number: int, source: str, start: int, size: int
) -> Iterator[Block]:
    """The records of one input from number `start` on, in blocks of about `size` bytes; the last one may be empty."""
    seen, first, held, held_size, position = 0, start, [], 0, 0
    for some, position in records:
        for record in some[max(start - seen, 0) :]:
            held.append(record)
            held_size += size_of(record)
            if held_size >= size:
                yield Block(number, source, first, held, held_size, position, last=False)
                first, held, held_size = first + len(held), [], 0
        seen += len(some)
    yield Block(number, source, first, held, held_size, position, last=True)


def encode_in_order(blocks: Iterable[Block], recipe: Recipe, workers: int) -> Iterator[tuple[Block, Encoded]]:
    """Each block with what it gives, in order. At most AHEAD bytes a worker are under way, or one block."""
    if workers == 1:
        encode = recipe.encoder()
        for block in blocks:
            yield block, encode(block)
        return
    # Not forked: this process may have threads, and what they held would stay locked in the children.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (recipe,))
    waiting: deque[tuple[Block, Future]] = deque()
    under_way = 0
    try:
        for block in blocks:
            waiting.append((block, pool.submit(_encode, block)))
            under_way += block.size
            while under_way > AHEAD * workers or (waiting[0][1].done() and len(waiting) > 1):
                block, future = waiting.popleft()
                yield block, future.result()
                under_way -= block.size
                if not waiting:
                    break
        while waiting:
            block, future = waiting.popleft()
            yield block, future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"workers={workers}: one of these processes was ended, by the system if memory ran out; "
            "run the same command again, with fewer workers if so: it goes on from here"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(recipe: Recipe) -> None:
    """Runs first in each worker process: one thread of its own, and see bind_to_parent."""
    global _encode_block
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    bind_to_parent()
    _encode_block = recipe.encoder()


def _encode(block: Block) -> Encoded:
    return _encode_block(block)
