"""Checksums of a file's blocks, to verify the part of a file that is read without reading the rest."""

import hashlib
import os
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from glalm.data.files import DamagedFile


class DamagedData(DamagedFile):
    """A file of a prepared set whose bytes differ from those that were written. The message names them."""


# Bytes of a block. A page fault reads about as much ahead anyway, and 4 bytes of checksum for each of them is little.
BLOCK = 2**16


def block_sums(path: Path) -> np.ndarray:
    """Return the CRC-32 of each BLOCK bytes of a file; the last block may be shorter. uint32 [blocks]."""
    with open(path, "rb") as file:
        return np.array([zlib.crc32(block) for block in iter(lambda: file.read(BLOCK), b"")], dtype="<u4")


def combine_weights(files: dict[str, dict], kind: str = "model") -> str:
    """Return one checksum of the weights that a checkpoint's manifest lists: of a file, or of its parts.

    Args:
        kind: The beginning of the files' names: "model", or "average" for the moving average of the weights.
    """
    checksums = [entry["sha256"] for name, entry in sorted(files.items()) if name.startswith(kind)]
    return checksums[0] if len(checksums) == 1 else hashlib.sha256("".join(checksums).encode()).hexdigest()


class CheckedArray:
    """An array in a memory-mapped file, each block of which is verified when it is first read.

    Errors of memory or disk that occur after that first read are not found. The size of the file is checked at every
    read, because the kernel kills a process that reads a mapped file beyond its end (SIGBUS). That remains possible if
    the file is cut within the microseconds of a read. Threads may share an object; at worst, two of them verify the
    same block.

    Args:
        path: The file's name, for error messages.
        content: The bytes of the whole file: uint8 [bytes].
        header: The byte at which the array begins.
        dtype: The dtype of the array.
        sums: The checksums that `block_sums` returned when the file was written.

    Raises:
        DamagedData: The number of checksums does not match the size of the file.
    """

    def __init__(self, path: Path, content: np.ndarray, header: int, dtype: str, sums: np.ndarray):
        if len(sums) != -(-len(content) // BLOCK):
            raise DamagedData(f"{path} has {len(content)} bytes, but {len(sums)} checksums of {BLOCK} bytes each")
        self.path = path
        self._content = content
        self._header = header
        self._array = content[header:].view(dtype)
        self._sums = sums
        self._verified = np.zeros(len(sums), dtype=bool)

    def __len__(self) -> int:
        return len(self._array)

    def read_range(self, start: int, stop: int) -> np.ndarray:
        """Return a view of the elements [start, stop).

        Raises:
            DamagedData: One of their blocks was changed, or the file's size.
        """
        with suppress(OSError):  # A file that was removed stays readable while it is mapped.
            size = os.stat(self.path).st_size
            if size != len(self._content):
                raise DamagedData(f"{self.path} has {size} bytes now, and had {len(self._content)} when it was opened")
        itemsize = self._array.itemsize
        first_block = (self._header + start * itemsize) // BLOCK
        end_block = -(-(self._header + stop * itemsize) // BLOCK)
        for block in range(first_block, end_block):
            if not self._verified[block]:
                begin = block * BLOCK
                data = self._content[begin : begin + BLOCK]
                if zlib.crc32(data.data) != self._sums[block]:
                    raise DamagedData(f"{self.path} is damaged between byte {begin} and {begin + len(data)}")
                self._verified[block] = True
        return self._array[start:stop]
