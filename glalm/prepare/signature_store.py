"""Store the signatures of many documents on disk, so that an interrupted pass over their texts resumes there."""

import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np

from glalm.data.files import DamagedFile, flush_to_disk, read_json, read_jsonl, reopen_truncated, write_json
from glalm.prepare.input_files import Position
from glalm.prepare.signatures import DOCUMENT, Signatures

JOURNAL = "journal.json"
JOURNAL_SHAPE = {"position": dict.fromkeys(asdict(Position()), int), "sizes": {str: int}}
DOCUMENTS = "documents"
SKETCHES = "sketches"
BAND = "band-{:03d}"  # the name of the file of a band hash, by its number
FINISHED = "finished.jsonl"


class SignatureStore:
    """The signatures of documents in the order of their inputs, in files to which each commit appends.

    The journal, which a commit replaces last, says how many bytes of each file count. So a killed process loses only
    what it added after the last commit. Each band hash has a file of its own, because one of them is read at a time.
    Documents are numbered from 0.

    Attributes:
        position: The position in the inputs at which reading resumes.
        finished: The SHA-256 of each input that was read to its end, or None for a streamed one.
        pending_bytes: The memory of the signatures that are not committed.

    Raises:
        DamagedFile: A file is damaged or incomplete.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.position = Position()
        self.finished: list[str | None] = []
        self._sizes: dict[str, int] = {}  # the bytes of each file that count
        self._discard_pending()
        if (folder / JOURNAL).exists():
            self._read_journal()

    def __len__(self) -> int:
        return self._sizes.get(DOCUMENTS, 0) // DOCUMENT.itemsize

    @property
    def num_bands(self) -> int:
        """The number of band hashes of a document, 0 without documents."""
        return sum(name.startswith("band-") for name in self._sizes)

    def add(self, signatures: Signatures, position: Position) -> None:
        """Add the signatures of the documents up to `position`, which are in the store after the next `commit`."""
        self._pending.append(signatures)
        self._pending_position = position
        self.pending_bytes += sum(values.nbytes for values in signatures)

    def finish_input(self, sha256: str | None) -> None:
        """Add the SHA-256 of the next input. All its signatures were added."""
        self._pending_finished.append(sha256)

    def commit(self) -> None:
        """Write what was added, if there is anything."""
        if not self._pending:
            return
        self.folder.mkdir(exist_ok=True)
        self._append(DOCUMENTS, np.concatenate([signatures.documents for signatures in self._pending]).tobytes())
        self._append(SKETCHES, np.concatenate([signatures.sketches for signatures in self._pending]).tobytes())
        bands = np.concatenate([signatures.bands for signatures in self._pending], axis=1)
        for index, band in enumerate(bands):
            self._append(BAND.format(index), band.tobytes())
        self._append(FINISHED, "".join(f"{json.dumps(sha256)}\n" for sha256 in self._pending_finished).encode())
        write_json(self.folder / JOURNAL, {"position": asdict(self._pending_position), "sizes": self._sizes})
        self.position = self._pending_position
        self.finished += self._pending_finished
        self._discard_pending()

    def read_column(self, name: str) -> np.ndarray:
        """Return a field of DOCUMENT of all documents."""
        return self._documents[name].copy()

    def read_band(self, index: int) -> np.ndarray:
        """Return one of the band hashes of all documents: uint64 [documents]."""
        return self._map(BAND.format(index), np.dtype(np.uint64))

    def read_document(self, document: int) -> np.void:
        """Return the DOCUMENT of this number."""
        return self._documents[document]

    def read_sketch(self, document: int) -> np.ndarray:
        """Return the sketch of the document of this number."""
        start, end = self._sketch_bounds[document : document + 2]
        return self._sketches[start:end]

    @cached_property
    def _documents(self) -> np.ndarray:
        return self._map(DOCUMENTS, DOCUMENT)

    @cached_property
    def _sketches(self) -> np.ndarray:
        return self._map(SKETCHES, np.dtype(np.uint32))

    @cached_property
    def _sketch_bounds(self) -> np.ndarray:
        """Where each document's sketch starts in the array of sketches, and where the last one ends."""
        return np.append(0, np.cumsum(self._documents["sketch_size"], dtype=np.int64))

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        """Map what counts of a file into memory."""
        count = self._sizes.get(name, 0) // dtype.itemsize
        if not count:  # An empty file cannot be mapped.
            return np.empty(0, dtype)
        # The view is an ndarray, of which slices take less time than those of a memmap.
        return np.memmap(self.folder / name, dtype, "r", shape=(count,)).view(np.ndarray)

    def _append(self, name: str, data: bytes) -> None:
        """Append to what counts of a file, and flush it to disk. What a killed process wrote after it is discarded."""
        with reopen_truncated(self.folder / name, self._sizes.get(name, 0)) as file:
            file.write(data)
            self._sizes[name] = flush_to_disk(file)

    def _discard_pending(self) -> None:
        """Forget what was added since the last commit, and the files as they were mapped before."""
        self._pending: list[Signatures] = []
        self._pending_finished: list[str | None] = []
        self.pending_bytes = 0
        for name in ("_documents", "_sketches", "_sketch_bounds"):
            self.__dict__.pop(name, None)

    def _read_journal(self) -> None:
        """Take over what was committed, after checking that all of it is there."""
        journal = read_json(self.folder / JOURNAL, JOURNAL_SHAPE)
        for name, size in journal["sizes"].items():
            path = self.folder / name
            found = path.stat().st_size if path.exists() else 0
            if found < size:
                problem = f"{path} is damaged: it has {found} bytes, but {size} were written"
                raise DamagedFile(f"{problem}. To read all documents again, use --overwrite.")
        self._sizes = journal["sizes"]
        self.position = Position(**journal["position"])
        self.finished = read_jsonl(self.folder / FINISHED, self._sizes[FINISHED])
