"""Measure how fast text is prepared, compared to the bare tokenizer and by many processes, and how batches are read.

python benchmarks/bench_data.py prepare --tokenizer mistral-v1 FILE...  speed of preparation per core over the tokenizer
python benchmarks/bench_data.py scale --tokenizer mistral-v1           preparation by 1, 2, 4, 8 and 16 processes
python benchmarks/bench_data.py load --workers 1 2 4                   tokens per second from shards in the page cache
"""

import argparse
import json
import os
import resource
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

# glalm.data.loader is imported where it is used: it imports torch, and every worker process imports this file anew.
from glalm.data.checksums import block_sums
from glalm.data.files import file_sha256
from glalm.data.order import Order
from glalm.data.shards import FORMAT, SPLITS, VERSION, TokenSet
from glalm.data.tokenizer import Tokenizer
from glalm.prepare.input_files import read_batches
from glalm.prepare.pipeline import prepare_data
from glalm.prepare.records import Document, parse_records
from glalm.prepare.sources import parse_source

if TYPE_CHECKING:
    from glalm.data.loader import Windows

NEEDED = 50 * 250_000  # tokens per second: 50 times what a 340M model consumes on one H200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    mode = modes.add_parser("prepare")
    mode.add_argument("files", nargs="+")
    mode.add_argument("--tokenizer", default="mistral-v1")
    mode.add_argument("--workers", type=int, default=1)
    mode.add_argument("--repeat", type=int, default=3)
    mode = modes.add_parser("scale")
    mode.add_argument("files", nargs="*", default=["stdlib"], help="repeated to the size (default: stdlib)")
    mode.add_argument("--tokenizer", default="mistral-v1")
    mode.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    mode.add_argument("--megabytes", type=int, default=100, help="of text for each process")
    mode.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    mode = modes.add_parser("load")
    mode.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    mode.add_argument("--tokens", type=int, default=2**28)
    mode.add_argument("--seq-len", type=int, default=2048)
    mode.add_argument("--batch-size", type=int, default=256)
    mode.add_argument("--seconds", type=float, default=5)
    args = parser.parse_args()
    {"prepare": bench_prepare, "scale": bench_scaling, "load": bench_load}[args.mode](args)


def bench_prepare(args: argparse.Namespace) -> None:
    """Compare the CPU time of preparation (reading, decompression, JSON, hashing, tokenising, writing) to that of the
    tokenizer's own batch encoding of the same documents in one thread. Both are the best of measurements in turns."""
    texts = []
    for spec in args.files:
        for batch in read_batches(list(parse_source(spec).inputs), ["text"]):
            texts += [document.text for document in parse_records(batch.records, batch.first, "text", None)]
    encode = bare_encoder(Tokenizer(args.tokenizer))
    bare = []
    ours = []
    wall = []
    for _ in range(args.repeat):
        start = cpu_seconds()
        tokens = sum(map(len, encode(texts)))
        bare.append(cpu_seconds() - start)
        with tempfile.TemporaryDirectory() as folder:
            start = cpu_seconds()
            clock = time.perf_counter()
            given = {"tokenizer": args.tokenizer, "workers": args.workers, "progress": False}
            manifest = prepare_data(args.files, Path(folder) / "set", **given)
            ours.append(cpu_seconds() - start)
            wall.append(time.perf_counter() - clock)
    written = sum(entry["tokens"] for entry in manifest["splits"].values())
    print(f"{len(texts):,} documents, {tokens:,} tokens, {args.workers} workers")
    print(f"bare tokenizer   {tokens / min(bare):>12,.0f} tokens/s per core")
    total = f"{written / min(wall):,.0f} tokens/s in total"
    print(f"preparation      {written / min(ours):>12,.0f} tokens/s per core, {total}")
    print(f"per-core ratio   {written / min(ours) / (tokens / min(bare)):>12.2f}   (goal: 0.85)")


def bench_scaling(args: argparse.Namespace) -> None:
    """Prepare text in proportion to the number of processes, each number once, with the processes' start."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        text = Path(folder) / "text"
        files = write_text(args.files, text, args.megabytes * 10**6, max(args.workers))
        print(f"{args.megabytes} MB for each process, {os.cpu_count()} cores, {args.tokenizer}")
        print(f"{'processes':>9}{'tokens/s':>14}{'seconds':>10}{'of linear':>11}{'CPU of the writer':>19}")
        rates = {}
        for workers in args.workers:
            start = time.perf_counter()
            writer_start = time.process_time()
            options = {"tokenizer": args.tokenizer, "workers": workers, "progress": False, "overwrite": True}
            manifest = prepare_data(files[:workers], Path(folder) / "set", **options)
            seconds = time.perf_counter() - start
            writer_share = (time.process_time() - writer_start) / seconds
            rates[workers] = sum(entry["tokens"] for entry in manifest["splits"].values()) / seconds
            linear = rates[workers] / workers / (rates[args.workers[0]] / args.workers[0])
            print(
                f"{workers:>9}{rates[workers]:>14,.0f}{seconds:>10.1f}{linear:>11.2f}{writer_share:>18.0%}", flush=True
            )


def write_text(sources: list[str], folder: Path, size: int, files: int) -> list[Path]:
    """Write .jsonl files of `size` bytes from the documents of `sources`, again and again, 4,000 characters a line."""
    folder.mkdir()
    lines = []
    for spec in sources:
        for batch in read_batches(list(parse_source(spec).inputs), ["text"]):
            for item in parse_records(batch.records, batch.first, "text", None):
                text = item.text if isinstance(item, Document) else ""
                lines += [json.dumps({"text": text[i : i + 4000]}) + "\n" for i in range(0, len(text), 4000)]
    endless = cycle(lines)
    paths = [folder / f"{number}.jsonl" for number in range(files)]
    for path in paths:
        with open(path, "w") as file:
            written = 0
            while written < size:
                written += file.write(next(endless))
    return paths


def bare_encoder(tokenizer: Tokenizer):
    """Return the batch encoding of the tokenizer's library, in one thread."""
    backend = tokenizer._backend
    if hasattr(backend, "processor"):
        return lambda texts: backend.processor.encode(texts, num_threads=1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return lambda texts: [e.ids for e in backend.backend.encode_batch(texts, add_special_tokens=False)]


def cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def bench_load(args: argparse.Namespace) -> None:
    """Read batches as training does, from a set of random tokens in shards that are in the page cache."""
    from glalm.data.loader import Windows

    with tempfile.TemporaryDirectory() as folder:
        windows = Windows(make_random_set(Path(folder), args.tokens), args.seq_len)
        read_all(windows)  # Fill the page cache.
        windows = Windows(TokenSet(folder, "train"), args.seq_len)
        for what in ("first read, which verifies blocks", "second read"):
            print(f"{what:<34} workers=1  {read_all(windows) / 1e6:8.1f}M tokens/s")
        for reset in (False, True):
            windows.reset_state = reset
            for workers in args.workers:
                rate = load_rate(windows, args, workers)
                boundaries = "reset_state" if reset else "ignore"
                print(
                    f"document_boundaries={boundaries:<12} workers={workers}  {rate / 1e6:8.1f}M tokens/s   "
                    f"{rate / NEEDED:6.1f} x the {NEEDED / 1e6}M needed"
                )


def read_all(windows: "Windows") -> float:
    """Read every window once, in random order, in one thread. Return tokens per second."""
    order = np.random.default_rng(0).permutation(len(windows))
    start = time.perf_counter()
    for i in order.tolist():
        windows[i].sum()
    return len(windows) * windows.length / (time.perf_counter() - start)


def load_rate(windows: "Windows", args: argparse.Namespace, workers: int) -> float:
    from glalm.data.loader import training_batches

    stream = training_batches(windows, Order(0, args.batch_size, windows.source_windows), workers=workers)
    next(stream)
    steps = 0
    start = time.perf_counter()
    while time.perf_counter() - start < args.seconds:
        next(stream)
        steps += 1
    seconds = time.perf_counter() - start
    stream.close()
    return steps * args.batch_size * args.seq_len / seconds


def make_random_set(folder: Path, tokens: int, shard: int = 2**26) -> TokenSet:
    """Write a set of random tokens in documents of 1,000 tokens."""
    (folder / "train").mkdir()
    vocabulary = folder / "tokenizer.model"
    vocabulary.touch()
    random = np.random.default_rng(0)
    shards = []
    for number in range(max(tokens // shard, 1)):
        size = min(shard, tokens)
        paths = [folder / f"train/{number:05d}{suffix}.npy" for suffix in ("", ".docs")]
        np.save(paths[0], random.integers(0, 32000, size, dtype=np.uint16))
        np.save(paths[1], np.append(np.arange(0, size, 1000), size))
        paths.append(folder / f"train/{number:05d}.crc32")
        np.concatenate([block_sums(p) for p in paths[:2]]).tofile(paths[2])
        files = [{"file": f"train/{p.name}", "bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in paths]
        counts = {"documents": len(range(0, size, 1000)), "tokens": size, "text_bytes": 0}
        shards.append({**counts, "files": dict(zip(("tokens", "documents", "checksums"), files, strict=True))})
    sums = {key: sum(s[key] for s in shards) for key in ("documents", "tokens", "text_bytes")}
    tokenizer = {
        "name": "tokenizer.model",
        "fingerprint": "",
        "vocab_size": 32000,
        "bos_id": 1,
        "eos_id": 2,
        "files": [{"file": vocabulary.name, "bytes": 0, "sha256": file_sha256(vocabulary)}],
    }
    train = {**sums, "sources": {"random": {**sums, "shards": shards}}}
    empty = dict.fromkeys(sums, 0) | {"sources": {}}
    manifest = {"format": FORMAT, "version": VERSION, "complete": True, "fingerprint": "", "dtype": "uint16"}
    splits = {split: train if split == "train" else empty for split in SPLITS}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "tokenizer": tokenizer, "splits": splits}))
    return TokenSet(folder, "train")


if __name__ == "__main__":
    main()
