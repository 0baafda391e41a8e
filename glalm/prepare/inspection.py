"""What a reader wants to know of a prepared set: counts, lengths, a sample, and whether its files are whole."""

import os
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from glalm.data.files import file_sha256
from glalm.data.shards import SPLITS, TokenSet, read_manifest
from glalm.data.tokenizer import Tokenizer

SAMPLE = 300  # characters
PLOT = "lengths.png"


def inspect_set(folder: str | os.PathLike, verify: bool = True) -> int:
    """Prints what is in the set and writes lengths.png into it. Returns 0, or 1 when the books do not balance.

    verify: read every file and compare its sha256. Raises ValueError for the first that is damaged.
    """
    folder, console = Path(folder), Console(highlight=False, soft_wrap=True)
    manifest = read_manifest(folder)
    sets = {split: TokenSet(folder, split) for split in SPLITS}
    tokenizer = Tokenizer(sets["train"].tokenizer_path)
    state = "complete" if manifest["complete"] else "not complete: what follows is of the shards that are"
    console.print(f"{folder}: {state}; {manifest['dtype']}, vocabulary of {tokenizer.vocab_size:,}")
    console.print(_counts(manifest))
    balanced = _books(manifest, console)
    console.print(f"lengths of the documents: {plot_lengths(sets['train'], folder / PLOT)}")
    _sample(sets["train"], tokenizer, console)
    if verify:
        for tokens in sets.values():
            tokens.verify_checksums()
        for log in manifest["logs"].values():
            if file_sha256(folder / log["file"]) != log["sha256"]:
                raise ValueError(f"{folder / log['file']}: damaged, its sha256 is not that of the manifest")
        console.print("every file has the sha256 that the manifest says")
    return 0 if balanced else 1


def plot_lengths(tokens: TokenSet, path: Path) -> Path:
    """A histogram of the documents' lengths in tokens, and of the tokens in documents of each length."""
    from matplotlib.figure import Figure

    lengths = tokens.document_lengths
    edges = np.logspace(0, np.log10(max(lengths.max(initial=10), 10)), 60)
    figure = Figure(figsize=(5.5, 3.3), layout="constrained", dpi=200)
    ax = figure.subplots()
    for label, weights in (("of the documents", None), ("of the tokens", lengths)):
        shares = np.histogram(lengths, edges, weights=weights)[0] / max(
            len(lengths) if weights is None else lengths.sum(), 1
        )
        ax.stairs(100 * shares, edges, label=label)
    ax.set(xscale="log", xlabel=f"tokens of a document ({tokens.split})", ylabel="per cent")
    ax.legend(frameon=False)
    figure.savefig(path)
    return path


def _counts(manifest: dict) -> Table:
    table = Table("split", "source", "documents", "tokens", "% of split", "bytes/token", "shards", box=None)
    for split, entry in manifest["splits"].items():
        for name, source in entry["sources"].items():
            share, ratio = source["tokens"] / entry["tokens"], source["text_bytes"] / source["tokens"]
            counts = (f"{source['documents']:,}", f"{source['tokens']:,}", f"{share:.1%}", f"{ratio:.2f}")
            table.add_row(split, name, *counts, str(len(source["shards"])))
        left = ", ".join(f"{count:,} of {length}" for length, count in entry["left_over"].items())
        table.caption = f"tokens that fill no window (train): {left}" if split == "train" else table.caption
    for column in table.columns[2:]:
        column.justify = "right"
    return table


def _books(manifest: dict, console: Console) -> bool:
    """Prints documents in and out of each source; whether they add up."""
    for name, book in manifest["books"].items():
        skipped = "".join(f" + {n:,} left out ({reason})" for reason, n in sorted(book["skipped"].items()))
        console.print(f"{name}: {book['read']:,} documents read = {book['written']:,} written{skipped}")
    books = manifest["books"].values()
    in_shards = sum(entry["documents"] for entry in manifest["splits"].values())
    sums = all(b["read"] == b["written"] + sum(b["skipped"].values()) for b in books)
    balanced = sums and (not manifest["complete"] or sum(b["written"] for b in books) == in_shards)
    console.print("the books balance" if balanced else "THE BOOKS DO NOT BALANCE")
    return balanced


def _sample(tokens: TokenSet, tokenizer: Tokenizer, console: Console) -> None:
    if not tokens.num_documents:
        return
    middle = tokens.num_documents // 2
    ids = tokens.read_document(middle)
    console.rule(f"document {middle} of {tokens.split}, from its {len(ids):,} tokens", style="dim")
    console.print(tokenizer.decode(ids[:SAMPLE].tolist())[:SAMPLE], markup=False)
    console.print(f"ids: {' '.join(map(str, ids[:12].tolist()))} ... {' '.join(map(str, ids[-3:].tolist()))}")
    console.rule(style="dim")
