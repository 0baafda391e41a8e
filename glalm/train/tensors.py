"""Named tensors in safetensors files, whole or in slices: written by any number of processes, read by any other.

A DTensor (FSDP2, HSDP) is written as the local shards of its processes, any other tensor, which all processes hold
alike, by one of them. Each file says in its header which part of which tensor it holds, so a reader copies what it
needs from wherever it lies, and the number of processes, DDP or FSDP2, may change between writing and reading.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SLICES = "slices"  # the header's metadata under which a file says where its tensors lie in the whole ones


@dataclass
class Piece:
    """What this process holds of a tensor: `local` begins at `offset` in the whole, which has `shape`.

    `holders` processes hold the same; this one is number `holder` of them.
    """

    local: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    holder: int
    holders: int

    @property
    def key(self) -> str:
        """What it is called in a file, after the tensor's name: nothing when it is whole."""
        return "" if self.local.shape == self.shape else "@" + ",".join(map(str, self.offset))


def piece(tensor: Tensor, rank: int, world: int) -> Piece:
    """The part of `tensor` that this process, `rank` of `world`, holds. ValueError at a placement that is no slice."""
    if not isinstance(tensor, DTensor):
        return Piece(tensor.detach(), (0,) * tensor.dim(), tuple(tensor.shape), rank, world)
    mesh, size = tensor.device_mesh, list(tensor.shape)
    offset, holder, holders = [0] * tensor.dim(), 0, 1
    for dim, placement in enumerate(tensor.placements):
        coordinate, parts = mesh.get_local_rank(dim), mesh.size(dim)
        if type(placement) is Replicate:
            holder, holders = holder * parts + coordinate, holders * parts
        elif type(placement) is Shard:  # as torch.chunk: every shard but the last ones has the same size
            d, share = placement.dim, -(-size[placement.dim] // parts)
            begin = min(share * coordinate, size[d])
            offset[d], size[d] = offset[d] + begin, min(share, size[d] - begin)
        else:
            raise ValueError(f"cannot save a tensor that is placed as {placement}; shard it evenly or replicate it")
    local = tensor.detach().to_local()
    if list(local.shape) != size:
        raise ValueError(f"a shard of {list(local.shape)} was expected to be {size}: {tensor.placements} on {mesh}")
    return Piece(local, tuple(offset), tuple(tensor.shape), holder, holders)


def share(tensors: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Piece]:
    """The pieces that this process writes. Every piece is written by one of its holders, the one with the least so
    far: all of them reckon alike, so they need not talk."""
    mine, loads = {}, {}
    for name, tensor in tensors.items():
        p = piece(tensor, rank, world)
        load = loads.setdefault(p.holders, [0] * p.holders)
        writer = load.index(min(load))
        load[writer] += p.local.nbytes
        if writer == p.holder and (p.local.numel() or not math.prod(p.shape)):
            mine[name] = p
    return mine


def write(path: Path, pieces: Mapping[str, Piece]) -> dict:
    """Writes `pieces` to a new safetensors file, on disk when this returns: its {"bytes": ..., "sha256": ...}.

    The checksum is of what was to be written, not of what a disk made of it: reading the file back finds a difference.
    Tensors go one after the other, so that no second copy of them all is held.
    """
    # The largest elements first: everything is aligned then, without padding.
    entries = sorted(((n + p.key, n, p) for n, p in pieces.items()), key=lambda e: -e[2].local.element_size())
    slices = {key: {"name": name, "offset": p.offset, "shape": p.shape} for key, name, p in entries if p.key}
    header, end = {"__metadata__": {"format": "pt", SLICES: json.dumps(slices)}}, 0
    for key, _, p in entries:
        begin, end = end, end + p.local.nbytes
        header[key] = {"dtype": DTYPES[p.local.dtype], "shape": list(p.local.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chain([len(head).to_bytes(8, "little"), head], (_content(p.local) for _, _, p in entries)):
            digest.update(chunk)
            size += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        # So that verifying reads the disk. (The kernel keeps what is still in use elsewhere; this is a wish.)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"bytes": size, "sha256": digest.hexdigest()}


@dataclass
class Stored:
    """A whole tensor as files have it: {(file, key): offset of that part}."""

    shape: tuple[int, ...]
    dtype: str
    parts: dict[tuple[Path, str], tuple[int, ...]]


def index(files: Iterable[Path]) -> dict[str, Stored]:
    """What `files` hold, by the names of the whole tensors."""
    found: dict[str, Stored] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            slices = json.loads((file.metadata() or {}).get(SLICES, "{}"))
            for key in file.keys():  # noqa: SIM118 (a file is no dict)
                view = file.get_slice(key)
                shape = tuple(view.get_shape())
                entry = slices.get(key, {"name": key, "offset": [0] * len(shape), "shape": shape})
                stored = found.setdefault(entry["name"], Stored(tuple(entry["shape"]), view.get_dtype(), {}))
                stored.parts[path, key] = tuple(entry["offset"])
    return found


@torch.no_grad()
def read(stored: Mapping[str, Stored], tensors: Mapping[str, Tensor]) -> None:
    """Copies into each of `tensors`, in place, what files have under its name: of a DTensor, its local shard alone.

    Raises ValueError, naming the tensor, where the shape is another or the parts do not make up what is wanted.
    """
    wanted: dict[tuple[Path, str], list[tuple[str, Piece]]] = {}
    filled = dict.fromkeys(tensors, 0)
    for name, tensor in tensors.items():
        entry, p = stored[name], piece(tensor, 0, 1)
        if entry.shape != p.shape:
            raise ValueError(f"{name} is {list(entry.shape)}, not {list(p.shape)}")
        for part in entry.parts:
            wanted.setdefault(part, []).append((name, p))
    for path in dict.fromkeys(path for path, _ in wanted):
        with safe_open(path, "pt") as file:
            for (_, key), pieces in ((part, ps) for part, ps in wanted.items() if part[0] == path):
                for name, p in pieces:
                    filled[name] += _copy(file, key, stored[name].parts[path, key], p)
    for name, tensor in tensors.items():
        if filled[name] != piece(tensor, 0, 1).local.numel():
            raise ValueError(f"{name} is not whole: a part of it is in none of the files")


def _copy(file, key: str, offset: tuple[int, ...], p: Piece) -> int:
    """Copies what the part `key` of a file, which begins at `offset`, has of `p`: how many elements."""
    if not p.shape:
        p.local.copy_(file.get_tensor(key))
        return 1
    view = file.get_slice(key)
    source, target = [], []
    for there, length, here, size in zip(offset, view.get_shape(), p.offset, p.local.shape, strict=True):
        begin, end = max(there, here), min(there + length, here + size)
        if begin >= end:
            return 0
        source.append(slice(begin - there, end - there))
        target.append(slice(begin - here, end - here))
    part = p.local[tuple(target)]
    part.copy_(view[tuple(source)])
    return part.numel()


def _content(tensor: Tensor) -> memoryview:
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
