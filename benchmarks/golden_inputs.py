"""Small texts in every format that prepare_data.py reads, the same bytes at every call."""

import gzip
import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
WORDS += ["\u00fcber", "\u5317\u4eac", "\U0001f642", "x=1;\n"]  # letters of two, three and four bytes, and code
MODIFIED = 1_700_000_000  # seconds: prepare_data.py records when each input was last modified


def write_inputs(folder: Path) -> None:
    """Write one source of each format below `folder`: text, jsonl, gz, zst, parquet, arrow, python, hub, broken."""
    folder.mkdir()
    _write_text_files(folder / "text", documents=160)
    _write_python_files(folder / "python")
    for name in ("jsonl", "gz", "zst", "parquet", "arrow", "hub", "broken"):
        (folder / name).mkdir()
    lines = _make_json_lines(seed=1, documents=40)
    (folder / "jsonl" / "part.jsonl").write_bytes(lines)
    (folder / "gz" / "part.jsonl.gz").write_bytes(gzip.compress(_make_json_lines(2, 40), mtime=0))
    (folder / "zst" / "part.jsonl.zst").write_bytes(zstandard.compress(_make_json_lines(3, 40)))
    pq.write_table(_make_table(seed=4, documents=40), folder / "parquet" / "part.parquet", row_group_size=16)
    table = _make_table(seed=5, documents=40)
    with pa.OSFile(str(folder / "arrow" / "part.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=16)
    (folder / "hub" / "part-0.jsonl").write_bytes(_make_json_lines(6, 20))
    (folder / "hub" / "part-1.jsonl").write_bytes(_make_json_lines(7, 20))
    (folder / "broken" / "part.jsonl").write_bytes(lines + b'{"text": 3}\n{"text": \n{"no_text": "a"}\n' + lines)
    for path in folder.rglob("*"):
        os.utime(path, (MODIFIED, MODIFIED))


def _make_document(generator: random.Random) -> str:
    """Return a document in which a word often follows the same word, so that a few steps of training lower the loss."""
    position, words = generator.randrange(len(WORDS)), []
    for _ in range(generator.randrange(20, 200)):
        position = (position + generator.choice((1, 1, 1, 5))) % len(WORDS)
        words.append(WORDS[position])
    return " ".join(words)


def _make_json_lines(seed: int, documents: int) -> bytes:
    generator = random.Random(seed)
    rows = [{"text": _make_document(generator), "meta": {"set": f"set{i % 3}"}} for i in range(documents)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _make_table(seed: int, documents: int) -> pa.Table:
    generator = random.Random(seed)
    return pa.table({"id": list(range(documents)), "text": [_make_document(generator) for _ in range(documents)]})


def _write_text_files(folder: Path, documents: int) -> None:
    folder.mkdir()
    generator = random.Random(0)
    for i in range(documents):
        (folder / f"{i:03}.txt").write_text(_make_document(generator))


def _write_python_files(folder: Path) -> None:
    """Write a package with a subfolder and a file that is not source code, as the standard library has them."""
    generator = random.Random(8)
    for name in ("a.py", "b.py", "package/__init__.py", "package/c.py", "package/d.md", "package/image.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        body = "".join(f"def f{i}(x):\n    return x * {generator.randrange(100)}\n\n\n" for i in range(30))
        path.write_text(f'"""Module {name}."""\n\n\n{body}')
