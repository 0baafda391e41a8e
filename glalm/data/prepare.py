"""Text to token shards: split by document, tokenise, write; the format is that of glalm.data.shards."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from glalm.data.shards import FORMAT, SPLITS, VERSION, ShardWriter, TokenSet, replacing
from glalm.data.sources import Document, Source, source
from glalm.data.tokenizer import Tokenizer, train_sentencepiece

HELD_OUT: Mapping[str, float] = {"validation": 0.05, "test": 0.1}
OUR_FILES = re.compile(rf"manifest\.json|tokenizer\.model|({'|'.join(SPLITS)})/\d+(\.docs)?\.npy")


def prepare(
    sources: Iterable[Source | str | os.PathLike],
    out: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    vocab_size: int = 2048,
    held_out: Mapping[str, float] = HELD_OUT,
    shard_tokens: int = 2**27,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenise `sources` into the folder `out` and return its manifest.

    sources: Source objects, or what `sources.source` takes: "stdlib", or paths.
    tokenizer: a SentencePiece .model; None trains one of `vocab_size` on the training documents.
    held_out: share of the documents in "validation" and in "test". A document's split depends on its text
        alone: it stays where it is as data is added, and copies of it are never on both sides.
    shard_tokens: a shard ends before it would hold more; a document longer than this has a shard to itself.

    Empty documents are skipped. The same call again returns at once, for it finds its own fingerprint (the
    contents of all source files, and all settings); an unfinished set is begun anew. Raises ValueError if `out`
    holds a set that was prepared otherwise, unless `overwrite` (then it is always written anew), or other files.
    """
    sources = [s if isinstance(s, Source) else source(s) for s in sources]
    out = Path(out)
    _check(sources, held_out, shard_tokens)
    settings = {
        "tokenizer": Tokenizer(tokenizer).fingerprint if tokenizer else {"vocab_size": vocab_size},
        "held_out": {split: float(held_out.get(split, 0)) for split in SPLITS[1:]},
        "shard_tokens": shard_tokens,
    }
    inputs = {"sources": [_describe(s) for s in sources], "settings": settings}
    given = Path(tokenizer).read_bytes() if tokenizer else None  # now, because it may lie in `out`
    if (out / "manifest.json").exists() and not overwrite:
        return _already_prepared(out, inputs)
    _clear(out)

    with _progress_bar(progress) as bar:
        model = _tokenizer(given, vocab_size, sources, held_out, out / "tokenizer.model", bar)
        dtype = "uint16" if model.vocab_size <= 2**16 else "uint32"
        writers = {split: ShardWriter(out / split, dtype, shard_tokens) for split in SPLITS}
        empty = _write(sources, model, held_out, writers, bar)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": _fingerprint(inputs),
        **inputs,
        "tokenizer": _describe_tokenizer(model),
        "dtype": dtype,
        "empty_documents": empty,
        "splits": {split: writer.close() for split, writer in writers.items()},
    }
    with replacing(out / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode())
    return manifest


def split_of(text: str, held_out: Mapping[str, float] = HELD_OUT) -> str:
    """The split of the document `text`: "train", "validation" or "test", by its sha256."""
    point = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    for split in ("test", "validation"):
        point -= held_out.get(split, 0)
        if point < 0:
            return split
    return "train"


def _tokenizer(given: bytes | None, vocab_size: int, sources, held_out, path: Path, bar: Progress) -> Tokenizer:
    if given:
        with replacing(path) as file:
            file.write(given)
        return Tokenizer(path)
    documents = _documents(sources, bar, "reading")
    texts = (doc.text for doc in documents if split_of(doc.text, held_out) == "train")
    return train_sentencepiece(texts, path, vocab_size)


def _write(sources, model: Tokenizer, held_out, writers: Mapping[str, ShardWriter], bar: Progress) -> int:
    """Write all documents; returns how many were skipped because they are empty."""
    tokens = empty = 0
    for doc in _documents(sources, bar, "tokenising"):
        if not doc.text:
            empty += 1
            continue
        ids = [model.bos_id, *model.encode(doc.text), model.eos_id]
        writers[split_of(doc.text, held_out)].add(ids, text_bytes=len(doc.text.encode()))
        tokens += len(ids)
        bar.update(bar.task_ids[-1], tokens=tokens)
    if not tokens:
        raise ValueError(f"no text in {', '.join(s.name for s in sources)}: all documents are empty")
    return empty


def _documents(sources: list[Source], bar: Progress, description: str) -> Iterator[Document]:
    """All documents, with a new line on `bar` that goes by the bytes of the files that were read."""
    total = sum(s.file_bytes(file) for s in sources for file in s.files)
    task = bar.add_task(description, total=total, documents=0, tokens=0)
    documents = 0
    for s in sources:
        for file in s.files:
            for doc in s.read(file):
                yield doc
                documents += 1
                bar.update(task, documents=documents)
            bar.advance(task, s.file_bytes(file))


def _check(sources: list[Source], held_out: Mapping[str, float], shard_tokens: int) -> None:
    if not sources:
        raise ValueError("sources is empty: name 'stdlib' or the path of some text")
    if unknown := set(held_out) - set(SPLITS[1:]):
        raise ValueError(f"held_out: unknown split {min(unknown)!r}; give shares of {' and '.join(SPLITS[1:])}")
    if min(held_out.values(), default=0) < 0 or sum(held_out.values()) >= 1:
        raise ValueError(f"held_out={dict(held_out)}: shares must be 0 or more and leave some for training")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens} must be at least 1")


def _describe(s: Source) -> dict:
    digest = hashlib.sha256()
    for file in s.files:
        with open(s.root / file, "rb") as content:
            digest.update(f"{file}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    size = sum(s.file_bytes(file) for file in s.files)
    return {"name": s.name, "files": len(s.files), "bytes": size, "sha256": digest.hexdigest()}


def _describe_tokenizer(model: Tokenizer) -> dict:
    ids = {"vocab_size": model.vocab_size, "bos_id": model.bos_id, "eos_id": model.eos_id}
    return {"file": model.path.name, "sha256": model.fingerprint, **ids}


def _fingerprint(inputs: dict) -> str:
    # Not the sources' names: a folder that moved holds the same text.
    content = [FORMAT, VERSION, [s["sha256"] for s in inputs["sources"]], inputs["settings"]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _already_prepared(out: Path, inputs: dict) -> dict:
    """The manifest of the set in `out`, if it is complete and was made of these inputs; else ValueError."""
    manifest = {split: TokenSet(out, split) for split in SPLITS}["train"].manifest
    if manifest["fingerprint"] == _fingerprint(inputs):
        return manifest
    old, new = manifest["settings"], inputs["settings"]
    changed = ", ".join(key for key in new if old.get(key) != new[key]) or "sources"
    raise ValueError(
        f"{out} holds a set that was prepared otherwise (different {changed}): "
        "choose another folder, or overwrite it (overwrite=True, --overwrite)"
    )


def _clear(out: Path) -> None:
    """Remove a set, finished or not, from `out`. ValueError, and nothing removed, if other files are there."""
    out.mkdir(parents=True, exist_ok=True)
    ours = []
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix()
        if OUR_FILES.fullmatch(name) or path.match(".*.tmp"):
            ours.append(path)
        elif path.is_file() and not path.name.startswith("."):
            raise ValueError(f"{path} is not part of a prepared set: choose another folder than {out}")
    # The manifest first: from here on the set is not complete.
    for path in sorted(ours, key=lambda path: path.name != "manifest.json"):
        path.unlink()


class _Counts(ProgressColumn):
    def __init__(self):
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        documents, tokens = task.fields["documents"], task.fields["tokens"]
        rate = tokens / task.elapsed if task.elapsed else 0
        shown = f"{documents:,} documents"
        return Text(f"{shown}  {tokens / 1e6:,.1f}M tokens  {rate / 1e6:.2f}M tokens/s" if tokens else shown)


def _progress_bar(enabled: bool) -> Progress:
    time_left = TimeRemainingColumn(elapsed_when_finished=True)
    columns = (TextColumn("{task.description:<10}"), BarColumn(bar_width=10), _Counts(), time_left)
    return Progress(*columns, console=Console(stderr=True), disable=not enabled)
