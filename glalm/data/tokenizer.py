"""Text to token ids and back: SentencePiece models, Hugging Face tokenizers, and Mistral's first tokenizer.

A long text is encoded in pieces, in memory that does not grow with it and several times faster (byte-pair merging
in a text of a book's length misses every cache). It is cut where no token can reach across, so that the ids are those
of the text as a whole.
"""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import sentencepiece

from glalm.data.files import atomic_write

SPACE_MARK = "\u2581"  # SentencePiece spells a space with this character
MISTRAL_V1 = "mistral-v1"
PROBE = "  Two  spaces, a\ttab,\r\n\n\u201ccurly\u201d \u6f22\u5b57 e\u0301 \U0001f600 <s></s> x=1;  "


class Tokenizer:
    """text <-> token ids, for documents framed by `before` and `after`.

    name: a SentencePiece .model file; a folder with a Hugging Face tokenizer.json, or with a tokenizer.model; a
    Hugging Face name ("gpt2"); or "mistral-v1", which the package mistral-common ships.
    Raises FileNotFoundError if there is no such thing, ValueError if it cannot be used.

    vocab_size: ids lie below it. bos_id, eos_id: what frames a document; where a tokenizer has no token for the
    beginning, documents are only ended, and bos_id is eos_id, for that is what a document then follows.
    fingerprint: the sha256 of what decides the ids. round_trips: whether decode(encode(text)) gave a text with
    spaces, line ends and several scripts back; some tokenizers normalise.
    """

    def __init__(self, name: str | os.PathLike):
        self._codec = _open(str(name))
        self.vocab_size: int = self._codec.vocab_size
        self.fingerprint: str = self._codec.fingerprint
        bos, eos = self._codec.bos_id, self._codec.eos_id
        if eos is None:
            raise ValueError(f"{name}: defines no token for the end of a document (eos); use a tokenizer that does")
        self.bos_ids: list[int] = [] if bos in (None, eos) else [bos]
        self.eos_ids: list[int] = [eos]
        self.bos_id: int = eos if bos is None else bos
        self.eos_id: int = eos
        self.round_trips: bool = self.decode(self.encode(PROBE)) == PROBE

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, unframed; text that looks like a special token is text. Lone surrogates raise
        UnicodeEncodeError."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """The same as an array: int32 [tokens]."""
        return self._codec.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bos and eos give nothing."""
        return self._codec.decode([int(i) for i in ids])

    def save(self, folder: Path) -> str:
        """Write the tokenizer into `folder`, so that Tokenizer(folder / name) opens it again; returns that name."""
        return self._codec.save(folder)


def _open(name: str) -> "_SentencePiece | _HuggingFace":
    if name == MISTRAL_V1:
        return _SentencePiece(_mistral_v1())
    path = Path(name)
    if path.is_file():
        return _SentencePiece(path)
    # transformers would convert a bare tokenizer.model, to ids that differ from SentencePiece's at a double space.
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        return _SentencePiece(path / "tokenizer.model")
    if not path.is_dir() and (name.endswith(".model") or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"{name}: no such tokenizer; give a .model file, a folder, or a Hugging Face name")
    return _HuggingFace(name)


def _mistral_v1() -> Path:
    spec = importlib.util.find_spec("mistral_common")
    if not spec:
        raise ValueError(
            f"{MISTRAL_V1} is in the package mistral-common: pip install -c constraints.txt -e '.[mistral]'"
        )
    return Path(spec.origin).parent / "data" / "tokenizer.model.v1"


# ------------------------------------------------------------------------------------------------ cutting long texts


def cut(text: str, size: int, patience: int, safe: Callable[[str, int], bool]) -> Iterator[str]:
    """`text` in pieces of about `size` characters, each ending at the first `safe` place from there on.

    If none comes within `patience` characters, the text is cut all the same: memory is bounded whatever the text.
    """
    start = 0
    while len(text) - start > size:
        places = range(start + size, min(start + size + patience, len(text)))
        end = next((p for p in places if safe(text, p)), places.stop)
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]


def at_space(text: str, p: int) -> bool:
    """Whether a word ends right before text[p]."""
    return text[p] in " \n" and not text[p - 1].isspace()


# ---------------------------------------------------------------------------------------------------- SentencePiece


class _SentencePiece:
    """Models of `train_sentencepiece` give every text back exactly. Models from elsewhere may add a leading space or
    normalise: their decode is as faithful as they were trained to be, and their ids are SentencePiece's own.
    """

    SIZE, PATIENCE, TOGETHER = 4096, 2**20, 256

    def __init__(self, path: Path):
        self._model = path.read_bytes()
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise ValueError(
                f"{path}: not a SentencePiece model; of a Hugging Face tokenizer, give the folder or the name"
            ) from error
        self.fingerprint = hashlib.sha256(self._model).hexdigest()
        self.vocab_size = self._sp.get_piece_size()
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (self._sp.bos_id(), self._sp.eos_id()))
        adds_space = self._sp.encode("a", out_type=str)[0].startswith(SPACE_MARK)
        self._mark_ids = None if adds_space else self._find_mark_ids()
        # What stands in front of each piece but a text's first, so that no space is added there.
        self._lead = "\n" if adds_space else ""
        lead = self._sp.encode(self._lead)
        self._lead_tokens = len(lead)
        pieces = [self._sp.id_to_piece(i) for i in range(self.vocab_size) if not self._sp.is_byte(i)]
        self._pairs = {a + b for piece in pieces for a, b in pairwise(piece)}
        spelled = self._sp.normalize(PROBE).removeprefix(SPACE_MARK if adds_space else "")
        is_plain = spelled == PROBE.replace(" ", SPACE_MARK) and (not lead or self._sp.is_byte(lead[-1]))
        self._safe = self._between_tokens if is_plain else at_space

    def encode(self, text: str) -> np.ndarray:
        if self._mark_ids is not None and SPACE_MARK in text:
            parts = [x for part in text.split(SPACE_MARK) for x in (self._mark_ids, self._encode(part))]
            return np.concatenate(parts[1:])
        return self._encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._sp.decode(ids)

    def save(self, folder: Path) -> str:
        with atomic_write(folder / "tokenizer.model") as file:
            file.write(self._model)
        return "tokenizer.model"

    def _encode(self, text: str) -> np.ndarray:
        pieces = cut(text, self.SIZE, self.PATIENCE, self._safe)
        ids = [np.array(self._sp.encode(next(pieces)), dtype=np.int32)]
        while group := [self._lead + piece for piece in islice(pieces, self.TOGETHER)]:
            encoded = self._sp.encode(group, num_threads=1)
            ids += [np.array(x[self._lead_tokens :], dtype=np.int32) for x in encoded]
        return np.concatenate(ids)

    def _between_tokens(self, text: str, p: int) -> bool:
        # Only characters that are neighbours in a piece of the vocabulary can come to lie in one token.
        return text[p - 1 : p + 1].replace(" ", SPACE_MARK) not in self._pairs

    def _find_mark_ids(self) -> np.ndarray | None:
        # A literal U+2581 in the text would be decoded as a space. Spelled in bytes it survives, provided that the
        # model has byte pieces and does not put a space before each part that is encoded by itself.
        ids = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        return np.array(ids, dtype=np.int32) if all(self._sp.is_byte(i) for i in ids) else None


# ----------------------------------------------------------------------------------------------------- Hugging Face


class _HuggingFace:
    """A fast tokenizer of transformers, loaded from a folder or by name."""

    SIZE, PATIENCE, CONTEXT = 2**18, 2**12, 200

    def __init__(self, name: str):
        from transformers import AutoTokenizer  # seconds to import

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: no tokenizer that transformers can load ({_first_line(error)})") from error
        if not self._tokenizer.is_fast:
            raise ValueError(f"{name}: has no tokenizer.json; save it with transformers' fast tokenizer first")
        self._fast = self._tokenizer.backend_tokenizer
        # A tokenizer.json may bring its model's length limit along, and takes special tokens out of any text.
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True
        self.fingerprint = hashlib.sha256(self._fast.to_str().encode()).hexdigest()
        self.vocab_size = len(self._tokenizer)
        ids = self._tokenizer
        self.bos_id = ids.cls_token_id if ids.bos_token_id is None else ids.bos_token_id
        self.eos_id = ids.sep_token_id if ids.eos_token_id is None else ids.eos_token_id

    def encode(self, text: str) -> np.ndarray:
        text.encode()  # lone surrogates would become replacement characters
        pieces = cut(text, self.SIZE, self.PATIENCE, self._between_tokens)
        return np.concatenate([np.array(self._ids(piece), dtype=np.int32) for piece in pieces])

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, folder: Path) -> str:
        self._tokenizer.save_pretrained(folder / "tokenizer")
        return "tokenizer"

    def _ids(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def _between_tokens(self, text: str, p: int) -> bool:
        # What a tokenizer does at a place is decided near it, so that its surroundings tell.
        left, right = text[p - self.CONTEXT : p], text[p : p + self.CONTEXT]
        return at_space(text, p) and self._ids(left + right) == self._ids(left) + self._ids(right)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
