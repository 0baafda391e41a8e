"""The format of a prepared set, written and read: one flat token stream a split, in memory-mapped shards.

    tokenizer.model
    {train,validation,test}/00000.npy       token ids, uint16 or uint32: [bos] document [eos] [bos] document ...
    {train,validation,test}/00000.docs.npy  int64 [documents + 1]: document i is shard[docs[i] : docs[i + 1]]
    manifest.json                           counts, settings, the size and sha256 of every file

A document never spans two shards. Each file is written beside and then renamed, the manifest last: a folder
without manifest is not complete.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

FORMAT = "glalm-tokens"
VERSION = 1
SPLITS = ("train", "validation", "test")


class TokenSet:
    """One split of a prepared set.

    folder: where the set is. split: one of SPLITS.
    Opening checks sizes, shapes and dtypes against the manifest; `verify` reads and checks every byte.
    Raises FileNotFoundError for a file that is missing, ValueError for one that is not what the manifest says.
    """

    def __init__(self, folder: str | os.PathLike, split: str):
        self.folder, self.split = Path(folder), split
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: a set has the splits {', '.join(SPLITS)}")
        self.manifest: dict = self._read_manifest()
        tokenizer, entry = self.manifest["tokenizer"], self.manifest["splits"][split]
        self.vocab_size: int = tokenizer["vocab_size"]
        self.bos_id: int = tokenizer["bos_id"]
        self.eos_id: int = tokenizer["eos_id"]
        self.fingerprint: str = self.manifest["fingerprint"]  # of the sources and settings it was prepared from
        self.tokenizer_fingerprint: str = tokenizer["sha256"]
        self.tokenizer_path: Path = self._find(tokenizer["file"])
        self.num_tokens: int = entry["tokens"]
        self.num_documents: int = entry["documents"]
        self.text_bytes: int = entry["text_bytes"]

        self._shards, self._borders = [], []  # of each shard: token ids; where its documents begin and end
        for shard in entry["shards"]:
            files = shard["files"]
            self._shards.append(self._map(files["tokens"], shard["tokens"], self.manifest["dtype"]))
            self._borders.append(self._map(files["documents"], shard["documents"] + 1, "int64"))
        self._first_token = np.cumsum([0, *map(len, self._shards)])
        self._first_document = np.cumsum([0, *(len(borders) - 1 for borders in self._borders)])
        if (self._first_token[-1], self._first_document[-1]) != (self.num_tokens, self.num_documents):
            path = self.folder / "manifest.json"
            raise ValueError(f"{path}: the shards of {split} do not add up; {self._advice()}")

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream: [stop - start]; a read-only view where one shard holds them all."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens [{start}, {stop}): {self.split} has tokens [0, {self.num_tokens})")
        first = int(np.searchsorted(self._first_token, start, side="right")) - 1
        parts = []
        for shard, offset in zip(self._shards[first:], self._first_token[first:], strict=False):
            if offset >= stop:
                break
            parts.append(shard[max(start - offset, 0) : stop - offset])
        if not parts:
            return np.empty(0, dtype=self.manifest["dtype"])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i, bos and eos included."""
        if not 0 <= i < self.num_documents:
            raise ValueError(f"document {i}: {self.split} has documents [0, {self.num_documents})")
        shard = int(np.searchsorted(self._first_document, i, side="right")) - 1
        i -= self._first_document[shard]
        return self._shards[shard][self._borders[shard][i] : self._borders[shard][i + 1]]

    @property
    def document_lengths(self) -> np.ndarray:
        """int64 [num_documents]: tokens of each document, bos and eos included."""
        return np.concatenate([np.empty(0, np.int64), *map(np.diff, self._borders)])

    def verify(self) -> None:
        """Read the tokenizer and every file of the split; ValueError for the first with another sha256."""
        shards = self.manifest["splits"][self.split]["shards"]
        for file in [self.manifest["tokenizer"], *(file for s in shards for file in s["files"].values())]:
            path = self._find(file["file"])
            if _sha256(path) != file["sha256"]:
                raise ValueError(f"{path}: damaged, its sha256 is not that of the manifest; {self._advice()}")

    def _read_manifest(self) -> dict:
        path = self._find("manifest.json")
        try:
            manifest = json.loads(path.read_bytes())
            found = (manifest.get("format"), manifest.get("version"))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: damaged ({error}); {self._advice()}") from error
        if found != (FORMAT, VERSION):
            raise ValueError(f"{path}: has format {found}, not {(FORMAT, VERSION)}; {self._advice()}")
        return manifest

    def _map(self, file: dict, length: int, dtype: str) -> np.ndarray:
        path = self._find(file["file"])
        if (size := path.stat().st_size) != file["bytes"]:
            raise ValueError(f"{path}: {size} bytes, the manifest says {file['bytes']}; {self._advice()}")
        try:
            array = np.load(path, mmap_mode="r")
        except ValueError as error:
            raise ValueError(f"{path}: damaged ({error}); {self._advice()}") from error
        if array.shape != (length,) or array.dtype != dtype:
            expected, found = f"{dtype}[{length}]", f"{array.dtype}{list(array.shape)}"
            raise ValueError(f"{path}: {found}, the manifest says {expected}; {self._advice()}")
        return np.asarray(array)

    def _find(self, file: str) -> Path:
        path = self.folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: no complete set of tokens; {self._advice()}")
        return path

    def _advice(self) -> str:
        return f"run: python scripts/prepare_data.py --out {self.folder} --overwrite SOURCE"


class ShardWriter:
    """Writes the documents of one split into the shards `folder`/00000.npy, ...

    A shard ends before it would hold more than `shard_tokens`; a longer document has a shard to itself.
    """

    def __init__(self, folder: Path, dtype: str, shard_tokens: int):
        self.folder, self.dtype, self.shard_tokens = folder, np.dtype(dtype), shard_tokens
        self.shards: list[dict] = []
        self._file: IO[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, ids: list[int], text_bytes: int) -> None:
        """Append a document of `ids`, made of `text_bytes` bytes of text."""
        if self._file and self._borders[-1] + len(ids) > self.shard_tokens:
            self._finish_shard()
        if not self._file:
            self._path = self.folder / f"{len(self.shards):05d}.npy"
            self._file = open(_beside(self._path), "wb")  # noqa: SIM115 (it stays open across calls)
            self._write_header(0)
            self._borders, self._text_bytes = [0], 0
        self._file.write(np.array(ids, dtype=self.dtype))
        self._borders.append(self._borders[-1] + len(ids))
        self._text_bytes += text_bytes

    def close(self) -> dict:
        """Finish the last shard and return the manifest's entry for this split."""
        if self._file:
            self._finish_shard()
        totals = {key: sum(s[key] for s in self.shards) for key in ("documents", "tokens", "text_bytes")}
        return {**totals, "shards": self.shards}

    def _finish_shard(self) -> None:
        self._file.seek(0)
        self._write_header(self._borders[-1])
        _publish(self._file, self._path)
        self._file = None
        borders_path = self._path.with_suffix(".docs.npy")
        with replacing(borders_path) as file:
            np.save(file, np.array(self._borders, dtype=np.int64))
        counts = {
            "documents": len(self._borders) - 1,
            "tokens": self._borders[-1],
            "text_bytes": self._text_bytes,
        }
        files = {"tokens": _describe(self._path), "documents": _describe(borders_path)}
        self.shards.append({**counts, "files": files})

    def _write_header(self, tokens: int) -> None:
        # numpy pads this header to one size whatever the length, so that the final one fits in its place.
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (tokens,)}
        np.lib.format.write_array_header_1_0(self._file, header)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when it is complete and on disk."""
    with open(_beside(path), "wb") as file:
        yield file
        _publish(file, path)


def _publish(file: IO[bytes], path: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _describe(path: Path) -> dict:
    return {"file": f"{path.parent.name}/{path.name}", "bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
