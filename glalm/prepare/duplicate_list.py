"""Write the results of a deduplication, and read them where a set is prepared without the duplicates."""

import json
from collections.abc import Container, Iterable, Iterator
from itertools import compress
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from glalm.data.files import DamagedFile, atomic_write, encode_row, file_sha256, read_json, read_jsonl, write_json
from glalm.prepare.duplicates import EXACT, NEAR, Duplicates
from glalm.prepare.encode import EncodedBatch
from glalm.prepare.input_files import Input
from glalm.prepare.records import SkippedRecord
from glalm.prepare.signature_store import SignatureStore

FORMAT = "glalm-duplicates"
VERSION = 2
REPORT = "report.json"
LIST = "duplicates.jsonl"
INPUTS = "inputs.jsonl"
COUNTS = ("documents", EXACT, NEAR)
CHECKSUMS_SHAPE = {LIST: str, INPUTS: str}
REPORT_SHAPE = {
    "format": {FORMAT},
    "version": int,
    "settings": dict,
    "sha256": CHECKSUMS_SHAPE,
    "sources": {str: dict},
}
EXAMPLES = 5  # of each kind in the report
# A line of the list: a removed document's record, the input's index and the record of the kept one, and the rest.
ROW = np.dtype([("record", "<i8"), ("kept_input", "<i8"), ("kept_record", "<i8"), ("jaccard", "<f8"), ("kind", "S15")])


def write_results(out: Path, settings: dict, inputs: list[dict], store: SignatureStore, duplicates: Duplicates) -> None:
    """Write the list of removed documents, the inputs with their counts and, last, the report.

    Args:
        inputs: What `Input.describe` returns of the inputs of the store's documents.
    """
    with atomic_write(out / LIST) as file:
        for index in range(len(duplicates.removed)):
            file.write(encode_row(_describe_pair(index, inputs, store, duplicates)))
    input_of = store.read_column("input_index")
    input_of_removed = input_of[duplicates.removed]
    counted = (input_of, input_of_removed[duplicates.exact], input_of_removed[~duplicates.exact])
    counts = np.stack([np.bincount(indices, minlength=len(inputs)) for indices in counted])
    sources: dict[str, dict[str, int]] = {}
    with atomic_write(out / INPUTS) as file:
        for index, entry in enumerate(inputs):
            input_counts = dict(zip(COUNTS, counts[:, index].tolist(), strict=True))
            file.write(encode_row({**entry, "sha256": store.finished[index], **input_counts}))
            source_counts = sources.setdefault(entry["source"], dict.fromkeys(COUNTS, 0))
            for name, count in input_counts.items():
                source_counts[name] += count
    report = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "sha256": {name: file_sha256(out / name) for name in (LIST, INPUTS)},
        "sources": sources,
        "examples": _choose_examples(inputs, store, duplicates),
    }
    write_json(out / REPORT, report, indent=1)


def read_report(out: Path) -> dict[str, Any]:
    """Return the report of the deduplication in `out`.

    Raises:
        FileNotFoundError: There is none, because it is unfinished or was never begun.
        DamagedFile: It is damaged.
        ValueError: It is of another format.
    """
    try:
        report = read_json(out / REPORT, REPORT_SHAPE)
    except FileNotFoundError as error:
        advice = f"To begin or finish one, run: glalm deduplicate --out {out} SOURCE"
        raise FileNotFoundError(f"{out} has no finished deduplication. {advice}") from error
    if report["version"] != VERSION:
        problem = f"{out} has a deduplication of format {report['version']}, not {VERSION}"
        raise ValueError(f"{problem}. Replace it with: glalm deduplicate --out {out} --overwrite SOURCE")
    return report


class DuplicateList:
    """The removed documents of a finished deduplication.

    Attributes:
        sha256: The checksum of the list.

    Raises:
        DamagedFile: The list, or the file of the inputs with their counts, was changed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        report = read_report(folder)
        self.sha256: str = report["sha256"][LIST]
        self._settings = report["settings"]
        self._command = f"glalm deduplicate --out {folder}"
        for name in (LIST, INPUTS):
            if file_sha256(folder / name) != report["sha256"][name]:
                problem = f"{folder / name} is damaged: its SHA-256 does not match the report"
                raise DamagedFile(f"{problem}. Replace it with: {self._command} --overwrite SOURCE")
        self._inputs = {(row["source"], row["name"]): row for row in read_jsonl(folder / INPUTS)}
        self._keys = list(self._inputs)
        removed = [row[EXACT] + row[NEAR] for row in self._inputs.values()]
        ends = np.cumsum(removed, dtype=np.int64)
        self._ranges = dict(zip(self._keys, zip(ends - removed, ends, strict=True), strict=True))
        self._rows = np.fromiter(self._read_rows(), ROW)
        self._records = self._rows["record"].copy()  # A search in a field of the rows would copy it each time.

    def check(self, settings: dict, inputs: Iterable[Input]) -> None:
        """Raise ValueError unless all `inputs`, read with `settings`, were part of the deduplication."""
        for name in ("text_field", "source_field"):
            if settings[name] != self._settings[name]:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{self.folder} was made with another {option}. Use the same one in both commands.")
        for source_input in inputs:
            row = self._inputs.get(source_input.key)
            if row is None:
                problem = f"{source_input}: {self.folder} has no {source_input.name!r} of {source_input.source!r}"
                advice = "Name the sources as in that command, or add them there"
                raise ValueError(f"{problem}. {advice}: {self._command} SOURCE")
            described = source_input.describe()
            same = described == {key: row.get(key) for key in described}
            if not same and not (row["sha256"] and row["sha256"] == source_input.compute_sha256()):
                problem = f"{source_input} has changed since it was read for {self.folder}"
                raise ValueError(f"{problem}. Look for duplicates again with: {self._command} --overwrite SOURCE")

    def describe_absent_copies(self, keys: Container[tuple[str, str]]) -> str:
        """Return a message about removed documents of which the kept copy is in none of the inputs that have `keys`.

        Neither copy is part of a set that has only these inputs. Return "" if there are no such documents.
        """
        is_present = np.array([key in keys for key in self._keys])
        counts = [stop - start for start, stop in self._ranges.values()]
        kept_in = self._rows["kept_input"]
        is_absent = np.repeat(is_present, counts) & ~is_present[kept_in]
        if not is_absent.any():
            return ""
        source, name = self._keys[kept_in[is_absent][0]]
        problem = f"Of {is_absent.sum():,} documents this set has no copy: {self.folder} keeps one in {source}, {name}"
        return f"{problem} or in other inputs that are not in the set. Add these, unless you want to keep them out."

    def remove_from(self, encoded: EncodedBatch, key: tuple[str, str]) -> EncodedBatch:
        """Return a batch in which the removed documents count as skipped records.

        Args:
            key: The (source, name) of the batch's input. The documents are numbered by its records.
        """
        if not encoded.documents:
            return encoded
        start, stop = self._ranges[key]
        numbers = np.array([document.number for document in encoded.documents])
        begin, end = start + np.searchsorted(self._records[start:stop], (numbers[0], numbers[-1] + 1))
        rows = self._rows[begin:end]
        is_kept = ~np.isin(numbers, rows["record"])
        lengths = [document.tokens for document in encoded.documents]
        skipped = [*encoded.skipped]
        for row in rows:
            source, name = self._keys[row["kept_input"]]
            detail = f"Jaccard index {row['jaccard']:.3f} with {source}, {name}:{row['kept_record']}"
            skipped.append(SkippedRecord(int(row["record"]), row["kind"].decode(), detail))
        return EncodedBatch(
            encoded.ids[np.repeat(is_kept, lengths)],
            list(compress(encoded.documents, is_kept)),
            sorted(skipped, key=attrgetter("number")),
        )

    def _read_rows(self) -> Iterator[tuple]:
        """Yield the lines of the list, as ROW has them."""
        numbers = {key: number for number, key in enumerate(self._keys)}
        with open(self.folder / LIST, "rb") as file:
            for line in file:
                row = json.loads(line)
                kept = row["of"]
                kept_input = numbers[kept["source"], kept["name"]]
                yield row["record"], kept_input, kept["record"], row["jaccard"], row["kind"].encode()


def _describe_pair(index: int, inputs: list[dict], store: SignatureStore, duplicates: Duplicates) -> dict[str, Any]:
    """Return the line of the list for the removed document of this index."""
    records = []
    for document in (duplicates.removed[index], duplicates.kept[index]):
        described = store.read_document(int(document))
        entry = inputs[described["input_index"]]
        records.append({"source": entry["source"], "name": entry["name"], "record": int(described["record"])})
    removed, kept = records
    kind = EXACT if duplicates.exact[index] else NEAR
    return {**removed, "kind": kind, "jaccard": round(float(duplicates.jaccard[index]), 4), "of": kept}


def _choose_examples(inputs: list[dict], store: SignatureStore, duplicates: Duplicates) -> list[dict[str, Any]]:
    """Return pairs with the beginnings of their texts: near-duplicates that are least alike, and some copies."""
    by_jaccard = np.argsort(duplicates.jaccard, kind="stable")
    is_exact = duplicates.exact[by_jaccard]
    chosen = [*by_jaccard[~is_exact][:EXAMPLES], *by_jaccard[is_exact][:EXAMPLES]]
    examples = []
    for index in chosen:
        pair = (int(duplicates.removed[index]), int(duplicates.kept[index]))
        texts = [store.read_document(document)["beginning"].decode(errors="ignore") for document in pair]
        examples.append({**_describe_pair(index, inputs, store, duplicates), "text": texts[0], "of_text": texts[1]})
    return examples
