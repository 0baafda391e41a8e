"""Run the repository's commands, and reduce what they write to JSON that can be compared."""

import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golden_interface import RENAMED
from safetensors import safe_open

ERROR = re.compile(r"^(\w*Error|error|[\w.]+: error): ", re.MULTILINE)
TIMING = re.compile(r"second|mfu|memory|gib")  # metrics that differ from one run of the same code to the next
# The parts of an evaluation's JSON file that are compared. The others describe the machine, versions and time, or
# repeat the config.
RESULTS = ("evaluator", "parameters", "train_length", "results", "metrics")


class CommandFailed(Exception):
    """A command that must succeed did not."""


@dataclass
class Outcome:
    """The exit code of a command and all that it printed."""

    code: int
    text: str

    @property
    def error(self) -> str:
        """What was printed from the first line on that reports an error."""
        match = ERROR.search(self.text)
        return self.text[match.start() :] if match else ""

    def require_success(self) -> None:
        if self.code != 0:
            last = self.text.strip().splitlines()[-1:]
            raise CommandFailed(self.error or "".join(last) or f"exit code {self.code}")


def run_command(tree: Path, script: str, *arguments: str) -> Outcome:
    """Run a script of the repository in this process, which has imported torch and transformers already.

    A new process would import them again, which takes longer than the tiny runs of this harness.
    """
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    printed, before = io.StringIO(), sys.argv
    sys.argv = [str(tree / script), *arguments]
    code = 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code)
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            sys.argv = before
    return Outcome(code, printed.getvalue())


def run_in_two_processes(tree: Path, commands: dict[str, list[str]]) -> dict[str, Outcome]:
    """Run each command, one after the other, on the same two processes: torchrun starts only once.

    Args:
        tree: The repository.
        commands: For each case a script and its arguments.

    Returns:
        For each case the exit code and the output of the process of rank 0.
    """
    Path("commands.json").write_text(json.dumps(commands))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = [str(Path(__file__).with_name("golden.py")), "--tree", str(tree), "worker", "commands.json"]
    done = subprocess.run([*launcher, *worker], capture_output=True, text=True, timeout=280)
    if done.returncode != 0:
        raise CommandFailed(f"two processes: {done.stderr[-2000:]}")
    return {name: Outcome(**outcome) for name, outcome in json.loads(Path("outcomes.json").read_text()).items()}


def run_worker(tree: Path, path: Path) -> None:
    """Run the commands of the file `path`, as one of the processes that `run_in_two_processes` starts."""
    outcomes = {}
    for name, (script, *arguments) in json.loads(path.read_text()).items():
        outcomes[name] = vars(run_command(tree, script, *arguments))
    if os.environ["RANK"] == "0":
        path.with_name("outcomes.json").write_text(json.dumps(outcomes))


def read_metrics(run: Path) -> dict[str, dict[str, Any]]:
    """Read metrics.jsonl as {metric: {step: value}}, floats in hexadecimal, without speeds and memory."""
    metrics: dict[str, dict[str, Any]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name != "step" and not TIMING.search(name):
                exact = value.hex() if isinstance(value, float) else value
                metrics.setdefault(name, {})[str(row["step"])] = exact
    return metrics


def hash_checkpoint(checkpoint: Path) -> dict[str, str]:
    """Hash the weights and the optimizers' moments of a checkpoint, however many files hold them.

    Random states are left out: they belong to the process, which makes many runs here.
    """
    tensors = read_tensors(checkpoint.glob("*.safetensors"))
    moments = {name: tensor for name, tensor in tensors.items() if name.startswith("optim.")}
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith(("model.", "lm_head."))}
    if not weights or not moments:
        raise CommandFailed(f"{checkpoint} has no weights or no moments, only {sorted(tensors)}")
    return {"weights": hash_tensors(weights), "moments": hash_tensors(moments)}


def describe_run(run: Path, step: int) -> dict:
    """Return the metrics of a run and the hashes of its checkpoint after `step`."""
    return {"metrics": read_metrics(run), **hash_checkpoint(run / "checkpoints" / f"step_{step}")}


def describe_model(folder: Path) -> dict:
    """Return the files of an exported model, its config, and each tensor's shape, dtype and hash."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    tensors = read_tensors(folder.glob("*.safetensors"))
    return {
        "files": sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
        "config": config,
        "tensors": {
            name: [list(tensor.shape), str(tensor.dtype), hash_tensors({name: tensor})]
            for name, tensor in sorted(tensors.items())
        },
    }


def describe_dataset(folder: Path) -> dict[str, Any]:
    """Return each file of a prepared set: JSON as it is, of any other file the sha256.

    The sentences in skipped.jsonl are left out, as wording may change, and so are the checksums of the logs.
    """
    files: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            files[name] = {key: value for key, value in content.items() if key != "logs"}
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            files[name] = [{key: value for key, value in row.items() if key != "detail"} for row in rows]
        else:
            files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return files


def read_evaluations(folder: Path) -> dict[str, dict]:
    """Return what each evaluation in eval/*.json measured."""
    evaluations = {}
    for path in sorted((folder / "eval").glob("*.json")):
        content = json.loads(path.read_text())
        evaluations[path.stem] = {name: content.get(name) for name in RESULTS}
    return evaluations


def read_tensors(paths: Iterable[Path]) -> dict[str, Any]:
    """Read all tensors of several safetensors files. FSDP2's shards of a tensor have names of their own."""
    tensors = {}
    for path in sorted(paths):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no dict)
    return tensors


def hash_tensors(tensors: dict[str, Any]) -> str:
    """Hash names, dtypes, shapes and bytes, in the order of the names."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def translate(value: Any) -> Any:
    """Replace the words of RENAMED, as keys and as whole strings, by those that the reference has."""
    if isinstance(value, dict):
        return {RENAMED.get(key, key): translate(item) for key, item in value.items()}
    if isinstance(value, list):
        return [translate(item) for item in value]
    return RENAMED.get(value, value) if isinstance(value, str) else value
