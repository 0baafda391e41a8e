"""How fast text is prepared, against the bare tokenizer, and how fast batches are read.

python benchmarks/bench_data.py prepare --tokenizer mistral-v1 FILE...  per-core speed of preparation over the tokenizer
python benchmarks/bench_data.py load --workers 1 2 4                   tokens a second from warm shards
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from glalm.data.checksums import block_sums
from glalm.data.files import file_sha256
from glalm.data.loader import Windows, training_batches
from glalm.data.shards import FORMAT, SPLITS, VERSION, TokenSet
from glalm.data.tokenizer import Tokenizer
from glalm.prepare.pipeline import prepare_data
from glalm.prepare.records import extract_document
from glalm.prepare.sources import open_source

NEEDED = 50 * 250_000  # tokens a second: 50 times what a 340M model takes on one H200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    mode = modes.add_parser("prepare")
    mode.add_argument("files", nargs="+")
    mode.add_argument("--tokenizer", default="mistral-v1")
    mode.add_argument("--workers", type=int, default=1)
    mode.add_argument("--repeat", type=int, default=3)
    mode = modes.add_parser("load")
    mode.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    mode.add_argument("--tokens", type=int, default=2**28)
    mode.add_argument("--seq-len", type=int, default=2048)
    mode.add_argument("--batch-size", type=int, default=256)
    mode.add_argument("--seconds", type=float, default=5)
    args = parser.parse_args()
    bench_prepare(args) if args.mode == "prepare" else bench_load(args)


def bench_prepare(args: argparse.Namespace) -> None:
    """CPU seconds of everything (reading, unpacking, JSON, hashing, tokenising, writing) against those of the
    tokenizer's own batch encoding of the same documents, one thread; the best of each, measured in turns."""
    inputs = [i for spec in args.files for i in open_source(spec).inputs]
    texts = [extract_document(r, "text", None).text for i in inputs for rs, _ in i.read(["text"]) for r in rs if r]
    encode = bare_encoder(Tokenizer(args.tokenizer))
    bare, ours, wall = [], [], []
    for _ in range(args.repeat):
        start = cpu_seconds()
        tokens = sum(map(len, encode(texts)))
        bare.append(cpu_seconds() - start)
        with tempfile.TemporaryDirectory() as folder:
            start, clock = cpu_seconds(), time.perf_counter()
            given = {"tokenizer": args.tokenizer, "workers": args.workers, "progress": False}
            manifest = prepare_data(args.files, Path(folder) / "set", **given)
            ours.append(cpu_seconds() - start)
            wall.append(time.perf_counter() - clock)
    written = sum(entry["tokens"] for entry in manifest["splits"].values())
    print(f"{len(texts):,} documents, {tokens:,} tokens, {args.workers} workers")
    print(f"bare tokenizer   {tokens / min(bare):>12,.0f} tokens/s a core")
    print(f"preparation      {written / min(ours):>12,.0f} tokens/s a core, {written / min(wall):,.0f} tokens/s in all")
    print(f"per-core ratio   {written / min(ours) / (tokens / min(bare)):>12.2f}   (wanted: 0.85)")


def bare_encoder(tokenizer: Tokenizer):
    """The batch encoding of the library beneath, one thread."""
    backend = tokenizer._backend
    if hasattr(backend, "processor"):
        return lambda texts: backend.processor.encode(texts, num_threads=1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return lambda texts: [e.ids for e in backend.backend.encode_batch(texts, add_special_tokens=False)]


def cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def bench_load(args: argparse.Namespace) -> None:
    """Batches as training reads them, of a made-up set of `tokens` tokens in shards that are in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        windows = Windows(made_up_set(Path(folder), args.tokens), args.seq_len)
        read_all(windows)  # warms the page cache
        windows = Windows(TokenSet(folder, "train"), args.seq_len)
        for what in ("first reading, blocks checked", "second reading"):
            print(f"{what:<30} workers=1  {read_all(windows) / 1e6:8.1f}M tokens/s")
        for reset in (False, True):
            windows.reset_state = reset
            for workers in args.workers:
                rate = load_rate(windows, args, workers)
                boundaries = "reset_state" if reset else "ignore"
                print(
                    f"document_boundaries={boundaries:<12} workers={workers}  {rate / 1e6:8.1f}M tokens/s   "
                    f"{rate / NEEDED:6.1f} x the {NEEDED / 1e6}M wanted"
                )


def read_all(windows: Windows) -> float:
    """Tokens a second of reading every window once, in random order, by one thread."""
    order, start = np.random.default_rng(0).permutation(len(windows)), time.perf_counter()
    for i in order.tolist():
        windows[i].sum()
    return len(windows) * windows.length / (time.perf_counter() - start)


def load_rate(windows: Windows, args: argparse.Namespace, workers: int) -> float:
    stream = training_batches(windows, seed=0, batch_size=args.batch_size, workers=workers)
    next(stream)
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < args.seconds:
        next(stream)
        steps += 1
    seconds = time.perf_counter() - start
    stream.close()
    return steps * args.batch_size * args.seq_len / seconds


def made_up_set(folder: Path, tokens: int, shard: int = 2**26) -> TokenSet:
    """A set of random tokens in documents of 1,000."""
    import json

    (folder / "train").mkdir()
    (folder / "tokenizer.model").touch()
    random, shards = np.random.default_rng(0), []
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
        "files": [],
    }
    train = {**sums, "sources": {"random": {**sums, "shards": shards}}}
    empty = dict.fromkeys(sums, 0) | {"sources": {}}
    manifest = {"format": FORMAT, "version": VERSION, "complete": True, "fingerprint": "", "dtype": "uint16"}
    splits = {split: train if split == "train" else empty for split in SPLITS}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "tokenizer": tokenizer, "splits": splits}))
    return TokenSet(folder, "train")


if __name__ == "__main__":
    main()
