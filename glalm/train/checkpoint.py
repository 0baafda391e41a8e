"""Checkpoints: written beside, verified, then renamed into place; every file with a checksum; no pickle.

    checkpoints/step_N/
        config.json           the model's, as transformers writes it
        model.safetensors     its parameters
        training.safetensors  "optim.<key>.<parameter>": the optimisers' state, whichever they are;
                              "rng.<rank>.<generator>"; whatever tensors the loop adds
        state.json            the cursor: step, processes, and whatever else the loop passes in
        manifest.json         sha256 and size of each file above

Several processes write a part each, model-00002-of-00004.safetensors and so on (see glalm.train.tensors), which any
number of processes read. A folder named step_N is whole: what an interrupted save leaves is named .step_N.tmp, and is
removed at the next start. One that is found damaged is set aside as step_N.damaged.
"""

import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed
from transformers import PreTrainedModel

from glalm.config.strict import RunError
from glalm.data.files import file_sha256, fsync_path
from glalm.train import rng, tensors
from glalm.train.collectives import gather_or_raise, rank_and_world_size
from glalm.train.tensors import Piece

MODEL, TRAINING, STATE, MANIFEST = "model.safetensors", "training.safetensors", "state.json", "manifest.json"


class CheckpointError(RunError):
    """A checkpoint that is missing, damaged or of another model, or could not be written. The message says which."""


@dataclass
class Contents:
    """What this process writes of a checkpoint: pieces of tensors by file, and whole small files, by name."""

    pieces: dict[str, dict[str, Piece]]
    texts: dict[str, str]


# ---------------------------------------------------------------------------------------------------------- writing


def contents(
    step: int,
    model: PreTrainedModel,
    optimizers: Iterable[torch.optim.Optimizer],
    state: Mapping,
    extra: Mapping[str, Tensor] | None = None,
) -> Contents:
    """This process's share of a checkpoint: pieces of the tensors as they are, not copies.

    state: any JSON. extra: more tensors, the same on all processes. Every process must call this alike.
    """
    rank, world = rank_and_world_size()
    parameters = dict(model.named_parameters())
    training = {
        f"optim.{key}.{name}": tensor
        for name, p in parameters.items()
        for optimizer in optimizers
        for key, tensor in sorted(optimizer.state.get(p, {}).items())
    }
    generators = {
        f"rng.{rank}.{name}": Piece(t, (0,) * t.dim(), tuple(t.shape), 0, 1) for name, t in rng.states().items()
    }
    pieces = {
        _part(MODEL, rank, world): tensors.share(parameters, rank, world),
        _part(TRAINING, rank, world): tensors.share({**training, **(extra or {})}, rank, world) | generators,
    }
    texts = {
        "config.json": model.config.to_json_string(),
        STATE: json.dumps({"step": step, "processes": world, **state}, indent=1),
    }
    return Contents(pieces, texts)


def write(folder: Path, step: int, made: Contents, group: distributed.ProcessGroup | None = None) -> Path:
    """Writes folder/step_N, by all processes together, whole or not at all, and returns it. made: see `contents`.

    What was written is read back and compared before the folder gets its name. group: of all processes, over which
    they agree; gloo's. When one of them fails, all of them raise, and nothing is left.
    """
    target, partial = folder / f"step_{step}", folder / f".step_{step}.tmp"
    first = rank_and_world_size()[0] == 0

    def begin() -> bool:
        if first and not target.exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        return first and target.exists()

    def write_parts() -> dict:
        files = {name: tensors.write(partial / name, pieces) for name, pieces in made.pieces.items()}
        for name, text in made.texts.items() if first else ():
            (partial / name).write_text(text)
            fsync_path(partial / name)
            files[name] = {"sha256": file_sha256(partial / name), "bytes": (partial / name).stat().st_size}
        for name, entry in files.items():
            _compare(partial / name, entry, "what was written to it")
        return files

    def finish() -> None:
        if first:
            files = {name: entry for part in parts for name, entry in part.items()}
            (partial / MANIFEST).write_text(json.dumps({"format": 2, "files": dict(sorted(files.items()))}, indent=1))
            fsync_path(partial / MANIFEST)
            fsync_path(partial)
            partial.rename(target)
            fsync_path(folder)
            fsync_path(folder.parent)  # in which `folder` may be new

    try:
        if not any(gather_or_raise(begin, group)):
            parts = gather_or_raise(write_parts, group)
            gather_or_raise(finish, group)
    except Exception:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def prune(folder: Path, keep_last: int, keep_every: int | None = None, keep_best: int = 0) -> None:
    """Removes all checkpoints but the newest, those at multiples of a step, and those of the lowest `val_loss`."""
    there = _steps(folder)
    losses = {step: _val_loss(path) for step, path in there.items()} if keep_best else {}
    best = sorted((loss, step) for step, loss in losses.items() if loss is not None)[:keep_best]
    kept = {*sorted(there)[-keep_last:], *(step for _, step in best)}
    kept |= {step for step in there if keep_every and step % keep_every == 0}
    for step in there.keys() - kept:
        _remove(there[step])


def clean(folder: Path) -> None:
    """Removes what interrupted saves and removals left."""
    for leftover in folder.glob(".step_*.tmp"):
        shutil.rmtree(leftover)


# ---------------------------------------------------------------------------------------------------------- reading


def load(
    path: Path,
    model: PreTrainedModel,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    extra: Mapping[str, Tensor] | None = None,
    verified: bool = False,
) -> dict:
    """Loads a checkpoint into `model`, `optimizers` and `extra` in place and returns its `state`.

    The model may be sharded in another way than the one that was saved. Of `extra`, what the checkpoint has not, or
    has in another shape, is left alone. Raises CheckpointError naming the file when one is missing or damaged (unless
    `verified` already), or holds other parameters than the model's.
    """
    if not verified:
        verify(path)
    parameters = dict(model.named_parameters())
    try:
        saved = tensors.index(_files(path, MODEL))
        _same_names(path, saved.keys(), parameters.keys())
        tensors.read(saved, parameters)
        optimizers = list(optimizers)
        if optimizers or extra:
            saved = tensors.index(_files(path, TRAINING))
            wanted = {n: t for n, t in (extra or {}).items() if n in saved and saved[n].shape == tuple(t.shape)}
            tensors.read(saved, wanted | _optimizer_state(path, saved, parameters, optimizers))
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return read_state(path)


def load_generators(path: Path, seed: int) -> None:
    """Sets this process's random number generators to what the checkpoint has of this rank.

    Where it was written by another number of processes they are seeded from (seed, step, rank) instead.
    """
    rank, world = rank_and_world_size()
    state = read_state(path)
    if state["processes"] != world:
        return rng.reseed(seed, state["step"], rank)
    prefix = f"rng.{rank}."
    saved = {n: s for n, s in tensors.index(_files(path, TRAINING)).items() if n.startswith(prefix)}
    empty = {n: torch.empty(s.shape, dtype=torch.uint8) for n, s in saved.items()}
    tensors.read(saved, empty)
    rng.restore({n.removeprefix(prefix): t for n, t in empty.items()})


def read_state(path: Path) -> dict:
    return json.loads((path / STATE).read_text())


def record(path: Path) -> dict | None:
    """run.json of the run whose checkpoint this is; None where it has been copied away, or to where another run is."""
    path = path.resolve()
    file = path.parent.parent / "run.json"
    found = json.loads(file.read_text()) if file.is_file() else None
    return found if found is not None and found["id"] == read_state(path)["run"] else None


def verify(path: Path, part: int = 0, parts: int = 1) -> None:
    """Raises CheckpointError naming the first file that is missing or differs from its checksum.

    Of several processes, each may look at one of the `parts` of the files.
    """
    for name, entry in sorted(_manifest(path).items())[part::parts]:
        _compare(path / name, entry, f"the checksum in {path / MANIFEST}")


def newest_whole(
    folder: Path, group: distributed.ProcessGroup | None = None, say: Callable[[str], None] = print
) -> Path | None:
    """The newest checkpoint of which every file is as it was written, or None: the same on all processes.

    Each of them verifies a part of the files; the damaged ones that they find on the way are set aside, and told of.
    """
    rank, world = rank_and_world_size()
    [candidates, *_] = gather_or_raise(lambda: [str(p) for p in reversed(_steps(folder).values())], group)
    for path in map(Path, candidates):
        found = [damage for damage in gather_or_raise(lambda path=path: _damage(path, rank, world), group) if damage]
        if not found:
            return path
        if rank == 0:
            aside = set_aside(path, "damaged")
            say(f"warning: {'; '.join(found)}; it is set aside as {aside.name}, and the one before it is taken")
    return None


def set_aside(path: Path, why: str) -> Path:
    """Gives a checkpoint the name step_N.WHY, or step_N.WHY2 and so on, under which nothing looks for it."""
    names = (f"{path.name}.{why}{n}" for n in itertools.chain([""], itertools.count(2)))
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    path.rename(aside)
    return aside


def after(folder: Path, step: int) -> list[Path]:
    """The checkpoints of later steps."""
    return [path for n, path in _steps(folder).items() if n > step]


def latest(folder: Path) -> Path | None:
    """The checkpoint with the highest step, or None. Not verified."""
    return max(_steps(folder).items(), default=(0, None))[1]


def find(folder: Path, name: str) -> Path:
    """The checkpoint called `latest` or `step_N`; CheckpointError listing what there is when it does not exist."""
    path = latest(folder) if name == "latest" else folder / name
    inside = Path(name).name == name and name.strip(".")  # not a path that leads elsewhere
    if path is None or not inside or not path.is_dir():
        there = ", ".join(p.name for p in _steps(folder).values()) or "none"
        raise CheckpointError(f"no checkpoint {name} in {folder} (there: {there})")
    return path


def weights_sha256(path: Path) -> str:
    """What tells this checkpoint's weights from others': the sha256 of model.safetensors, or of its parts' sha256s."""
    sums = [e["sha256"] for name, e in sorted(_manifest(path).items()) if name.startswith(Path(MODEL).stem)]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------- the folder


def _steps(folder: Path) -> dict[int, Path]:
    """Lowest first."""
    found = ((re.fullmatch(r"step_(\d+)", p.name), p) for p in (folder.iterdir() if folder.is_dir() else ()))
    return dict(sorted((int(match[1]), p) for match, p in found if match))


def _part(name: str, rank: int, world: int) -> str:
    stem, suffix = name.split(".")
    return name if world == 1 else f"{stem}-{rank + 1:05d}-of-{world:05d}.{suffix}"


def _files(path: Path, name: str) -> list[Path]:
    """The parts of model.safetensors or training.safetensors."""
    return [path / file for file in _manifest(path) if re.fullmatch(Path(name).stem + r"(-[\d]+-of-[\d]+)?\..*", file)]


def _manifest(path: Path) -> dict[str, dict]:
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{manifest} is missing: {path} is not a complete checkpoint")
    try:
        files = json.loads(manifest.read_bytes())["files"]
        return {name: {"sha256": entry["sha256"], "bytes": entry["bytes"]} for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest} is damaged: {error}") from error


def _compare(file: Path, entry: dict, what: str) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
        raise CheckpointError(f"{file} is damaged: it differs from {what}")


def _damage(path: Path, part: int, parts: int) -> str | None:
    """What `verify` finds. A file that cannot be read (OSError) is another matter: it may be whole."""
    try:
        verify(path, part, parts)
    except CheckpointError as error:
        return str(error)
    return None


def _val_loss(path: Path) -> float | None:
    try:
        loss = read_state(path).get("val_loss")
    except (OSError, ValueError):
        return None  # damaged: what resumes will say so
    return loss if loss is not None and math.isfinite(loss) else None  # NaN has no place in an order


def _remove(path: Path) -> None:
    """Under another name first: a kill in the midst of it must not leave a step_N with files missing."""
    doomed = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _optimizer_state(path: Path, saved: dict, parameters: dict, optimizers: list) -> dict[str, Tensor]:
    """A tensor to read into for each entry of the optimisers' state; they have it from here on."""
    owners = {id(p): (optimizer, group) for optimizer in optimizers for group in optimizer.param_groups
              for p in group["params"]}  # fmt: skip
    made = {}
    for full, stored in saved.items():
        if not optimizers or not full.startswith("optim."):
            continue
        _, key, name = full.split(".", 2)
        if name not in parameters or id(parameters[name]) not in owners:
            raise CheckpointError(f"{path} has optimiser state of {name}, which is not trained now")
        p = parameters[name]
        optimizer, group = owners[id(p)]
        dtype = next(d for d, spelled in tensors.DTYPES.items() if spelled == stored.dtype)
        if stored.shape == tuple(p.shape):
            made[full] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
        else:  # a count of steps, which fused and capturable optimisers keep beside the parameter
            beside = group.get("fused") or group.get("capturable")
            made[full] = torch.zeros(stored.shape, dtype=dtype, device=p.device if beside else "cpu")
        optimizer.state[p][key] = made[full]
    return made


def _same_names(path: Path, there: Iterable[str], wanted: Iterable[str]) -> None:
    if set(there) != set(wanted):
        missing, extra = sorted(set(wanted) - set(there)), sorted(set(there) - set(wanted))
        raise CheckpointError(f"{path} holds another model: missing {missing[:3]}, unexpected {extra[:3]}")
