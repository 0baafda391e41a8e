"""Text to token ids and back: SentencePiece models, Hugging Face tokenizers, and Mistral's first tokenizer.

Long texts are encoded in pieces, because byte-pair merging of a book's text misses every cache, and memory grows with
the text. A text is cut where no token can reach across the cut, so the ids are those of the whole text.
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
    """A tokenizer, and the tokens with which a document begins and ends.

    Args:
        name: A SentencePiece .model file; a folder with a Hugging Face tokenizer.json, or with a tokenizer.model; a
            Hugging Face name ("gpt2"); or "mistral-v1", which the package mistral-common ships.

    Attributes:
        vocab_size: All ids are below it.
        bos_id, eos_id: The tokens before and after a document. A tokenizer without a BOS token only ends documents;
            then bos_id is eos_id, because that is the token that precedes a document.
        bos_ids, eos_ids: What preparation puts before and after a document: lists of no or one id.
        fingerprint: The SHA-256 of what determines the ids.
        round_trips: Whether decode(encode(text)) returned a text with spaces, line ends and several scripts unchanged.
            Some tokenizers normalize.

    Raises:
        FileNotFoundError: There is no such tokenizer.
        ValueError: It cannot be loaded, or has no end-of-document token.
    """

    def __init__(self, name: str | os.PathLike):
        self._backend = _open_backend(str(name))
        self.vocab_size: int = self._backend.vocab_size
        self.fingerprint: str = self._backend.fingerprint
        bos = self._backend.bos_id
        eos = self._backend.eos_id
        if eos is None:
            raise ValueError(f"{name} has no end-of-document (EOS) token. Choose a tokenizer that has one.")
        self.bos_ids: list[int] = [] if bos in (None, eos) else [bos]
        self.eos_ids: list[int] = [eos]
        self.bos_id: int = eos if bos is None else bos
        self.eos_id: int = eos
        self.round_trips: bool = self.decode(self.encode(PROBE)) == PROBE

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without BOS and EOS.

        A special token that is spelled in the text, such as "<s>", is encoded as ordinary text.

        Raises:
            UnicodeEncodeError: The text has lone surrogates.
        """
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Return what `encode` does as an array: int32 [tokens]."""
        return self._backend.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. BOS and EOS have no text."""
        return self._backend.decode([int(i) for i in ids])

    def save(self, folder: Path) -> str:
        """Write the tokenizer into `folder`, and return the name under which Tokenizer(folder / name) opens it."""
        return self._backend.save(folder)


def _open_backend(name: str) -> "_SentencePiece | _HuggingFace":
    """Return the backend of the tokenizer that `Tokenizer` calls `name`."""
    if name == MISTRAL_V1:
        spec = importlib.util.find_spec("mistral_common")
        if not spec:
            install = "In the repository, run: pip install -c constraints.txt -e '.[mistral]'"
            raise ValueError(f"{name} needs the package mistral-common, which is not installed. {install}")
        return _SentencePiece(Path(spec.origin).parent / "data" / "tokenizer.model.v1")
    path = Path(name)
    if path.is_file():
        return _SentencePiece(path)
    # transformers would convert a bare tokenizer.model, to ids that differ from SentencePiece's at a double space.
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        return _SentencePiece(path / "tokenizer.model")
    if not path.is_dir() and (name.endswith(".model") or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"{name} does not exist. Name a .model file, a folder, or a Hugging Face tokenizer.")
    return _HuggingFace(name)


# ------------------------------------------------------------------------------------------------ cutting long texts


def split_text(text: str, size: int, max_search: int, can_cut: Callable[[str, int], bool]) -> Iterator[str]:
    """Yield `text` in pieces of `size` characters or more, each of which ends at the first place that `can_cut` allows.

    Where there is none within `max_search` characters, the text is cut all the same, so that memory is bounded.
    """
    start = 0
    while len(text) - start > size:
        places = range(start + size, min(start + size + max_search, len(text)))
        end = next((place for place in places if can_cut(text, place)), places.stop)
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]


def is_word_end(text: str, place: int) -> bool:
    """Return whether a word ends directly before text[place]."""
    return text[place] in " \n" and not text[place - 1].isspace()


# ---------------------------------------------------------------------------------------------------- SentencePiece


class _SentencePiece:
    """A SentencePiece model.

    Models of `train_sentencepiece` return every text unchanged. Others may add a leading space or normalize: their text
    is as faithful as they were trained to be, and their ids are those of SentencePiece.
    """

    SIZE = 4096  # characters of a piece
    MAX_SEARCH = 2**20
    PIECES_PER_CALL = 256

    def __init__(self, path: Path):
        self.model = path.read_bytes()
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as error:
            advice = "For a Hugging Face tokenizer, use its folder or its name."
            raise ValueError(f"{path} is not a SentencePiece model. {advice}") from error
        processor = self.processor
        self.fingerprint = hashlib.sha256(self.model).hexdigest()
        self.vocab_size = processor.get_piece_size()
        self.bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
        self.eos_id = processor.eos_id() if processor.eos_id() >= 0 else None
        adds_space = processor.encode("a", out_type=str)[0].startswith(SPACE_MARK)
        self._mark_ids = None if adds_space else self._find_mark_ids()
        # A prefix for each piece of a text but the first, so that SentencePiece adds no space there.
        self._prefix = "\n" if adds_space else ""
        prefix_ids = processor.encode(self._prefix)
        self._prefix_tokens = len(prefix_ids)
        self._pairs = set()  # of characters that are neighbours in a token
        for i in range(self.vocab_size):
            if not processor.is_byte(i):
                self._pairs |= {a + b for a, b in pairwise(processor.id_to_piece(i))}
        normalized = processor.normalize(PROBE).removeprefix(SPACE_MARK if adds_space else "")
        keeps_text = normalized == PROBE.replace(" ", SPACE_MARK)
        prefix_is_byte = not prefix_ids or processor.is_byte(prefix_ids[-1])
        self._can_cut = self._is_between_tokens if keeps_text and prefix_is_byte else is_word_end

    def encode(self, text: str) -> np.ndarray:
        if self._mark_ids is None or SPACE_MARK not in text:
            return self._encode_pieces(text)
        parts = []
        for part in text.split(SPACE_MARK):
            parts += [self._mark_ids, self._encode_pieces(part)]
        return np.concatenate(parts[1:])

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def save(self, folder: Path) -> str:
        with atomic_write(folder / "tokenizer.model") as file:
            file.write(self.model)
        return "tokenizer.model"

    def _encode_pieces(self, text: str) -> np.ndarray:
        """Return the ids of a text without U+2581, encoded in pieces: int32 [tokens]."""
        pieces = split_text(text, self.SIZE, self.MAX_SEARCH, self._can_cut)
        ids = [np.array(self.processor.encode(next(pieces)), dtype=np.int32)]
        while group := [self._prefix + piece for piece in islice(pieces, self.PIECES_PER_CALL)]:
            for encoded in self.processor.encode(group, num_threads=1):
                ids.append(np.array(encoded[self._prefix_tokens :], dtype=np.int32))
        return np.concatenate(ids)

    def _is_between_tokens(self, text: str, place: int) -> bool:
        """Return whether no token contains both text[place - 1] and text[place]."""
        # A token contains only pairs of characters that are neighbours in a piece of the vocabulary.
        return text[place - 1 : place + 1].replace(" ", SPACE_MARK) not in self._pairs

    def _find_mark_ids(self) -> np.ndarray | None:
        """Return the byte pieces of U+2581, or None if the model has no byte pieces.

        SentencePiece decodes a U+2581 of the text as a space. Encoded as bytes it survives, if the model does not add
        a space before each part that is encoded by itself.
        """
        ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        return np.array(ids, dtype=np.int32) if all(self.processor.is_byte(i) for i in ids) else None


# ----------------------------------------------------------------------------------------------------- Hugging Face


class _HuggingFace:
    """A fast tokenizer of transformers, loaded from a folder or by name."""

    SIZE = 2**18  # characters of a piece
    MAX_SEARCH = 2**12
    CONTEXT = 200  # characters on each side of a cut that decide whether a token reaches across

    def __init__(self, name: str):
        from transformers import AutoTokenizer  # takes seconds

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{name} is not a tokenizer that transformers can load ({reason})") from error
        if not self._tokenizer.is_fast:
            raise ValueError(f"{name} has no tokenizer.json. Save it with transformers' fast tokenizer first.")
        self.backend = self._tokenizer.backend_tokenizer
        # A tokenizer.json may have a length limit, and would find special tokens in any text.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        self.fingerprint = hashlib.sha256(self.backend.to_str().encode()).hexdigest()
        self.vocab_size = len(self._tokenizer)
        tokens = self._tokenizer
        self.bos_id = tokens.cls_token_id if tokens.bos_token_id is None else tokens.bos_token_id
        self.eos_id = tokens.sep_token_id if tokens.eos_token_id is None else tokens.eos_token_id

    def encode(self, text: str) -> np.ndarray:
        text.encode()  # Raises for lone surrogates, which would become replacement characters.
        pieces = split_text(text, self.SIZE, self.MAX_SEARCH, self._is_between_tokens)
        return np.concatenate([np.array(self._encode_piece(piece), dtype=np.int32) for piece in pieces])

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, folder: Path) -> str:
        self._tokenizer.save_pretrained(folder / "tokenizer")
        return "tokenizer"

    def _encode_piece(self, text: str) -> list[int]:
        """Return the ids of a text that is encoded at once."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def _is_between_tokens(self, text: str, place: int) -> bool:
        """Return whether the text near `place` has the same tokens when it is cut there."""
        if not is_word_end(text, place):
            return False
        left = text[place - self.CONTEXT : place]
        right = text[place : place + self.CONTEXT]
        return self._encode_piece(left + right) == self._encode_piece(left) + self._encode_piece(right)
