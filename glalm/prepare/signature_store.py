"""Store the signatures of many documents on disk, so that an interrupted pass over their texts resumes there."""

from bisect import bisect_right
from dataclasses import asdict
from pathlib import Path

import numpy as np

from glalm.data.files import DamagedFile, atomic_write, read_json, write_json
from glalm.prepare.signatures import Signatures
from glalm.prepare.sources import Position

POSITION_SHAPE = dict.fromkeys(asdict(Position()), int)
PART_SHAPE = {"position": POSITION_SHAPE, "finished": list, "files": {str: int}}


class SignatureStore:
    """The signatures of documents in the order of their inputs, in parts that are written one after the other.

    A part is three arrays and, written last, a JSON file, without which the arrays do not count. So a killed process
    loses only the part that it had not written yet. Documents are numbered from 0 through all parts.

    Attributes:
        position: Up to where the inputs are covered by the parts.
        finished: The SHA-256 of each input that was read to its end, or None for a streamed one.
        pending_bytes: The memory that signatures take until the next `commit`.

    Raises:
        DamagedFile: A part is damaged or incomplete.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.position = Position()
        self.finished: list[str | None] = []
        self._parts: list[Signatures] = []
        self._sketch_ends: list[np.ndarray] = []  # of the documents of each part, in its array of sketches
        self._starts = [0]  # the number of each part's first document, and the number of all documents
        self._discard_pending()
        while (folder / f"{len(self._parts):06d}.json").exists():
            self._open_part()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def num_bands(self) -> int:
        """The number of band hashes of a document, 0 without documents."""
        return len(self._parts[0].bands) if self._parts else 0

    def add(self, signatures: Signatures, position: Position) -> None:
        """Add the signatures of the documents up to `position`, which are in the store after the next `commit`."""
        self._pending.append(signatures)
        self._pending_position = position
        self.pending_bytes += sum(values.nbytes for values in signatures)

    def finish_input(self, sha256: str | None) -> None:
        """Add the SHA-256 of an input of which all signatures were added."""
        self._pending_finished.append(sha256)

    def commit(self) -> None:
        """Write what was added as a part, if there is anything."""
        if not self._pending:
            return
        columns = Signatures(
            np.concatenate([signatures.documents for signatures in self._pending]),
            # Each band is contiguous, because `read_band` reads one of them.
            np.ascontiguousarray(np.concatenate([signatures.bands for signatures in self._pending], axis=1)),
            np.concatenate([signatures.sketches for signatures in self._pending]),
        )
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{len(self._parts):06d}"
        sizes = {}
        for name, values in columns._asdict().items():
            with atomic_write(path.with_suffix(f".{name}.npy")) as file:
                np.save(file, values)
                sizes[name] = file.tell()
        record = {"position": asdict(self._pending_position), "finished": self._pending_finished, "files": sizes}
        write_json(path.with_suffix(".json"), record)
        self._discard_pending()
        self._open_part()

    def read_column(self, name: str) -> np.ndarray:
        """Return a field of DOCUMENT of all documents."""
        return np.concatenate([part.documents[name] for part in self._parts])

    def read_band(self, index: int) -> np.ndarray:
        """Return one of the band hashes of all documents: uint64 [documents]."""
        return np.concatenate([part.bands[index] for part in self._parts])

    def read_document(self, document: int) -> np.void:
        """Return the DOCUMENT of this number."""
        part, index = self._locate(document)
        return self._parts[part].documents[index]

    def read_sketch(self, document: int) -> np.ndarray:
        """Return the sketch of the document of this number."""
        part, index = self._locate(document)
        end = self._sketch_ends[part][index]
        start = self._sketch_ends[part][index - 1] if index else 0
        return self._parts[part].sketches[start:end]

    def _discard_pending(self) -> None:
        """Forget what was added since the last commit."""
        self._pending: list[Signatures] = []
        self._pending_finished: list[str | None] = []
        self.pending_bytes = 0

    def _locate(self, document: int) -> tuple[int, int]:
        """Return the part that has a document, and the document's index in it."""
        part = bisect_right(self._starts, document) - 1
        return part, document - self._starts[part]

    def _open_part(self) -> None:
        """Map the next part into memory, and move the position past it."""
        path = self.folder / f"{len(self._parts):06d}.json"
        record = read_json(path, PART_SHAPE)
        arrays = {}
        for name in Signatures._fields:
            array_path = path.with_suffix(f".{name}.npy")
            size = array_path.stat().st_size if array_path.exists() else 0
            if size != record["files"].get(name):
                problem = f"{array_path} is damaged: it has {size} bytes, but {record['files'].get(name)} were written"
                raise DamagedFile(f"{problem}. To read all documents again, use --overwrite.")
            # The view is an ndarray, of which slices take less time than those of a memmap.
            arrays[name] = np.load(array_path, mmap_mode="r").view(np.ndarray)
        part = Signatures(**arrays)
        self._parts.append(part)
        self._sketch_ends.append(np.cumsum(part.documents["sketch_size"], dtype=np.int64))
        self._starts.append(len(self) + len(part.documents))
        self.position = Position(**record["position"])
        self.finished += record["finished"]
