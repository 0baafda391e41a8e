"""Text to token ids and back: SentencePiece models, Hugging Face tokenizers, and Mistral's first tokenizer.

The ids of a text are those that the tokenizer's own library returns for all of it at once. SentencePiece's byte-pair
encoding is computed in pieces, because merging a book's text at once misses every cache and takes much memory. Its cuts
are proven to leave the ids as they are. Other tokenizers give no such proof, so they encode a text as a whole.
"""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from glalm.data.files import atomic_write, open_utf8_name

SPACE_MARK = "\u2581"  # SentencePiece spells a space with this character
MISTRAL_V1 = "mistral-v1"
PROBE = "  Two  spaces, a\ttab,\r\n\n\u201ccurly\u201d \u6f22\u5b57 e\u0301 \U0001f600 <s></s> x=1;  "


class Tokenizer:
    """A tokenizer, and the tokens with which a document begins and ends.

    Args:
        name: A SentencePiece .model file; a tokenizer.json of the tokenizers library; a folder with one of them; a
            Hugging Face name ("gpt2"); or "mistral-v1", which the package mistral-common ships.
        eos: The token of a Hugging Face tokenizer that ends a document, as a bare tokenizer.json does not say which it
            is. None: the tokenizer's own.

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

    def __init__(self, name: str | os.PathLike, eos: str | None = None):
        self._backend = _find_backend(str(name))
        if eos is not None:
            self._backend.set_eos(eos)
        self.vocab_size: int = self._backend.vocab_size
        self.fingerprint: str = self._backend.fingerprint
        bos = self._backend.bos_id
        eos_id = self._backend.eos_id
        if eos_id is None:
            raise ValueError(f"{name} names no end-of-document (EOS) token. {self._backend.eos_advice()}")
        self.bos_ids: list[int] = [] if bos is None or bos == eos_id else [bos]
        self.eos_ids: list[int] = [eos_id]
        self.bos_id: int = eos_id if bos is None else bos
        self.eos_id: int = eos_id
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


def _find_backend(name: str) -> "_SentencePiece | _HuggingFace":
    """Return the backend of the tokenizer that `Tokenizer` calls `name`."""
    if name == MISTRAL_V1:
        spec = importlib.util.find_spec("mistral_common")
        if spec is None or spec.origin is None:
            install = "In the repository, run: pip install -c constraints.txt -e '.[mistral]'"
            raise ValueError(f"{name} needs the package mistral-common, which is not installed. {install}")
        return _SentencePiece(Path(spec.origin).parent / "data" / "tokenizer.model.v1")
    path = Path(name)
    if path.is_file():
        return _HuggingFace(name) if path.suffix == ".json" else _SentencePiece(path)
    # transformers would convert a bare tokenizer.model, to ids that differ from SentencePiece's at a double space.
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        return _SentencePiece(path / "tokenizer.model")
    if not path.is_dir() and (name.endswith((".model", ".json")) or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"{name} does not exist. Name a .model or .json file, a folder, or a Hugging Face tokenizer."
        )
    return _HuggingFace(name)


# ---------------------------------------------------------------------------------------------------- SentencePiece


class _PieceEncoder(NamedTuple):
    """What encodes a SentencePiece model's normalized text in pieces.

    Attributes:
        processor: The model without its normalizer.
        pairs: The pairs of characters that are neighbours in a token of the vocabulary.
        joins_unknown: Whether neighbouring characters that are not in the vocabulary become one token.
    """

    processor: sentencepiece.SentencePieceProcessor
    pairs: set[str]
    joins_unknown: bool

    def can_cut(self, text: str, place: int) -> bool:
        """Return whether no token contains both text[place - 1] and text[place], whatever surrounds them.

        Byte-pair merging never looks beyond two neighbouring symbols, and a symbol is a part of a token. So where no
        token contains a pair of characters, the text on one side has no influence on the tokens of the other.
        """
        pair = text[place - 1 : place + 1]
        if pair in self.pairs:
            return False
        unknown = self.processor.unk_id()
        return not (self.joins_unknown and all(self.processor.piece_to_id(character) == unknown for character in pair))


class _SentencePiece:
    """A SentencePiece model.

    Models of `train_sentencepiece` return every text unchanged. Others may add a leading space or normalize: their text
    is as faithful as they were trained to be, and their ids are those of SentencePiece.
    """

    SIZE = 4096  # characters of a piece, or more where no cut is possible
    PIECES_PER_CALL = 256

    def __init__(self, path: Path):
        self.model = path.read_bytes()
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as error:
            advice = "For a Hugging Face tokenizer, use its tokenizer.json, its folder or its name."
            raise ValueError(f"{path} is not a SentencePiece model. {advice}") from error
        processor = self.processor
        self.fingerprint = hashlib.sha256(self.model).hexdigest()
        self.vocab_size = processor.get_piece_size()
        self.bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
        self.eos_id = processor.eos_id() if processor.eos_id() >= 0 else None

    def set_eos(self, token: str) -> None:
        raise ValueError(
            "--eos is for Hugging Face tokenizers. A SentencePiece model says itself what ends a document."
        )

    def eos_advice(self) -> str:
        return "Choose a tokenizer that has one."

    def encode(self, text: str) -> np.ndarray:
        if SPACE_MARK not in text or self._mark_ids is None:
            return self._encode_part(text)
        parts = []
        for part in text.split(SPACE_MARK):
            parts += [self._mark_ids, self._encode_part(part)]
        return np.concatenate(parts[1:])

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def save(self, folder: Path) -> str:
        with atomic_write(folder / "tokenizer.model") as file:
            file.write(self.model)
        return "tokenizer.model"

    def _encode_part(self, text: str) -> np.ndarray:
        """Return SentencePiece's ids of a text: int32 [tokens]."""
        if len(text) <= self.SIZE or self._piece_encoder is None:
            return np.array(self.processor.encode(text), dtype=np.int32)
        # Normalizers look at a text's ends and across any cut, so the text is normalized before it is cut.
        normalized = self.processor.normalize(text)
        pieces = split_text(normalized, self.SIZE, self._piece_encoder.can_cut)
        ids = [np.empty(0, np.int32)]
        while group := list(islice(pieces, self.PIECES_PER_CALL)):
            for encoded in self._piece_encoder.processor.encode(group, num_threads=1):
                ids.append(np.array(encoded, dtype=np.int32))
        return np.concatenate(ids)

    @cached_property
    def _piece_encoder(self) -> _PieceEncoder | None:
        """What encodes a normalized text in pieces, or None if the model's ids can depend on the text as a whole."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec, TrainerSpec

        model = self._parse_model()
        # A unigram model adds up the scores of a text in float32, so that rounding decides between likely spellings.
        is_bpe = model.trainer_spec.model_type == TrainerSpec.BPE
        # SentencePiece splits an unused token as it was merged last, anywhere in the text.
        has_unused = any(self.processor.is_unused(i) for i in range(self.vocab_size))
        if not is_bpe or has_unused:
            return None
        identity = NormalizerSpec(
            name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, escape_whitespaces=False
        )
        model = ModelProto(pieces=model.pieces, trainer_spec=model.trainer_spec, normalizer_spec=identity)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        pairs: set[str] = set()
        for i in range(self.vocab_size):
            pairs.update(a + b for a, b in pairwise(processor.id_to_piece(i)))
        return _PieceEncoder(processor, pairs, joins_unknown=not model.trainer_spec.byte_fallback)

    @cached_property
    def _mark_ids(self) -> np.ndarray | None:
        """The byte pieces of U+2581, or None if the model has no byte pieces or changes a text in other ways.

        SentencePiece decodes a U+2581 of the text as a space. Encoded as bytes it survives, if the model neither adds
        nor removes anything at the ends of the parts between, which are encoded by themselves.
        """
        spec = self._parse_model().normalizer_spec
        if spec.add_dummy_prefix or spec.remove_extra_whitespaces or spec.precompiled_charsmap:
            return None
        ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        return np.array(ids, dtype=np.int32) if all(self.processor.is_byte(i) for i in ids) else None

    def _parse_model(self):
        """Return the settings and the vocabulary of the model as a protocol buffer, ModelProto."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # Short texts do without it.

        return ModelProto.FromString(self.model)


def split_text(text: str, size: int, can_cut: Callable[[str, int], bool]) -> Iterator[str]:
    """Yield `text` in pieces of `size` characters or more, each of which ends at the first place that `can_cut` allows.

    A piece that finds no such place extends to the end of the text.
    """
    start = 0
    while len(text) - start > size:
        end = next((place for place in range(start + size, len(text)) if can_cut(text, place)), len(text))
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


# ----------------------------------------------------------------------------------------------------- Hugging Face


class _HuggingFace:
    """A fast tokenizer of transformers, loaded from a tokenizer.json, from a folder or by name.

    Its normalizer, pre-tokenizer, added tokens and model may look at any part of a text, so a text is never cut.
    """

    def __init__(self, name: str):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # takes seconds

        self._tokenizer: Any  # transformers types what it loads by name as a union of two classes.
        try:
            with open_utf8_name(name) as utf8_name:
                if Path(name).is_file():
                    self._tokenizer = PreTrainedTokenizerFast(tokenizer_object=_read_tokenizer_json(utf8_name))
                else:
                    self._tokenizer = AutoTokenizer.from_pretrained(utf8_name, trust_remote_code=False)
        except Exception as error:  # transformers and tokenizers raise many kinds.
            first_line = str(error).strip().partition("\n")[0]
            reason = f"{type(error).__name__}: {first_line}"
            if "custom code" in reason:
                reason += " That is never done here. Without auto_map in tokenizer_config.json, tokenizer.json is read."
            raise ValueError(f"{name} is not a tokenizer that transformers can load ({reason})") from error
        if not self._tokenizer.is_fast:
            raise ValueError(f"{name} has no tokenizer.json. Save it with transformers' fast tokenizer first.")
        self.backend = self._tokenizer.backend_tokenizer
        self._configure_backend()

    def _configure_backend(self) -> None:
        """Set what encoding does, and read the attributes of `Tokenizer`."""
        # A tokenizer.json may have a length limit, and would find special tokens in any text.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        # BPE dropout draws other ids for the same text each time.
        if getattr(self.backend.model, "dropout", None) is not None:
            self.backend.model.dropout = None
        self.fingerprint = hashlib.sha256(self.backend.to_str().encode()).hexdigest()
        tokens = self._tokenizer
        self.vocab_size = 1 + max(tokens.get_vocab().values())  # The ids may have gaps.
        self.bos_id = tokens.cls_token_id if tokens.bos_token_id is None else tokens.bos_token_id
        self.eos_id = tokens.sep_token_id if tokens.eos_token_id is None else tokens.eos_token_id

    def set_eos(self, token: str) -> None:
        if token not in self._tokenizer.get_vocab():
            raise ValueError(f"--eos {token}: the tokenizer has no such token. {self.eos_advice()}")
        self._tokenizer.add_special_tokens({"eos_token": token})
        self._configure_backend()

    def eos_advice(self) -> str:
        special = [token.content for token in self._tokenizer.added_tokens_decoder.values()]
        examples = f" It has {', '.join(special[:8])}." if special else ""
        return f"Name the token that ends a document with --eos TOKEN.{examples}"

    def encode(self, text: str) -> np.ndarray:
        text.encode()  # Raises for lone surrogates, which would become replacement characters.
        # Encoding a batch of one text is faster than `encode`, because it does not compute the tokens' places.
        try:
            [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=False)
        except Exception as error:  # The library raises no other class.
            advice = "Give the tokenizer a token for what is not in its vocabulary (unk_token)."
            raise ValueError(f"the tokenizer cannot encode the text {text[:40]!r}: {error}. {advice}") from error
        return np.array(encoding.ids, dtype=np.int32)

    def decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # It would be a list for a batch of ids.
        return text

    def save(self, folder: Path) -> str:
        with open_utf8_name(folder) as utf8_name:
            self._tokenizer.save_pretrained(Path(utf8_name) / "tokenizer")
        return "tokenizer"


def _read_tokenizer_json(path: str):
    """Return the tokenizers.Tokenizer of a file. Raises ValueError if it is none."""
    from tokenizers import Tokenizer as JsonTokenizer

    try:
        return JsonTokenizer.from_file(path)
    except Exception as error:  # The library raises no other class.
        raise ValueError(error) from error
