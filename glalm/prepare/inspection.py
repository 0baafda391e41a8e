"""Show what is in a prepared set: counts, lengths of documents, a sample, and whether the files are valid."""

import os
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from glalm.data.files import file_sha256
from glalm.data.shards import SPLITS, TokenSet, read_manifest
from glalm.data.tokenizer import Tokenizer
from glalm.prepare.writer import format_counts

SAMPLE = 300  # characters
PLOT = "lengths.png"


def inspect_set(folder: str | os.PathLike, verify: bool = True) -> int:
    """Print what is in a set, and write lengths.png into its folder. A folder that is read-only stays as it is.

    Args:
        verify: Read every file and compare its SHA-256 with the manifest.

    Returns:
        The exit code: 0, or 1 if the counts of documents are inconsistent.

    Raises:
        ValueError: A file is damaged.
    """
    folder = Path(folder)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    log_console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    manifest = read_manifest(folder)
    splits = {split: TokenSet(folder, split) for split in SPLITS}
    train = splits["train"]
    tokenizer = Tokenizer(train.tokenizer_path)
    state = "complete" if manifest["complete"] else "still being prepared; this is what is complete so far"
    console.print(f"{folder} ({state}): {manifest['dtype']}, vocabulary of {tokenizer.vocab_size:,}")
    console.print(_make_table(manifest))
    for line in format_counts(manifest["books"]):
        console.print(line)
    consistent = _counts_are_consistent(manifest)
    console.print("These counts are consistent." if consistent else "ERROR: These counts are inconsistent.")
    if train.num_documents:
        middle = train.num_documents // 2
        ids = train.read_document(middle)
        console.rule(f"the beginning of document {middle} of train, {len(ids):,} tokens", style="dim")
        console.print(tokenizer.decode(ids[:SAMPLE].tolist())[:SAMPLE], markup=False)
        shown_ids = [*ids[:12].tolist(), "...", *ids[-3:].tolist()] if len(ids) > 15 else ids.tolist()
        console.print("ids:", *shown_ids)
        console.rule(style="dim")
    if verify:
        log_console.print("Reading every file to verify its SHA-256. To skip this, use --quick.")
        for tokens in splits.values():
            tokens.verify_checksums()
        for log in manifest["logs"].values():
            if file_sha256(folder / log["file"]) != log["sha256"]:
                raise ValueError(f"{folder / log['file']} is damaged: its SHA-256 does not match the manifest.")
        console.print("The SHA-256 of every file matches the manifest.")
    try:
        console.print(f"Lengths of the documents: {plot_lengths(train, folder / PLOT)}")
    except OSError as error:
        log_console.print(f"The lengths of the documents are not plotted ({error}).")
    return 0 if consistent else 1


def plot_lengths(tokens: TokenSet, path: Path) -> Path:
    """Plot a histogram of the documents' lengths in tokens, and of the tokens in documents of each length."""
    from matplotlib.figure import Figure

    lengths = tokens.document_lengths
    edges = np.logspace(0, np.log10(max(lengths.max(initial=10), 10)), 60)
    figure = Figure(figsize=(5.5, 3.3), layout="constrained", dpi=200)
    ax = figure.subplots()
    for label, weights in (("of the documents", np.ones_like(lengths)), ("of the tokens", lengths)):
        counts = np.histogram(lengths, edges, weights=weights)[0]
        ax.stairs(100 * counts / max(weights.sum(), 1), edges, label=label)
    ax.set(xscale="log", xlabel=f"tokens of a document ({tokens.split})", ylabel="per cent")
    ax.legend(frameon=False)
    figure.savefig(path)
    return path


def _make_table(manifest: dict) -> Table:
    """Return a table with a row for each source of each split."""
    table = Table("split", "source", "documents", "tokens", "% of split", "bytes/token", "shards", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for split, entry in manifest["splits"].items():
        for name, source in entry["sources"].items():
            share = source["tokens"] / entry["tokens"]
            ratio = source["text_bytes"] / source["tokens"]
            counts = (f"{source['documents']:,}", f"{source['tokens']:,}", f"{share:.1%}", f"{ratio:.2f}")
            table.add_row(split, name, *counts, str(len(source["shards"])))
    leftover = manifest["splits"]["train"]["left_over"]
    counts = ", ".join(f"{count:,} for {length}" for length, count in leftover.items())
    table.caption = f"Training tokens at the ends of sources that a run does not read, by its data.seq_len: {counts}"
    return table


def _counts_are_consistent(manifest: dict) -> bool:
    """Return whether read = written + skipped for each source, and the shards of a complete set have all documents."""
    sources = manifest["books"].values()
    all_counted = all(source["read"] == source["written"] + sum(source["skipped"].values()) for source in sources)
    in_shards = sum(split["documents"] for split in manifest["splits"].values())
    written = sum(source["written"] for source in sources)
    return all_counted and (not manifest["complete"] or written == in_shards)
