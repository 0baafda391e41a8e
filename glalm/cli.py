"""The Hydra entry that train.py and eval.py share."""

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from glalm.config.strict import ConfigError, RunError, build_dataclass, check_overrides, default_tree, require

# torch's CPU threads wait for each other many times a step, by default spinning. On a machine that does anything
# else, a spinning thread keeps the core from the one it waits for: training was 20 times slower. OpenMP reads this as
# torch is imported, so it stands before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
if not CONFIGS.is_dir():  # a wheel has the package alone
    raise ImportError(f"{CONFIGS} is missing: commands run from a clone, installed by `pip install -e .` there")


def store_defaults(cls: type) -> None:
    """Register the keys and defaults of `cls` with Hydra under its name, which configs/*.yaml list first.

    With this, --help shows every key and the command line can set it, whether a file names it or not.
    """
    ConfigStore.instance().store(cls.__name__, default_tree(cls))


def compose_config(cls: type, config_name: str, overrides: list[str]):
    """Return the `cls` that the command line `overrides` would make of configs/<config_name>.yaml."""
    store_defaults(cls)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return build_config(cls, compose(config_name, overrides))


def build_config(cls: type, tree: DictConfig):
    """Return the `cls` of a composed config. The mixers of the user's own code that it names are imported."""
    container = OmegaConf.to_container(tree, resolve=True)
    if "model" in container:
        from glalm.model.mixers import import_user_mixers  # This imports torch, for which OMP_WAIT_POLICY must be set.

        import_user_mixers(container["model"])
    return build_dataclass(cls, container)


def hydra_entry(main: Callable[..., int], cls: type, config_name: str) -> None:
    """Composes configs/<config_name>.yaml with the command line, builds a `cls` of it and ends with main(config).

    A config that cannot be run ends with its message alone and exit code 2, a run that cannot go on likewise with 1;
    a main that was stopped by a signal with 128 + signal, as shells have it. Of a sweep (--multirun) by one process,
    configs that cannot be run keep none of the others from it.
    """
    refused = []
    store_defaults(cls)

    @hydra.main(version_base=None, config_path=str(CONFIGS), config_name=config_name)
    def entry(tree: DictConfig) -> None:
        def run() -> int:
            try:
                return main(build_config(cls, tree))
            except ConfigError as error:
                if HydraConfig.get().mode is not RunMode.MULTIRUN or int(os.environ.get("WORLD_SIZE", 1)) > 1:
                    raise
                print(f"ConfigError: {error}", file=sys.stderr, flush=True)
                refused.append(error)
                return 0

        if signum := _explain(run):  # else --multirun goes on with its next
            sys.exit(128 + signum)

    groups = [p.name for p in CONFIGS.iterdir() if p.is_dir()]
    _explain(lambda: (check_overrides(sys.argv[1:], cls, groups), check_choices(sys.argv[1:]), check_files()))
    entry()
    if refused:
        sys.exit(2)


def check_choices(args: list[str]) -> None:
    """Checks the choices of a command line (`model=gla_tiny`) before Hydra sees them, since its own error names no
    neighbour. Raises ConfigError at the first that is no file of configs/."""
    if any(arg.startswith(("--config-", "-cd", "-cp")) for arg in args):
        return  # there are other folders to choose from
    for arg in args:
        group, _, given = arg.partition("=")
        files = sorted(p.stem for p in CONFIGS.glob("*/*.yaml") if p.parent.name == group)
        if not files or any(bracket in given for bracket in "[("):
            continue  # a list, or a sweep by Hydra's functions
        for choice in given.strip("'\"").split(","):  # --multirun takes several
            near = difflib.get_close_matches(choice, files, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            choices = f"{hint}choices: {', '.join(files)}"
            require(choice in files, f"{group}={choice} is no file of {CONFIGS / group}; {choices}")


def check_files() -> None:
    """ConfigError for the first file of configs/ that is no YAML: Hydra shows a page of its own code for it."""
    for path in sorted(CONFIGS.rglob("*.yaml")):
        try:
            yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {error}") from error


def _explain(call: Callable):
    try:
        return call()
    except (ConfigError, RunError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
