"""Cut inputs into units of work. The results of a unit are a pure function of the inputs and the settings.

So any process of any machine can do it, again if need be, and the results, in the order of the inputs, are the same
for any number of processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from glalm.prepare.encode import EncodedBatch, encode_batch
from glalm.prepare.input_files import Input, Part, Position, RecordBatch, read_part
from glalm.prepare.workers import PENDING_BYTES

UNIT_BYTES = 2**24  # A unit has at most about this much of its files, as they are stored, or else one file.
# Larger files that cannot be cut are read by the parent process. Compressed ones expand to some three times this size.
MAX_WHOLE_BYTES = 2**25
MAX_PARTS = 2**10  # A unit has at most this many small files.

# What a process reads and encodes: parts of neighbouring inputs, or the records of a large input without cuts, which
# the parent process reads.
Unit = tuple[Part, ...] | RecordBatch


def cut_units(inputs: list[Input], fields: list[str], position: Position) -> Iterator[Unit]:
    """Yield the units of all that follows `position` in `inputs`. Small files share a unit.

    Args:
        fields: The columns to read from a table; see `records.select_columns`.
    """
    unit: list[Part] = []
    size = 0.0
    for part, part_bytes in _cut_parts(inputs, position):
        if unit and (size + part_bytes > UNIT_BYTES or len(unit) == MAX_PARTS):
            yield tuple(unit)
            unit = []
            size = 0.0
        if part_bytes > MAX_WHOLE_BYTES:
            yield from read_part(part, fields)
        else:
            unit.append(part)
            size += part_bytes
    if unit:
        yield tuple(unit)


def _cut_parts(inputs: list[Input], position: Position) -> Iterator[tuple[Part, float]]:
    """Yield the parts of all that follows `position` in `inputs`, and about how many bytes each of them has."""
    for index, source_input in enumerate(inputs[position.input :], position.input):
        cuts = source_input.find_cuts(position.start, UNIT_BYTES)
        # Of a file that can be cut, what follows the last cut has no others.
        part_bytes = UNIT_BYTES if cuts or position.start else source_input.expected_bytes
        for start, stop in pairwise([position.start, *cuts, None]):
            yield Part(index, source_input.for_another_process(), start, stop, position.records), part_bytes
            position = Position(index)
        position = Position(index + 1)


def estimate_memory(unit: Unit) -> int:
    """Return the bytes of a unit for `workers.stream_in_order`.

    Parts are read by the worker. They count as half of PENDING_BYTES, so that a worker has two units.
    """
    return unit.size if isinstance(unit, RecordBatch) else PENDING_BYTES // 2


def limit_workers(workers: int, inputs: list[Input]) -> int:
    """Return the number of processes, at most `workers`, for which there are about as many units."""
    smallest = UNIT_BYTES / MAX_PARTS  # However small a file is, a unit has at most MAX_PARTS of them.
    size = 0.0
    for source_input in inputs:
        if size >= (workers - 1) * UNIT_BYTES:
            return workers  # A data set may have 100,000 files, and a network is asked for the size of each.
        size += max(source_input.expected_bytes, smallest)
    return int(min(workers, 1 + size / UNIT_BYTES))


def read_unit(unit: Unit, fields: list[str]) -> Iterator[RecordBatch]:
    """Yield the batches of a unit.

    Args:
        fields: The columns to read from a table.
    """
    if isinstance(unit, RecordBatch):
        yield unit
        return
    for part in unit:
        yield from read_part(part, fields)


@dataclass(frozen=True)
class UnitEncoder:
    """Encode units with the settings of a set.

    Attributes:
        tokenizer_path, fingerprint: The tokenizer, and its fingerprint.
        dtype: The dtype of the token ids.
        settings: The settings of the set.
        fields: The columns to read from a table.
    """

    tokenizer_path: Path
    fingerprint: str
    dtype: str
    settings: dict
    fields: list[str]

    def __call__(self, unit: Unit) -> Iterator[tuple[RecordBatch, EncodedBatch]]:
        """Yield the batches of a unit, without their records, and what they are encoded to."""
        for batch in read_unit(unit, self.fields):
            encoded = encode_batch(self.tokenizer_path, self.fingerprint, self.dtype, self.settings, batch)
            yield batch._replace(records=[]), encoded
