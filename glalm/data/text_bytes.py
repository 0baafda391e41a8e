"""Count the bytes of the text that tokens stand for. Losses in bits per byte compare over tokenizers."""

import math
from collections.abc import Iterable

import numpy as np

from glalm import IGNORE_INDEX
from glalm.data.loader import Windows
from glalm.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # Decoding writes it where a character is incomplete.


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Return a mean loss in bits per byte of the text."""
    return nats_per_token / math.log(2) / bytes_per_token


def count_target_bytes(windows: Windows, ids: Iterable[int], tokenizer: Tokenizer) -> np.ndarray:
    """Return the bytes of UTF-8 that the targets of each window stand for: float64 [windows].

    BOS and EOS stand for none. Where a window cuts a character, its bytes are divided between the windows; a tokenizer
    that decodes an incomplete character as one may count one or two bytes less at the end of a window, and as many more
    at the start of the next. Of a tokenizer that changes texts, each token stands for the mean bytes per token of the
    split, which its manifest has.

    Args:
        ids: The numbers of the windows.
    """
    return np.array([_count_window(windows, i, tokenizer)[1] for i in ids], dtype=np.float64)


def measure_bytes_per_target(windows: Windows, ids: Iterable[int], tokenizer: Tokenizer) -> float:
    """Return the mean number of bytes per target of these windows."""
    targets, text_bytes = np.sum([_count_window(windows, i, tokenizer) for i in ids], axis=0)
    return float(text_bytes / targets)


def _count_window(windows: Windows, i: int, tokenizer: Tokenizer) -> tuple[int, float]:
    """Return the number of targets of window i, and the bytes that they stand for."""
    row = windows[i]
    is_ignored = windows.load_batch(np.array([i]))["labels"][0].numpy() == IGNORE_INDEX
    targets = int((~is_ignored).sum())
    if not tokenizer.round_trips:
        return targets, targets * windows.tokens.text_bytes / windows.tokens.num_tokens
    # A tokenizer that puts a space before a text takes it off only at the beginning of what it decodes, so that each
    # document is decoded by itself.
    begins_document = np.append(False, np.isin(row[:-1], tokenizer.eos_ids))
    if tokenizer.bos_ids:
        begins_document = row == tokenizer.bos_ids[0]
    # Of a piece whose first token is no target, that token is only the context in which the next ones are decoded.
    is_target = np.append(False, ~is_ignored)
    cuts = np.flatnonzero(~is_target | begins_document)
    text_bytes = 0
    for start, piece in zip(cuts, np.split(row, cuts[1:]), strict=True):
        text_bytes += _decoded_bytes(tokenizer, piece)
        if not is_target[start]:
            text_bytes -= _decoded_bytes(tokenizer, piece[:1])
    return targets, text_bytes


def _decoded_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """Return the bytes of the text of `ids`. An incomplete character at an end counts a byte for each replacement."""
    text = tokenizer.decode(ids)
    inner = text.strip(REPLACEMENT)
    return len(inner.encode()) + len(text) - len(inner)
