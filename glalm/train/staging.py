"""Slices of tensors: which ones this rank saves, their copies in host memory, and the safetensors files that hold them.

A DTensor (FSDP2, HSDP) is saved as the local shards of its ranks. Any other tensor is the same on all ranks, and one of
them saves it. The header of each file says where its slices lie in the full tensors, so a reader copies what it needs
from any set of files. Between saving and loading, the number of ranks may change, and DDP may become FSDP2.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from glalm.config.strict import RunError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SLICES = "slices"  # the key of a file's metadata that maps its entries to slices of full tensors


class CheckpointError(RunError):
    """A checkpoint is missing, damaged, of another model, or could not be saved."""


@dataclass
class TensorSlice:
    """The part of a tensor that this rank holds.

    `data` begins at `offset` in the full tensor, which has `full_shape`. `replicas` ranks hold the same slice, and this
    rank is number `replica` of them.
    """

    data: Tensor
    offset: tuple[int, ...]
    full_shape: tuple[int, ...]
    replica: int = 0
    replicas: int = 1


SlicesByFile = dict[str, dict[str, TensorSlice]]  # by file name, then by tensor name


def local_slice(tensor: Tensor, rank: int = 0, world_size: int = 1) -> TensorSlice:
    """Return the slice of `tensor` that this rank holds, without a copy.

    Raises:
        ValueError: The tensor is placed in a way that is not one slice per rank.
    """
    if not isinstance(tensor, DTensor):
        return TensorSlice(tensor.detach(), (0,) * tensor.dim(), tuple(tensor.shape), rank, world_size)
    shape = list(tensor.shape)
    offset = [0] * tensor.dim()
    replica = 0
    replicas = 1
    for mesh_dim, placement in enumerate(tensor.placements):
        index = tensor.device_mesh.get_local_rank(mesh_dim)
        parts = tensor.device_mesh.size(mesh_dim)
        if type(placement) is Replicate:
            replica = replica * parts + index
            replicas *= parts
        elif type(placement) is Shard:
            # A dimension is cut as torch.chunk cuts it: all shards but the last ones have the same size.
            dim = placement.dim
            shard_size = -(-shape[dim] // parts)
            start = min(shard_size * index, shape[dim])
            offset[dim] += start
            shape[dim] = min(shard_size, shape[dim] - start)
        else:
            raise ValueError(f"A tensor placed as {placement} cannot be saved. Shard it evenly or replicate it.")
    data = tensor.to_local().detach()
    if list(data.shape) != shape:
        raise ValueError(f"A shard has shape {list(data.shape)}, but {tensor.placements} should give {shape}.")
    return TensorSlice(data, tuple(offset), tuple(tensor.shape), replica, replicas)


def slices_to_save(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, TensorSlice]:
    """Return the slices that this rank saves, so that each slice is saved once and the ranks save about equally much.

    Of the ranks that hold a slice, the one with the fewest bytes so far saves it. All ranks compute the same
    assignment, so they need not communicate.
    """
    assigned: dict[str, TensorSlice] = {}
    bytes_by_replicas: dict[int, list[int]] = {}  # number of replicas -> bytes that each replica saves so far
    for name, tensor in tensors.items():
        held = local_slice(tensor, rank, world_size)
        loads = bytes_by_replicas.setdefault(held.replicas, [0] * held.replicas)
        writer = loads.index(min(loads))
        loads[writer] += held.data.nbytes
        is_empty_shard = held.data.numel() == 0 and math.prod(held.full_shape) > 0
        if writer == held.replica and not is_empty_shard:
            assigned[name] = held
    return assigned


class HostBuffers:
    """Host memory for a copy of the tensors that a thread writes while training changes the originals.

    The buffers are pinned and reused: allocating pinned memory is as slow as writing the checkpoint.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def allocate(self, files: SlicesByFile) -> None:
        """Allocate the buffers that do not exist yet. Raise RuntimeError if there is not enough host memory."""
        for slices in files.values():
            for name, held in slices.items():
                buffer = self._buffers.get(name)
                if buffer is None or buffer.shape != held.data.shape or buffer.dtype != held.data.dtype:
                    self._buffers[name] = torch.empty_like(held.data, device="cpu", pin_memory=held.data.is_cuda)

    def stage(self, files: SlicesByFile) -> SlicesByFile:
        """Queue a copy of all slices on the current CUDA stream. Call `synchronize` before you read the copies."""
        self.allocate(files)
        staged: SlicesByFile = {}
        for file, slices in files.items():
            staged[file] = {}
            for name, held in slices.items():
                copy = self._buffers[name].copy_(held.data, non_blocking=True)
                staged[file][name] = replace(held, data=copy)
        if torch.cuda.is_initialized():
            self._copied = torch.cuda.current_stream().record_event()
        return staged

    def synchronize(self) -> None:
        """Wait until the copies that were queued last have arrived."""
        if self._copied is not None:
            self._copied.synchronize()


def encode_safetensors(slices: Mapping[str, TensorSlice]) -> Iterator[bytes | memoryview]:
    """Yield the content of a safetensors file tensor by tensor, so that no second copy of all of them is in memory."""
    # Large elements come first: this aligns every tensor without padding.
    entries = sorted(slices.items(), key=lambda entry: -entry[1].data.element_size())
    tensors = {}
    positions = {}
    end = 0
    for name, held in entries:
        # A full tensor keeps its own name.
        is_full = held.data.shape == held.full_shape
        key = name if is_full else f"{name}@{','.join(map(str, held.offset))}"
        start = end
        end += held.data.nbytes
        dtype = DTYPE_NAMES[held.data.dtype]
        tensors[key] = {"dtype": dtype, "shape": list(held.data.shape), "data_offsets": [start, end]}
        if not is_full:
            positions[key] = {"name": name, "offset": held.offset, "shape": held.full_shape}
    header = json.dumps({"__metadata__": {"format": "pt", SLICES: json.dumps(positions)}, **tensors}).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little")
    yield header
    for _, held in entries:
        yield held.data.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass
class StoredSlice:
    file: Path
    key: str
    offset: tuple[int, ...]


@dataclass
class StoredTensor:
    """A full tensor as a set of files holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    slices: list[StoredSlice] = field(default_factory=list)


def index_safetensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the full tensors of which `files` hold slices, by name."""
    stored: dict[str, StoredTensor] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            positions = json.loads((file.metadata() or {}).get(SLICES, "{}"))
            for key in file.keys():  # noqa: SIM118 (a safe_open file is not a dict)
                view = file.get_slice(key)
                shape = view.get_shape()
                position = positions.get(key, {"name": key, "offset": [0] * len(shape), "shape": shape})
                full = StoredTensor(tuple(position["shape"]), DTYPES[view.get_dtype()])
                full = stored.setdefault(position["name"], full)
                full.slices.append(StoredSlice(path, key, tuple(position["offset"])))
    return stored


def read_tensors(stored: Mapping[str, StoredTensor], tensors: Mapping[str, Tensor]) -> None:
    """Read each of `tensors` in place. Of a DTensor, read only the local shard. See `read_slices`."""
    read_slices(stored, {name: local_slice(tensor) for name, tensor in tensors.items()})


@torch.no_grad()
def read_slices(stored: Mapping[str, StoredTensor], targets: Mapping[str, TensorSlice]) -> None:
    """Copy into the data of each target what the files hold of it.

    Raises:
        CheckpointError: A stored tensor has another shape than its target, or the files lack a part of it.
    """
    sources: dict[Path, list[tuple[str, StoredSlice]]] = defaultdict(list)
    for name, target in targets.items():
        full = stored[name]
        for source in full.slices:
            sources[source.file].append((name, source))
        if full.shape != target.full_shape:
            shapes = f"{list(full.shape)}, not {list(target.full_shape)}"
            raise CheckpointError(f"{full.slices[0].file}: {name} has shape {shapes}")
    copied = dict.fromkeys(targets, 0)
    for path, entries in sources.items():
        with safe_open(path, "pt") as file:
            for name, source in entries:
                copied[name] += _copy_overlap(file, source, targets[name])
    for name, target in targets.items():
        if copied[name] != target.data.numel():
            raise CheckpointError(f"{stored[name].slices[0].file.parent}: a part of {name} is in none of the files")


def _copy_overlap(file: safe_open, source: StoredSlice, target: TensorSlice) -> int:
    """Copy the elements that a stored slice and `target` have in common, and return their number."""
    view = file.get_slice(source.key)
    source_ends = [offset + size for offset, size in zip(source.offset, view.get_shape(), strict=True)]
    target_ends = [offset + size for offset, size in zip(target.offset, target.data.shape, strict=True)]
    starts = list(map(max, source.offset, target.offset))
    ends = list(map(min, source_ends, target_ends))
    if any(start >= end for start, end in zip(starts, ends, strict=True)):
        return 0
    overlap = target.data[_relative_index(starts, ends, target.offset)]
    overlap.copy_(view[_relative_index(starts, ends, source.offset)])
    return overlap.numel()


def _relative_index(starts: list[int], ends: list[int], offset: tuple[int, ...]) -> tuple[slice, ...]:
    """Return the index of the box from `starts` to `ends` in a slice that begins at `offset`."""
    return tuple(slice(start - o, end - o) for start, end, o in zip(starts, ends, offset, strict=True))
