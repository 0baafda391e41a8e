"""Which run a command is about: it continues a run from its run.json, and each run of a sweep has a name of its own.

A key that the command line does not give is as run.json has it.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from shlex import quote

from glalm.config.run import RUN_RECORD
from glalm.config.strict import flatten_tree, require

MAX_NAME_BYTES = 200  # of a sweep's run; a folder's name has at most 255, and others are derived from it
RUN_KEYS = ("name", "runs_dir", "resume")  # They say which run it is, wherever its folder lies now.


def complete_from_run(tree: dict, overrides: Iterable[str]) -> dict:
    """Return the config of a command that continues a run, or `tree` if the command starts one.

    A key that the command line gives has its value in `tree`, and all others have that of run.json. A choice such as
    `model=gla_small` gives every key of its group, and an experiment every key. The first process prints what was taken
    from run.json.

    Args:
        tree: The composed config of a TrainingRun.
        overrides: The command line without flags, such as `train.steps=3` and `model=gla_small`.

    Raises:
        ConfigError: `resume` is not the folder of a run, or is given together with `name` or `runs_dir`. Or the run has
            a mixer of the user's own code, which the command line does not name.
    """
    given = list_keys(overrides)
    if tree["resume"] is not None:
        tree = _locate_run(tree, given)
    path = Path(tree["runs_dir"]).expanduser() / tree["name"] / RUN_RECORD
    try:
        # A pipe of this name would be waited for.
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):  # Of a file that nests too deeply, json raises the last.
        record = None
    # A damaged run.json counts as none: the config of the command line is then compared with that of the checkpoints.
    saved = record.get("config") if isinstance(record, dict) else None
    is_run = isinstance(saved, dict) and isinstance(saved.get("model"), dict)
    if record is None or not is_run or "experiment" in given:
        return tree
    config = json.loads(json.dumps(record["config"]))
    keys = [*RUN_KEYS, *(key for key in given if key.partition(".")[0] in tree)]
    if record.get("saved") is not None:
        # The run has trained with the changed values, which run.json has. It does not allow further changes.
        keys.append("train.allow_changes")
    for key in keys:
        _copy_key(tree, config, key.split("."))
    _refuse_unnamed_code(config, tree, path)
    composed = flatten_tree(tree)
    taken = [f"{key}={value}" for key, value in flatten_tree(config).items() if composed.get(key) != value]
    if taken and int(os.environ.get("RANK", 0)) == 0:
        print(f"{tree['name']} is continued with these values of {path}: {', '.join(taken)}", flush=True)
    return config


def _refuse_unnamed_code(config: dict, tree: dict, path: Path) -> None:
    """Raise ConfigError if `config`, that of run.json at `path`, has a mixer of the user's own that `tree` lacks."""
    for key in ("mixer", "layers"):
        value = config["model"].get(key)
        text = value if isinstance(value, str) else f"[{','.join(value or [])}]"
        require(
            ":" not in text or tree["model"][key] == value,
            f"add 'model.{key}={text}' to the command, because code is only imported if a command names it, and {path} "
            "names a mixer of your own",
        )


def list_keys(overrides: Iterable[str]) -> list[str]:
    """Return the keys of overrides: those of `train.steps=3` and `optim@stages.x=muon` are train.steps and stages.x."""
    keys = []
    for override in overrides:
        key, _, package = override.lstrip("+~").partition("=")[0].partition("@")
        keys.append(package or key)
    return keys


def refuse_unknown_name(tree: dict, overrides: Iterable[str]) -> None:
    """Raise ConfigError if a command gives a name alone, which continues a run, and is likely to mean another run.

    That is if no run has this name, and a run has a similar one, or the data of a new run would be missing.

    Args:
        tree, overrides: As of `complete_from_run`.
    """
    given = list_keys(overrides)
    runs_dir = Path(tree["runs_dir"]).expanduser()
    name = tree["name"]
    folder = runs_dir / name
    if "name" not in given or not set(given) <= set(RUN_KEYS) or (folder / RUN_RECORD).exists():
        return
    hint = suggest_run(runs_dir, name, "name=")
    data = tree["data"]["path"]
    require(
        not hint and Path(data).expanduser().is_dir(),
        f"{folder} holds no run to continue, because it has no {RUN_RECORD}.{hint} To start a run of this name, write "
        f"its settings, too, such as: glalm train {quote(f'name={name}')} model=gla_10m {quote(f'data.path={data}')}",
    )


def suggest_run(runs_dir: Path, name: str, before: str) -> str:
    """Return " Did you mean ...?" with the run in `runs_dir` whose name is like `name`, or an empty text.

    Args:
        before: What the suggested argument has before the name, such as "name=".
    """
    names = [path.parent.name for path in runs_dir.glob(f"*/{RUN_RECORD}")]
    near = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {before}{near[0]}?" if near else ""


def describe_missing_run(folder: Path, before: str = "", runs_dir: Path | None = None) -> str:
    """Return that `folder` is not that of a run and, if one is likely to be meant, which.

    That is the run of a checkpoint's folder, or one of a similar name.

    Args:
        before: What an argument has before the folder, such as "resume=".
        runs_dir: Where to look for similar names if `folder` is a name alone.
    """
    message = f"{before}{folder} is not the folder of a run, because it has no {RUN_RECORD}."
    run = folder.parent.parent
    if re.fullmatch(r"step_\d+", folder.name) and (run / RUN_RECORD).is_file():
        return f"{message} It is a checkpoint of one: write {quote(f'{before}{run}')}."
    if folder.parent != Path("."):
        runs_dir = folder.parent
    runs_dir = runs_dir or Path("runs")
    return message + suggest_run(runs_dir, folder.name, f"{before}{runs_dir}/")


def name_sweep_run(tree: dict, overrides: Iterable[str], swept: list[str]) -> dict:
    """Return the config of a run of a sweep with a name of its own: the swept keys and values follow the given name.

    For example, `name=mine optim.lr=1e-3,3e-3` are the runs mine-lr-0.001 and mine-lr-0.003. A name that lacks a part
    of a value, such as the slash of data/a, ends with a checksum of all swept values. A name stays as it is if the
    sweep chooses it, if it refers to other keys (`name=mine-${seed}`), or if `resume` names the run.
    """
    chosen = [override.partition("=")[0] for override in swept]
    refers = any(re.match(r"name=.*\$\\?\{", override) for override in overrides)  # Hydra writes $\{ for ${.
    if refers or "name" in chosen or tree["resume"] is not None:
        return tree
    lasts = [key.split(".")[-1] for key in chosen]
    name = tree["name"]
    is_unique = True
    for override, key, last in zip(swept, chosen, lasts, strict=True):
        given = override.partition("=")[2]
        # A name must be writable as name=... again, and be one folder.
        value = re.sub(r"[^\w.+-]+", "_", given).strip("_")
        name += f"-{last if lasts.count(last) == 1 else key}-{value}"
        is_unique = is_unique and value == given
    if not is_unique or len(os.fsencode(name)) > MAX_NAME_BYTES:
        checksum = hashlib.sha256("\n".join([name, *swept]).encode()).hexdigest()[:8]
        name = f"{os.fsencode(name)[: MAX_NAME_BYTES - 9].decode(errors='ignore')}-{checksum}"
    return tree | {"name": name}


def _locate_run(tree: dict, given: Collection[str]) -> dict:
    """Return the tree with the name and runs_dir of the folder that `resume` names."""
    resume = tree["resume"]
    surplus = [f"{key}=..." for key in ("name", "runs_dir") if key in given]
    require(not surplus, f"resume={resume} names the run. Remove {' and '.join(surplus)}")
    folder = Path(os.path.normpath(Path(resume).expanduser()))
    if folder.name in ("", ".."):
        folder = folder.resolve()
    missing = describe_missing_run(folder, "resume=", Path(tree["runs_dir"]))
    require((folder / RUN_RECORD).is_file(), f"{missing} To start a run, write name=...")
    return tree | {"name": folder.name, "runs_dir": str(folder.parent), "resume": None}


def _copy_key(source: dict, target: dict, path: list[str]) -> None:
    """Copy the value at a dotted path, or the tree below it, from one tree to the other."""
    *parents, last = path
    for name in parents:
        source = source[name]
        if not isinstance(target.get(name), dict):
            target[name] = {}
        target = target[name]
    if last in source:
        target[last] = source[last]
    else:
        target.pop(last, None)
