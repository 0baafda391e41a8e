"""Checksums of a file's blocks, so that a part of it can be verified when it is read, without reading the rest."""

import zlib
from pathlib import Path

import numpy as np

BLOCK = 2**16  # bytes. A page that is missed reads about as much ahead anyway; 4 bytes of checksums for each


class DamagedFile(ValueError):
    """A file whose bytes are not what was written. The message names it, and the block."""


def block_sums(path: Path) -> np.ndarray:
    """CRC-32 of each BLOCK bytes of a file, the last block being shorter: uint32 [blocks]. It finds every error within
    32 neighbouring bits."""
    with open(path, "rb") as file:
        return np.array([zlib.crc32(block) for block in iter(lambda: file.read(BLOCK), b"")], dtype="<u4")


class CheckedArray:
    """An array in a mapped file; each block of it is compared with its checksum when it is first read.

    content: uint8, the whole file; the array of `dtype` begins at byte `header`. sums: what `block_sums` gave.
    Once: what memory or a disk does to a block later, while the process reads it again, is not seen. Threads may
    share it; at worst two of them check the same block.
    """

    def __init__(self, path: Path, content: np.ndarray, header: int, dtype: str, sums: np.ndarray):
        if len(sums) != -(-len(content) // BLOCK):
            raise DamagedFile(f"{path}: {len(sums)} checksums for {len(content)} bytes")
        self.path, self._content, self._sums = path, content, sums
        self._array, self._header = content[header:].view(dtype), header
        self._known = np.zeros(len(sums), dtype=bool)

    def __len__(self) -> int:
        return len(self._array)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop), a view. DamagedFile unless their blocks are as they were written."""
        first, last = (self._header + i * self._array.itemsize for i in (start, stop))
        for block in range(first // BLOCK, -(-last // BLOCK)):
            if self._known[block]:
                continue
            begin = block * BLOCK
            bytes_ = self._content[begin : begin + BLOCK]
            if zlib.crc32(bytes_) != self._sums[block]:
                raise DamagedFile(
                    f"{self.path}: damaged between byte {begin} and {begin + len(bytes_)}: not what was written there"
                )
            self._known[block] = True
        return self._array[start:stop]
