"""A SentencePiece tokenizer whose decode(encode(text)) is the text, to the last space."""

import hashlib
import heapq
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from glalm.data.shards import replacing

SPACE_MARK = "\u2581"  # SentencePiece spells a space with this character


class Tokenizer:
    """A trained SentencePiece model: text <-> token ids.

    path: a .model file. It must define bos and eos, because documents are framed by them.
    Raises FileNotFoundError if there is no such file, ValueError if it is no usable model.

    Models of `train_sentencepiece` give every text back exactly. Models from elsewhere may add a leading
    space or normalise: their decode is as faithful as they were trained to be.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such tokenizer; give the path of a SentencePiece .model file")
        model = self.path.read_bytes()
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{self.path}: not a SentencePiece model ({error})") from error
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._sp.get_piece_size()
        self.bos_id: int = self._sp.bos_id()
        self.eos_id: int = self._sp.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{self.path}: defines no bos or no eos token; train it with both")
        self._space_mark_ids = self._find_space_mark_ids()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos and eos. Text with lone surrogates raises UnicodeEncodeError."""
        if self._space_mark_ids is None or SPACE_MARK not in text:
            return self._sp.encode(text)
        parts = text.split(SPACE_MARK)
        ids = self._sp.encode(parts[0])
        for part in parts[1:]:
            ids += self._space_mark_ids + self._sp.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bos and eos give nothing."""
        return self._sp.decode([int(i) for i in ids])

    def _find_space_mark_ids(self) -> list[int] | None:
        # A literal U+2581 in the text would be decoded as a space. Spelled in bytes it survives, provided
        # that the model has byte pieces and does not put a space before each part that is encoded by itself.
        ids = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        in_bytes = all(self._sp.is_byte(i) for i in ids)
        adds_space = self._sp.encode("a", out_type=str)[0].startswith(SPACE_MARK)
        return ids if in_bytes and not adds_space else None


def train_sentencepiece(
    texts: Iterable[str], path: str | os.PathLike, vocab_size: int, max_bytes: int = 32 * 2**20
) -> Tokenizer:
    """Train a byte-pair encoding with byte fallback on `texts`, write it to `path`, and return it.

    The same texts in any order give the same file: at most `max_bytes` (UTF-8) of them are used, sampled by
    hash. Ids: unk 0, bos 1, eos 2, no pad. A newline is always a token of its own (its byte), so is each digit;
    runs of spaces may be one token. Raises ValueError if there is no text, or `vocab_size` does not suit it.
    """
    sample = sample_texts(texts, max_bytes)
    if not sample:
        raise ValueError("texts: no training text for a tokenizer; add documents, or hold out less of them")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(sample),
            model_writer=model,
            model_type="bpe",
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
        reason = str(error).rpartition("] ")[2]  # less the source line and the condition that failed
        raise ValueError(f"vocab_size={vocab_size} does not suit these texts: {reason}") from error
    with replacing(Path(path)) as file:
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
