"""The format of a prepared set, and how it is read: token streams in memory-mapped shards.

    tokenizer.model | tokenizer/              a SentencePiece model, or a folder of Hugging Face's
    {train,validation,test}/SOURCE/00000.npy       token ids, uint16 or uint32: documents end to end, each framed
    {train,validation,test}/SOURCE/00000.docs.npy  int64 [documents + 1]: document i is shard[docs[i] : docs[i + 1]]
    {train,validation,test}/SOURCE/00000.crc32     uint32: checksums of the blocks of the first, then of the second
    inputs.jsonl                              the input files, in order: bytes, time, sha256, documents
    skipped.jsonl                             every document that was left out: file, line, reason
    manifest.json                             counts, settings, books, the size and sha256 of every file

A document never spans two shards. A shard is complete when it has its name, and never changes: what is added to a set
comes in more shards. Manifests are replaced as shards are completed, so training can begin before preparation ends.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from glalm.data.checksums import BLOCK, CheckedArray
from glalm.data.files import file_sha256

FORMAT = "glalm-tokens"
VERSION = 3
MANIFEST = "manifest.json"
PLAN = ".plan.json"  # of a set that is being prepared
SPLITS = ("train", "validation", "test")


class TokenSet:
    """One split of a prepared set: the streams of its sources, one after the other, by name.

    folder: where the set is. split: one of SPLITS. manifest: what the set's manifest said earlier, to read what was
    complete then of a set that has grown; its shards must still be the same.
    Opening checks sizes, shapes and dtypes against the manifest; reading checks the blocks that it reads, the first
    time; `verify` reads and checks every byte.
    Raises FileNotFoundError for a file that is missing, ValueError for one that is not what the manifest says, and
    DamagedFile for a block.

    source_tokens: {source: its number of tokens}, in the order of the stream.
    """

    def __init__(self, folder: str | os.PathLike, split: str, manifest: dict | None = None):
        self.folder, self.split = Path(folder), split
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: a set has the splits {', '.join(SPLITS)}")
        current = read_manifest(self.folder)
        self.manifest: dict = manifest or current
        tokenizer, entry = self.manifest["tokenizer"], self.manifest["splits"][split]
        self.vocab_size: int = tokenizer["vocab_size"]
        self.bos_id: int = tokenizer["bos_id"]
        self.eos_id: int = tokenizer["eos_id"]
        self.fingerprint: str = self.manifest["fingerprint"]  # of what it was first made of, and how
        self.tokenizer_fingerprint: str = tokenizer["fingerprint"]
        self.tokenizer_path: Path = self.folder / tokenizer["name"]
        self.is_complete: bool = self.manifest["complete"]
        self.num_tokens: int = entry["tokens"]
        self.num_documents: int = entry["documents"]
        self.text_bytes: int = entry["text_bytes"]
        self.source_tokens: dict[str, int] = {name: e["tokens"] for name, e in entry["sources"].items()}

        for file in tokenizer["files"]:
            _find(self.folder, file["file"])
        shards = [shard for source in entry["sources"].values() for shard in source["shards"]]
        self._files = [file for shard in shards for file in shard["files"].values()]
        if manifest:
            self._check_unchanged(current)
        self._shards = [self._map(s, "tokens", s["tokens"], self.manifest["dtype"]) for s in shards]
        # Of each shard, where its documents begin and end.
        self._borders = [self._map(s, "documents", s["documents"] + 1, "int64") for s in shards]
        self._first_token = np.cumsum([0, *map(len, self._shards)])
        self._first_document = np.cumsum([0, *(len(borders) - 1 for borders in self._borders)])
        if (self._first_token[-1], self._first_document[-1]) != (self.num_tokens, self.num_documents):
            raise ValueError(f"{self.folder / MANIFEST}: the shards of {split} do not add up; {_advice(self.folder)}")

    def read_tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream: [stop - start]; a read-only view where one shard holds them all."""
        parts = [self._shards[i].read(a, b) for i, a, b in self._in_shards(start, stop)]
        if not parts:
            return np.empty(0, dtype=self.manifest["dtype"])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Those of the positions [start, stop) of the stream at which a document begins: int64, rising."""
        found = [np.empty(0, dtype=np.int64)]
        for i, a, b in self._in_shards(start, stop):
            borders = self._borders[i].read(0, len(self._borders[i]))
            first, last = np.searchsorted(borders[:-1], (a, b))
            found.append(borders[first:last] + self._first_token[i])
        return np.concatenate(found)

    def read_document(self, i: int) -> np.ndarray:
        """Tokens of document i, its frame included."""
        if not 0 <= i < self.num_documents:
            raise ValueError(f"document {i}: {self.split} has documents [0, {self.num_documents})")
        shard = int(np.searchsorted(self._first_document, i, side="right")) - 1
        i -= self._first_document[shard]
        return self._shards[shard].read(*self._borders[shard].read(i, i + 2))

    @property
    def document_lengths(self) -> np.ndarray:
        """int64 [num_documents]: tokens of each document, its frame included."""
        return np.concatenate([np.empty(0, np.int64), *(np.diff(b.read(0, len(b))) for b in self._borders)])

    def verify_checksums(self) -> None:
        """Read the tokenizer and every file of the split; ValueError for the first with another sha256."""
        for file in [*self.manifest["tokenizer"]["files"], *self._files]:
            path = _find(self.folder, file["file"])
            if file_sha256(path) != file["sha256"]:
                raise ValueError(f"{path}: damaged, its sha256 is not that of the manifest; {_advice(self.folder)}")

    def _in_shards(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where tokens [start, stop) lie: shard, start and stop in it."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens [{start}, {stop}): {self.split} has tokens [0, {self.num_tokens})")
        i = int(np.searchsorted(self._first_token, start, side="right")) - 1
        while start < stop:
            offset, end = int(self._first_token[i]), int(self._first_token[i + 1])
            yield i, start - offset, min(stop, end) - offset
            start, i = end, i + 1

    def _check_unchanged(self, current: dict) -> None:
        sources = current["splits"][self.split]["sources"].values()
        there = {f["file"]: f for source in sources for shard in source["shards"] for f in shard["files"].values()}
        for file in self._files:
            if there.get(file["file"]) != file:
                raise ValueError(
                    f"{self.folder / file['file']}: is not what it was when the run began: the set was prepared anew; "
                    "prepare it as it was, or begin another run"
                )

    def _map(self, shard: dict, name: str, length: int, dtype: str) -> CheckedArray:
        """The array in one of the shard's .npy files, mapped into memory."""
        import torch  # where it is used: the processes that tokenise have no need of it

        path, size = self._sized(shard["files"][name])
        try:
            with open(path, "rb") as content:
                if np.lib.format.read_magic(content) != (1, 0):
                    raise ValueError("another version of .npy")
                shape, _, found = np.lib.format.read_array_header_1_0(content)
                header = content.tell()
        except ValueError as error:
            raise ValueError(f"{path}: damaged ({error}); {_advice(self.folder)}") from error
        if shape != (length,) or found != dtype:
            expected, got = f"{dtype}[{length}]", f"{found}{list(shape)}"
            raise ValueError(f"{path}: {got}, the manifest says {expected}; {_advice(self.folder)}")
        # numpy's memmap would hold a file descriptor for each shard, and a large set has thousands.
        content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
        content.flags.writeable = False
        sums = np.fromfile(self._sized(shard["files"]["checksums"])[0], dtype="<u4")
        first = -(-shard["files"]["tokens"]["bytes"] // BLOCK)
        return CheckedArray(path, content, header, dtype, sums[:first] if name == "tokens" else sums[first:])

    def _sized(self, file: dict) -> tuple[Path, int]:
        path = _find(self.folder, file["file"])
        if (size := path.stat().st_size) != file["bytes"]:
            raise ValueError(f"{path}: {size} bytes, the manifest says {file['bytes']}; {_advice(self.folder)}")
        return path, size


def read_manifest(folder: Path, any_version: bool = False) -> dict:
    """The manifest of a set. Raises FileNotFoundError without one, ValueError if it is none of ours."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {_instead(folder)}")
    try:
        manifest = json.loads(path.read_bytes())
        found = (manifest.get("format"), manifest.get("version"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error}); {_advice(folder)}") from error
    if found[0] != FORMAT or (found[1] != VERSION and not (any_version and isinstance(found[1], int))):
        raise ValueError(f"{path}: has format {found}, not {(FORMAT, VERSION)}; {_advice(folder)}")
    return manifest


def pinned_manifest(folder: Path, then: dict | None) -> dict:
    """`then`, the manifest that a run has on record, where `folder` still is that set, whatever was added to it since;
    else the one there is now. Raises as read_manifest."""
    now = read_manifest(folder)
    same = then is not None and all(now[key] == then.get(key) for key in ("fingerprint", "tokenizer"))
    return then if same else now


def count_leftover_tokens(tokens: int, length: int) -> int:
    """How many tokens at the end of a stream fill no window (see glalm.data.loader.Windows) of `length`."""
    return (tokens - 1) % length if tokens > length else tokens


def _find(folder: Path, file: str) -> Path:
    path = folder / file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: no complete set of tokens; {_advice(folder)}")
    return path


def _instead(folder: Path) -> str:
    """What `folder` is, which has no manifest, and what to do about it."""
    command = "python scripts/prepare_data.py --out"
    if (folder / PLAN).exists():
        return "the set is not finished; run the command that began it again, it goes on from where it was"
    if folder.is_file() or (any(folder.glob("*")) and not any(folder.glob("train/*/*.npy"))):
        return f"{folder} is no prepared set; if it is text, prepare it into another folder: {command} SET {folder}"
    return f"no complete set of tokens; run: {command} {folder} SOURCE"


def _advice(folder: Path) -> str:
    return f"run: python scripts/prepare_data.py --out {folder} --overwrite SOURCE"
