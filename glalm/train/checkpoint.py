"""Checkpoints: written beside, then renamed into place; every file with a checksum; no pickle.

    checkpoints/step_N/
        config.json  model.safetensors    what transformers' from_pretrained loads
        optimizer.safetensors             "<parameter name>/<exp_avg | exp_avg_sq | step>"
        state.json                        the cursor: step and whatever else the loop passes in
        manifest.json                     sha256 and size of each file above

A folder named step_N is therefore always whole: what an interrupted save leaves is named .step_N.tmp, and is removed
at the next start.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from glalm.data.files import sha256
from glalm.strict import RunError

MODEL, OPTIMIZER, STATE, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)


class CheckpointError(RunError):
    """A checkpoint that is missing, damaged or of another model. The message names the file."""


def save(folder: Path, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: dict) -> Path:
    """Writes folder/step_N whole or not at all, and returns it. `state` is any JSON."""
    target, partial = folder / f"step_{step}", folder / f".step_{step}.tmp"
    if target.exists():
        return target
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.config.save_pretrained(partial)
    # Named parameters, not the state dict: a tied head appears once.
    save_file({n: p.detach() for n, p in model.named_parameters()}, partial / MODEL, {"format": "pt"})
    save_file(_optimizer_tensors(model, optimizer), partial / OPTIMIZER)
    (partial / STATE).write_text(json.dumps({"step": step, **state}, indent=1))
    files = {f.name: {"sha256": sha256(f), "bytes": f.stat().st_size} for f in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=1))
    for path in [*partial.iterdir(), partial]:
        _fsync(path)
    partial.rename(target)
    _fsync(folder)
    return target


def load(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer | None = None, verified: bool = False
) -> dict:
    """Loads a checkpoint into `model` and `optimizer` in place and returns its `state`.

    Raises CheckpointError naming the file when one is missing or damaged (unless `verified` already), or holds other
    parameters than the model's.
    """
    if not verified:
        verify(path)
    tensors, parameters = load_file(path / MODEL), dict(model.named_parameters())
    _same_names(path / MODEL, tensors, parameters)
    with torch.no_grad():
        for name, p in parameters.items():
            if p.shape != tensors[name].shape:
                raise CheckpointError(
                    f"{path / MODEL}: {name} is {list(tensors[name].shape)}, the model's is {list(p.shape)}"
                )
            p.copy_(tensors[name])
    if optimizer is not None:
        for name, tensor in load_file(path / OPTIMIZER).items():
            parameter, _, key = name.rpartition("/")
            p = parameters[parameter]
            optimizer.state[p][key] = tensor.to(p.device)
    return json.loads((path / STATE).read_text())


def verify(path: Path) -> None:
    """Raises CheckpointError naming the first file that is missing or differs from its checksum."""
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path / MANIFEST} is missing: {path} is not a complete checkpoint")
    for name, entry in json.loads((path / MANIFEST).read_text())["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file} is damaged: it differs from the checksum in {path / MANIFEST}")


def latest(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    return max(_steps(folder).items(), default=(0, None))[1]


def find(folder: Path, name: str) -> Path:
    """The checkpoint called `latest` or `step_N`; CheckpointError listing what there is when it does not exist."""
    path = latest(folder) if name == "latest" else folder / name
    if path is None or not path.is_dir():
        there = ", ".join(p.name for p in _steps(folder).values()) or "none"
        raise CheckpointError(f"no checkpoint {name} in {folder} (there: {there})")
    return path


def prune(folder: Path, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints."""
    for step in sorted(_steps(folder))[:-keep]:
        shutil.rmtree(folder / f"step_{step}")


def clean(folder: Path) -> None:
    """Removes what interrupted saves left."""
    for leftover in folder.glob(".step_*.tmp"):
        shutil.rmtree(leftover)


def _steps(folder: Path) -> dict[int, Path]:
    found = ((re.fullmatch(r"step_(\d+)", p.name), p) for p in (folder.iterdir() if folder.is_dir() else ()))
    return dict(sorted((int(match[1]), p) for match, p in found if match))


def _optimizer_tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor
        for name, p in model.named_parameters()
        for key, tensor in optimizer.state.get(p, {}).items()
    }


def _same_names(file: Path, there: dict, wanted: dict) -> None:
    if there.keys() != wanted.keys():
        missing, extra = sorted(wanted.keys() - there.keys()), sorted(there.keys() - wanted.keys())
        raise CheckpointError(f"{file} holds another model: missing {missing[:3]}, unexpected {extra[:3]}")


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
