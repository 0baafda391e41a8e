"""The format of a prepared set, and how it is read: streams of tokens in memory-mapped shards.

    tokenizer.model | tokenizer/       a SentencePiece model, or a folder with a Hugging Face tokenizer
    SPLIT/SOURCE/00000.npy             token ids, uint16 or uint32: documents end to end, each with its BOS and EOS
    SPLIT/SOURCE/00000.docs.npy        int64 [documents + 1]: document i is shard[docs[i] : docs[i + 1]]
    SPLIT/SOURCE/00000.crc32           uint32: checksums of the blocks of 00000.npy, then of 00000.docs.npy
    inputs.jsonl                       the input files, in order: bytes, time, SHA-256, documents
    skipped.jsonl                      every record without a document: file, line, reason
    manifest.json                      settings, counts, and the size and SHA-256 of every file

SPLIT is train, validation or test. A document never spans two shards. A shard is complete once it is renamed to its
final name, and never changes: text that is added to a set goes to new shards. The manifest is replaced as shards are
completed, so training can begin before preparation ends.
"""

import hashlib
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from glalm.config.strict import ConfigError
from glalm.data.checksums import BLOCK, CheckedArray
from glalm.data.files import DamagedFile, file_sha256, find_mismatch, open_utf8_name, read_json

FORMAT = "glalm-tokens"
VERSION = 3
MANIFEST = "manifest.json"
PLAN = ".plan.json"  # This file exists while a set is being prepared.
SPLITS = ("train", "validation", "test")

# What reading a set needs of its manifest, as a shape of `read_json`.
_FILE = {"file": str, "bytes": int, "sha256": str}
_SHARD = {"tokens": int, "documents": int, "files": {"tokens": _FILE, "documents": _FILE, "checksums": _FILE}}
_SPLIT = {"tokens": int, "documents": int, "sources": {str: {"tokens": int, "shards": [_SHARD]}}}
_TOKENIZER = {"name": str, "fingerprint": str, "vocab_size": int, "bos_id": int, "eos_id": int, "files": [_FILE]}
MANIFEST_SHAPE = {
    "format": str,
    "version": int,
    "complete": bool,
    "fingerprint": str,
    "tokenizer": _TOKENIZER,
    "dtype": {"uint16", "uint32"},
    "splits": dict.fromkeys(SPLITS, _SPLIT),
}


class TokenSet:
    """One split of a prepared set: the streams of its sources, one after the other, sorted by name.

    Opening a set checks sizes, shapes and dtypes against the manifest, and verifies the tokenizer. Reading verifies the
    blocks that it reads, the first time. `verify_checksums` reads and verifies every byte.

    Args:
        folder: The folder of the set.
        split: One of SPLITS.
        manifest: An earlier manifest of the set, to read only what was complete then. Its shards must be unchanged.

    Attributes:
        source_tokens: {source: its number of tokens}, in the order of the stream.
        fingerprint: The SHA-256 of the settings and the sources with which the preparation of the set began.
        sha256: That of the content of the split, as `split_sha256` returns it.

    Raises:
        FileNotFoundError: A file is missing.
        OSError: A file cannot be read.
        ValueError: A file does not match the manifest.
    """

    def __init__(self, folder: str | os.PathLike, split: str, manifest: dict | None = None):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown. A set has the splits {', '.join(SPLITS)}.")
        self.folder = Path(folder)
        self.split = split
        current = read_manifest(self.folder)
        self.manifest: dict = manifest or current
        tokenizer = self.manifest["tokenizer"]
        entry = self.manifest["splits"][split]
        self.vocab_size: int = tokenizer["vocab_size"]
        self.bos_id: int = tokenizer["bos_id"]
        self.eos_id: int = tokenizer["eos_id"]
        self.fingerprint: str = self.manifest["fingerprint"]
        self.sha256: str = split_sha256(self.manifest, split)
        self.tokenizer_fingerprint: str = tokenizer["fingerprint"]
        self.tokenizer_path: Path = self.folder / tokenizer["name"]
        self.is_complete: bool = self.manifest["complete"]
        self.num_tokens: int = entry["tokens"]
        self.num_documents: int = entry["documents"]
        self.source_tokens: dict[str, int] = {name: source["tokens"] for name, source in entry["sources"].items()}

        self._advice = _advise_overwrite(self.folder)
        self._files = list_files(entry)
        if manifest:
            self._check_unchanged(current["splits"][split])
        self._open_files()

    def read_tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of the stream: [stop - start], a read-only view if one shard holds them all."""
        parts = [self._shards[i].read_range(begin, end) for i, begin, end in self._locate_range(start, stop)]
        if not parts:
            return np.empty(0, dtype=self.manifest["dtype"])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Return those of the positions [start, stop) of the stream at which a document begins: int64, increasing."""
        found = [np.empty(0, dtype=np.int64)]
        for i, begin, end in self._locate_range(start, stop):
            borders = self._borders[i].read_range(0, len(self._borders[i]))
            first, after_last = np.searchsorted(borders[:-1], (begin, end))
            found.append(borders[first:after_last] + self._first_token[i])
        return np.concatenate(found)

    def read_document(self, i: int) -> np.ndarray:
        """Return the tokens of document i, with its BOS and EOS."""
        if not 0 <= i < self.num_documents:
            raise ValueError(f"document {i}: {self.split} has documents [0, {self.num_documents})")
        shard = int(np.searchsorted(self._first_document, i, side="right")) - 1
        i -= self._first_document[shard]
        start, stop = self._borders[shard].read_range(i, i + 2)
        return self._shards[shard].read_range(start, stop)

    @property
    def document_lengths(self) -> np.ndarray:
        """The tokens of each document, with its BOS and EOS: int64 [num_documents]."""
        lengths = [np.diff(borders.read_range(0, len(borders))) for borders in self._borders]
        return np.concatenate([np.empty(0, np.int64), *lengths])

    @property
    def text_bytes(self) -> int:
        """The bytes of the documents' texts, as they were before they were tokenized."""
        sources = self.manifest["splits"][self.split]["sources"].values()
        return sum(shard["text_bytes"] for source in sources for shard in source["shards"])

    def verify_checksums(self) -> None:
        """Read the tokenizer and every file of the split. Raises ValueError for the first with another SHA-256."""
        for file in [*self.manifest["tokenizer"]["files"], *self._files]:
            self._verify_file(file)

    def _locate_range(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield where tokens [start, stop) lie: the index of a shard, and start and stop within it."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens [{start}, {stop}): {self.split} has tokens [0, {self.num_tokens})")
        i = int(np.searchsorted(self._first_token, start, side="right")) - 1
        while start < stop:
            offset = int(self._first_token[i])
            end = int(self._first_token[i + 1])
            yield i, start - offset, min(stop, end) - offset
            start = end
            i += 1

    def _open_files(self) -> None:
        """Verify the tokenizer, and map the shards of the split into memory."""
        files = self.manifest["tokenizer"]["files"]
        if not files:
            raise DamagedFile(f"{self.folder / MANIFEST} lists no file of the tokenizer. {self._advice}")
        for file in files:
            self._verify_file(file)
        sources = self.manifest["splits"][self.split]["sources"].values()
        shards = list(chain.from_iterable(source["shards"] for source in sources))
        self._shards = [self._map_array(s, "tokens", s["tokens"], self.manifest["dtype"]) for s in shards]
        # The borders of a shard are the positions in it at which its documents begin and end.
        self._borders = [self._map_array(s, "documents", s["documents"] + 1, "int64") for s in shards]
        self._first_token = np.cumsum([0, *map(len, self._shards)])
        self._first_document = np.cumsum([0, *(len(borders) - 1 for borders in self._borders)])
        if (self._first_token[-1], self._first_document[-1]) != (self.num_tokens, self.num_documents):
            path = self.folder / MANIFEST
            raise ValueError(f"{path}: the shards of {self.split} do not add up to its counts. {self._advice}")

    def _check_unchanged(self, entry: dict) -> None:
        """Raise ValueError unless the current manifest's `entry` of this split lists all files of this TokenSet."""
        found = {file["file"]: file for file in list_files(entry)}
        for file in self._files:
            if found.get(file["file"]) != file:
                changed = f"{self.folder / file['file']} has changed since the run began: the set was prepared again."
                raise ValueError(f"{changed} Prepare it as it was, or begin another run.")

    def _map_array(self, shard: dict, name: str, length: int, dtype: str) -> CheckedArray:
        """Map the array in one of the shard's .npy files into memory."""
        import torch  # The processes that tokenize import this module, and do not need it.

        path = self._find_file(shard["files"][name])
        try:
            with open(path, "rb") as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError("another version of .npy")
                shape, _, found = np.lib.format.read_array_header_1_0(file)
                header = file.tell()
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}). {self._advice}") from error
        if shape != (length,) or found != dtype:
            raise ValueError(f"{path} holds {found}{list(shape)}, not {dtype}[{length}]. {self._advice}")
        # numpy.memmap would hold a file descriptor for each shard, and a large set has thousands.
        with open_utf8_name(path) as utf8_name:
            content = torch.from_file(utf8_name, shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
        content.flags.writeable = False
        sums = np.fromfile(self._find_file(shard["files"]["checksums"]), dtype="<u4")
        token_blocks = -(-shard["files"]["tokens"]["bytes"] // BLOCK)
        sums = sums[:token_blocks] if name == "tokens" else sums[token_blocks:]
        return CheckedArray(path, content, header, dtype, sums)

    def _verify_file(self, entry: dict) -> None:
        """Raise ValueError if a file that the manifest lists has another SHA-256."""
        path = self._find_file(entry)
        if file_sha256(path) != entry["sha256"]:
            raise ValueError(f"{path} is damaged or another file: its SHA-256 is not the manifest's. {self._advice}")

    def _find_file(self, entry: dict) -> Path:
        """Return the path of a file that the manifest lists. Raises if it is missing or has another size."""
        path = self.folder / entry["file"]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, so the set is incomplete. {self._advice}")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{path} has {size} bytes, not the manifest's {entry['bytes']}. {self._advice}")
        return path


def read_manifest(folder: Path, any_version: bool = False) -> dict:
    """Return the manifest of a set.

    Args:
        any_version: Accept a set of an older or newer format.

    Raises:
        FileNotFoundError: There is no manifest.
        DamagedFile: It cannot be read, or lacks an entry.
        ValueError: It is of another format.
    """
    path = folder / MANIFEST
    advice = _advise_overwrite(folder)
    try:
        manifest = read_json(path, {"format": str, "version": int})
        name = manifest["format"]
        version = manifest["version"]
        if name != FORMAT or not (version == VERSION or any_version):
            raise ValueError(f"{path} has format {name} {version}, not {FORMAT} {VERSION}. {advice}")
        if version == VERSION and (mismatch := find_mismatch(manifest, MANIFEST_SHAPE)):
            raise DamagedFile(f"{path} is damaged: {mismatch}")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing. {_explain_missing_manifest(folder)}") from error
    except DamagedFile as error:
        raise DamagedFile(f"{error}. {advice}") from error
    return manifest


def require_set(argument: str, folder: Path) -> None:
    """Raise ConfigError, beginning with what the user wrote for `folder`, if that has no manifest of a set."""
    try:
        read_manifest(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{argument}: {error}") from error


def select_manifest(folder: Path, recorded: dict | None) -> dict:
    """Return the manifest with which a run, or its model, reads the set in `folder`.

    This is `recorded`, the manifest that the training run saved, if the set still has its fingerprint and tokenizer: a
    resumed run reads the same tokens after sources were added. Otherwise it is the current manifest, because the caller
    may have chosen another set. Raises what `read_manifest` raises.
    """
    current = read_manifest(folder)
    if recorded and all(current[key] == recorded[key] for key in ("fingerprint", "tokenizer")):
        return recorded
    return current


def split_sha256(manifest: dict, split: str) -> str:
    """Return a checksum of the content of a split: of its tokenizer and its shards, wherever they lie."""
    checksums = [entry["sha256"] for entry in list_files(manifest["splits"][split])]
    return hashlib.sha256("".join([manifest["tokenizer"]["fingerprint"], *checksums]).encode()).hexdigest()


def count_leftover_tokens(tokens: int, length: int) -> int:
    """Return how many tokens at the end of a stream fill no window of `length`; see glalm.data.loader.Windows."""
    return (tokens - 1) % length if tokens > length else tokens


def list_files(split: dict) -> list[dict]:
    """Return the entries of all files of a split in the manifest, those of the first shards first."""
    files = []
    for source in split["sources"].values():
        for shard in source["shards"]:
            files += shard["files"].values()
    return files


def _explain_missing_manifest(folder: Path) -> str:
    """Return what to type in order to have a manifest in `folder`."""
    if (folder / PLAN).exists():
        return "The set is unfinished. To resume, rerun the command that started it."
    has_shards = any(folder.glob("train/*/*.npy"))
    if folder.is_file() or (any(folder.glob("*")) and not has_shards):
        command = f"glalm prepare --out SET {folder}"
        return f"{folder} is not a prepared set. If it is text, prepare it into another folder: {command}"
    # The folder is empty, or has shards without a manifest, which this command replaces.
    return f"To prepare a set, run: glalm prepare --out {folder} SOURCE"


def _advise_overwrite(folder: Path) -> str:
    """Return how to replace a damaged set."""
    return f"To prepare the set again, run: glalm prepare --out {folder} --overwrite SOURCE"
