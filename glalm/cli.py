"""The Hydra entry of `glalm train`, `glalm eval` and other commands: compose the config, check it, run, exit."""

import difflib
import faulthandler
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from glalm.config.dial import Dial
from glalm.config.key_help import describe_keys, find_keys
from glalm.config.strict import (
    ConfigError,
    RunError,
    build_dataclass,
    check_overrides,
    default_tree,
    describe_unknown_key,
    join_key,
    require,
)
from glalm.launcher import choose_gpu_of_worker, register_launcher, set_torch_environment
from glalm.progress import INTERRUPTED, protect_output, show_log

# torch's CPU threads wait for each other many times per step, and spin by default. On a machine that does anything
# else, a spinning thread keeps the core from the thread that it waits for: training was 20 times slower. OpenMP reads
# this variable when torch is imported, so it must be set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A wheel has the configs inside of the package; in a clone they are beside it.
PACKAGE = Path(__file__).resolve().parent
CONFIGS = next(path for path in (PACKAGE / "configs", PACKAGE.parent / "configs") if path.is_dir())


# ${dial:NAME,depth,vocabulary} in a config is a property of Dial. Hydra's processes for jobs import this module, too.
OmegaConf.register_new_resolver("dial", lambda name, *sizes: getattr(Dial(*sizes), name), replace=True)


def store_defaults(cls: type) -> None:
    """Register the keys and defaults of `cls` with Hydra under its name, which configs/*.yaml list first.

    With this, --help shows every key and the command line can set it, whether a file names it or not.
    """
    ConfigStore.instance().store(cls.__name__, default_tree(cls))


def compose_config(
    cls: type, config_name: str, overrides: list[str], complete: Callable[[dict], dict] = lambda container: container
):
    """Return the `cls` that the command line `overrides` would make of configs/<config_name>.yaml.

    Args:
        complete: As of `build_config`.
    """
    store_defaults(cls)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return build_config(cls, compose(config_name, protect_names(overrides)), complete)


# What Hydra reads as a number, a truth value or null. As the key of a mapping it may be the name of a source.
NOT_TEXT = r"[+-]?(?:[\d_.]+(?:[eE][+-]?[\d_]+)?|inf|nan)|true|false|null"


def protect_names(overrides: list[str]) -> list[str]:
    """Return overrides in which a backslash precedes keys of mappings that Hydra would not read as text.

    Hydra reads `data.weights={2010_01: 3}` as {201001: 3}, and its grammar has no quotes for keys.
    """
    key = re.compile(rf"(?<=[{{,])(\s*)({NOT_TEXT})(?=\s*:)", re.IGNORECASE)
    return [key.sub(r"\1\\\2", text) if re.match(r"[^=]+=\{", text) else text for text in overrides]


def restore_names(tree):
    """Return a composed config without the backslashes of `protect_names`."""
    if not isinstance(tree, dict):
        return tree
    restored = {}
    for key, value in tree.items():
        is_protected = isinstance(key, str) and re.fullmatch(rf"\\({NOT_TEXT})", key, re.IGNORECASE)
        restored[key[1:] if is_protected else key] = restore_names(value)
    return restored


def build_config(cls: type, tree: DictConfig, complete: Callable[[dict], dict] = lambda container: container):
    """Return the `cls` of a composed config. The mixers of the user's own code that it names are imported.

    Args:
        complete: Returns the config with values from elsewhere. What those name is not imported.
    """
    try:
        container = restore_names(OmegaConf.to_container(tree, resolve=True))
    except InterpolationResolutionError as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    if "model" in container or container.get("mixers"):
        from glalm.model.mixers import import_user_mixers  # This imports torch, for which OMP_WAIT_POLICY must be set.

        mixers = container.get("mixers")
        # Values of a wrong type are refused below.
        import_user_mixers(container.get("model", {}), mixers if isinstance(mixers, list) else [])
    return build_dataclass(cls, complete(container))


def hydra_entry(
    main: Callable[..., int],
    cls: type,
    config_name: str,
    complete: Callable[[dict, list[str], list[str]], dict] = lambda container, overrides, swept: container,
    objective: Callable[..., float | None] = lambda config: None,
) -> None:
    """Run `main` with the config that configs/<config_name>.yaml and the command line make, and exit.

    The command line is checked before anything slow is imported. The exit code is 0; 2 for a wrong config; 1 if the run
    could not continue; 128 + the signal's number if a signal stopped it. Errors of both kinds, and Ctrl-C, print one
    message without a traceback.
    In a sweep (--multirun), a job that fails does not stop the others, unless torchrun started this process. The exit
    code is then that of the first job that failed.

    Args:
        main: Returns 0 or a signal's number.
        cls: The dataclass of the config.
        config_name: A file of configs/, without its suffix.
        complete: Returns the composed config with values from elsewhere, given the overrides of the run, and those of
            them that a sweep has chosen for this run.
        objective: Returns what a sweeper minimizes, given the config, after `main` has returned 0.
    """
    if not faulthandler.is_enabled():
        # A fatal signal (SIGBUS where a file is cut while it is read) prints where it happened. sys.stderr may be no
        # file, so this names its descriptor.
        faulthandler.enable(file=2)
    store_defaults(cls)
    # Hydra's parser refuses `KEY=VALUE --config-dir FOLDER KEY=VALUE`, so all overrides go to the end.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: "=" in argument and not argument.startswith("-"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Without this, Hydra exits with 1 whatever error a job of a sweep has.
    with exit_on_error():
        check_command_line(sys.argv[1:], cls)
        if {"-h", "--help"} & {*sys.argv[1:]}:
            print(describe_command(cls, config_name, sys.argv[1:]))
            sys.exit(0)
        sys.argv[1:] = protect_names(sys.argv[1:])
        register_launcher()  # This imports all plugins, as Hydra does, so it follows the checks.
        command = HydraCommand(main, cls, complete, objective, normalize_overrides(sys.argv[1:]))
        hydra.main(version_base=None, config_path=str(CONFIGS), config_name=config_name)(command)()


@dataclass(frozen=True)
class HydraCommand:
    """What Hydra calls with a composed config, in this process or, by a launcher, in another one.

    Args:
        overrides: Those of the command line. A job of a sweep has others in place of the swept ones.
        main, cls, complete, objective: As in `hydra_entry`. They must be picklable for launchers.
    """

    main: Callable[..., int]
    cls: type
    complete: Callable[[dict, list[str], list[str]], dict]
    objective: Callable[..., float | None]
    overrides: list[str]

    def __call__(self, tree: DictConfig) -> float | None:
        """Run, exit with an error's code or with 128 + a signal's number, or return the objective.

        A job of a sweep raises its error instead, because its launcher collects them.
        """
        hydra_config = HydraConfig.get()
        if hydra_config.mode is not RunMode.MULTIRUN:
            with exit_on_error():
                self._run(tree, swept=[], exits=True)
            return None
        launcher = hydra_config.runtime.choices["hydra/launcher"]
        is_in_this_process = launcher == "basic"
        if not is_in_this_process:
            prepare_process(launcher)
        swept = [override for override in job_overrides() if override not in self.overrides]
        # All processes of torchrun stop at an error of one, whose next run would wait for the others.
        runs_in_lockstep = is_in_this_process and int(os.environ.get("WORLD_SIZE", 1)) > 1
        with exit_on_error() if runs_in_lockstep else report_error(swept):
            config = self._run(tree, swept, exits=is_in_this_process)
        return self.objective(config)

    def _run(self, tree: DictConfig, swept: list[str], exits: bool):
        """Run `main` and return its config. If a signal has stopped it, exit or raise a RunError."""
        config = build_config(self.cls, tree, partial(self.complete, overrides=job_overrides(), swept=swept))
        signum = self.main(config)
        if signum and exits:
            sys.exit(128 + signum)
        if signum:
            raise RunError(f"signal {signum} stopped this job. To resume it, run the same command again.")
        return config


def job_overrides() -> list[str]:
    """Return the overrides of this run. References such as `name=mine-${seed}` are not resolved."""
    return OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)


def launch_jobs(
    cls: type,
    config_name: str,
    task: Callable[[DictConfig], str | None],
    overrides: Iterable[str],
    jobs: list[list[str]],
) -> list[str | None]:
    """Run `task` with the composed config of each job's overrides, by one of Hydra's launchers.

    Args:
        task: Returns None, or the reason of its failure. It must be picklable for launchers of other processes.
        overrides: Those of Hydra: hydra/launcher=NAME, and hydra.launcher.KEY=VALUE.

    Returns:
        None or the reason of a failure, for each job. If the launcher itself fails, that is the reason for all of them,
        although some may have succeeded.
    """
    store_defaults(cls)
    register_launcher()
    is_in_use = GlobalHydra.instance().is_initialized()  # by the command's own entry
    with nullcontext() if is_in_use else initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose(config_name, [*overrides], return_hydra_config=True)
        context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
        launcher = Plugins.instance().instantiate_launcher(context, PreparedTask(task), config)
        try:
            returned = launcher.launch(jobs, initial_job_idx=0)
        except Exception as error:  # For example, joblib's launcher if one of its processes was killed.
            return [f"{type(error).__name__}: {error}"] * len(jobs)
    reasons = []
    for job in returned:
        try:
            reasons.append(job.return_value)
        except Exception as error:  # Reading the value of a job that an error has ended raises that error.
            reasons.append(f"{type(error).__name__}: {error}")
    return reasons


@dataclass(frozen=True)
class PreparedTask:
    """A task of `launch_jobs`, which prepares the process that a launcher has started."""

    task: Callable[[DictConfig], str | None]

    def __call__(self, tree: DictConfig) -> str | None:
        launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
        if launcher != "basic":
            prepare_process(launcher)
        return self.task(tree)


def prepare_process(launcher: str) -> None:
    """Prepare a process that `launcher` has started, as a command's own process is."""
    protect_output()
    show_log()
    if launcher == "joblib":
        choose_gpu_of_worker()
    elif launcher.startswith("submitit"):
        set_torch_environment()


@contextmanager
def report_error(swept: list[str]) -> Iterator[None]:
    """Print the error of a sweep's job with the job's overrides where it happens, and raise it again.

    The sweep's process sees it only after other jobs have ended, and of some launchers without its traceback.
    """
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if not isinstance(error, (ConfigError, RunError)):
            text = traceback.format_exc()
        print(f"{' '.join(swept)}: {text}", file=sys.stderr, flush=True)
        raise


def normalize_overrides(args: list[str]) -> list[str]:
    """Return the overrides of a command line as Hydra's sweepers write those that they do not sweep."""
    given = [arg for arg in args if arg.startswith("~") or ("=" in arg and not arg.startswith("-"))]
    overrides = OverridesParser.create().parse_overrides(given)
    fixed = [override for override in overrides if not override.is_sweep_override()]
    return [f"{override.get_key_element()}={override.get_value_element_as_str()}" for override in fixed]


def describe_command(cls: type, config_name: str, args: list[str]) -> str:
    """Return the help of a command with the meaning of every key, or, of `--help KEY`, of that key and those below.

    Raises:
        ConfigError: There is no such key.
    """
    store_defaults(cls)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        overrides = [arg for arg in args if "=" in arg and not arg.startswith("-")]
        tree = compose(config_name, protect_names(overrides), return_hydra_config=True)
    template = tree.hydra.help.template
    values = restore_names(OmegaConf.to_container(OmegaConf.masked_copy(tree, [*default_tree(cls)]), resolve=False))
    meanings = describe_keys(cls)
    asked = [arg.rstrip(".") for arg in args if "=" not in arg and not arg.startswith("-")]
    if asked:
        return "\n".join(chain.from_iterable(describe_key(key, values, meanings) for key in asked))
    choices = []
    for folder in sorted(path for path in CONFIGS.iterdir() if path.is_dir()):
        choices.append(f"  {folder.name}: {', '.join(sorted(path.stem for path in folder.glob('*.yaml')))}\n")
    lines = "\n".join(format_keys(values, meanings))
    return template.replace("$APP_CONFIG_GROUPS", "".join(choices)).replace("$CONFIG", lines)


def describe_key(key: str, values: dict, meanings: dict[str, str]) -> list[str]:
    """Return the lines of help of a key by its dotted path, or of all keys with that last name."""
    found = [path for path in meanings if path == key or path.endswith(f".{key}")]
    require(len(found) > 0, describe_unknown_key(key, meanings, elsewhere=find_keys(key, meanings)))
    lines = []
    for path in found:
        value = values
        for name in path.split("."):
            value = value[name]
        if isinstance(value, dict) and any(other.startswith(f"{path}.") for other in meanings):
            lines += [f"{path}:  {meanings[path]}", *format_keys(value, meanings, path)]
        else:
            lines += [f"{path}={format_value(value)}", f"  {meanings[path]}"]
    return lines


def format_keys(values: dict, meanings: dict[str, str], where: str = "") -> list[str]:
    """Return a line "key: value  # meaning" for each key, nested ones indented."""
    lines = []
    indent = "  " * (where.count(".") + 1 if where else 0)
    for name, value in values.items():
        path = join_key(where, name)
        is_group = isinstance(value, dict) and any(other.startswith(f"{path}.") for other in meanings)
        text = f"{indent}{name}:" if is_group else f"{indent}{name}: {format_value(value)}"
        sentence = meanings.get(path, "").partition(". ")[0]
        lines.append(f"{text:<36}  # {sentence}" if sentence else text)
        if is_group:
            lines += format_keys(value, meanings, path)
    return lines


def format_value(value) -> str:
    """Return a value as YAML in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn ConfigError, RunError, Hydra's errors of the command line, and Ctrl-C into a message and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)
    except CompactHydraException as error:
        print(error, *filter(None, [error.__cause__]), sep="\n", file=sys.stderr)
        sys.exit(2)
    except (ConfigError, RunError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def check_command_line(args: list[str], cls: type) -> None:
    """Check keys, choices and files before Hydra does, because Hydra's own errors suggest no correction.

    Raises:
        ConfigError: A key of the command line is unknown, a choice does not exist, or a file of configs/ is not YAML.
    """
    check_flags(args, cls)
    check_overrides(args, cls, [folder.name for folder in CONFIGS.iterdir() if folder.is_dir()])
    check_choices(args)
    check_config_files()
    check_plugins(args)


# The launchers and sweepers of Hydra that an extra of glalm, or a package, installs.
PLUGIN_SOURCES = dict.fromkeys(("joblib", "submitit_local", "submitit_slurm", "optuna"), "'glalm[sweeps]'")
PLUGIN_SOURCES["ray"] = "hydra-ray-launcher"


def check_plugins(args: list[str]) -> None:
    """Raise ConfigError for a launcher or sweeper of Hydra that is not installed, or for an option that it lacks."""
    overrides = dict(arg.split("=", 1) for arg in args if arg.startswith("hydra") and "=" in arg)
    for kind in ("launcher", "sweeper"):
        options = [key for key in overrides if key.startswith(f"hydra.{kind}.")]
        choice = overrides.get(f"hydra/{kind}", "basic")
        if choice == "basic" and not options:
            continue
        register_launcher()  # This also imports the plugins, which register what they offer.
        installed = [name.removesuffix(".yaml") for name in ConfigStore.instance().list(f"hydra/{kind}")]
        if choice not in installed and choice in PLUGIN_SOURCES:
            raise ConfigError(f"hydra/{kind}={choice} needs another package: pip install {PLUGIN_SOURCES[choice]}")
        require(choice in installed, f"hydra/{kind} has no {choice}; {describe_choices(choice, installed)}")
        known = [str(name) for name in ConfigStore.instance().load(f"hydra/{kind}/{choice}.yaml").node]
        for name in (key.split(".")[2] for key in options):
            require(name in known, describe_unknown_key(name, known, f"hydra.{kind}"))


def describe_choices(wrong: str, choices: list[str]) -> str:
    """Return the end of an error message about a wrong choice: the nearest one, and all of them."""
    matches = difflib.get_close_matches(wrong, choices, n=1)
    suggestion = f"did you mean {matches[0]}? " if matches else ""
    return f"{suggestion}choices: {', '.join(choices)}"


HYDRA_FLAGS = ("help", "hydra-help", "version", "cfg", "resolve", "package", "run", "multirun", "info")
HYDRA_PREFIXES = ("config-", "shell-", "experimental-")


def check_flags(args: list[str], cls: type) -> None:
    """Raise ConfigError for a flag that is a key, such as `--steps 5`, and for a value without its key."""
    refuse_bare_values(args, cls)
    for i, arg in enumerate(args):
        flag, equals, value = arg.removeprefix("--").partition("=")
        is_hydra_flag = flag.startswith(HYDRA_PREFIXES) or any(known.startswith(flag) for known in HYDRA_FLAGS)
        if not arg.startswith("--") or is_hydra_flag:
            continue
        if not equals and i + 1 < len(args):
            value = args[i + 1]
        keys = find_keys(flag.replace("-", "_"), describe_keys(cls))
        hint = " or ".join(f"{key}={value or 'VALUE'}" for key in keys) or "KEY=VALUE; --help lists the keys"
        raise ConfigError(f"{arg} is no flag. Write {hint}")


def refuse_bare_values(args: list[str], cls: type) -> None:
    """Raise ConfigError for a value that has neither a key nor a flag before it, such as the `demo` of `eval demo`."""
    if {"-h", "--help"} & {*args}:
        return  # Keys to explain may follow.
    for previous, arg in pairwise(["", *args]):
        takes_value = previous.startswith("-") and "=" not in previous and previous not in ("-m", "--multirun")
        if "=" not in arg and not arg.startswith(("-", "~")) and not takes_value:
            hint = f", such as name={Path(arg).name}" if "name" in describe_keys(cls) else ""
            raise ConfigError(f"{arg} is no setting. Write KEY=VALUE{hint}; --help lists the keys")


def check_choices(args: list[str]) -> None:
    """Raise ConfigError if a choice such as `model=gla_tiny` does not name one file of configs/."""
    adds_folders = any(arg.startswith(("--config-", "-cd", "-cp", "hydra.searchpath=")) for arg in args)
    for arg in args:
        group, equals, value = arg.partition("=")
        files = sorted(path.stem for path in CONFIGS.glob("*/*.yaml") if path.parent.name == group)
        if not equals or not files:
            continue  # It is not a choice.
        # Hydra would merge the files of a list: the last one's values, and what only the others set.
        require(
            "[" not in value,
            f"{arg} is a list, but a run has one file of {group}. Write {group}={value.strip('[]').split(',')[0]}, or "
            f"{group}=A,B with --multirun for a run of each",
        )
        if adds_folders or "(" in value:
            continue  # The user adds other folders to choose from, or this is a sweep by Hydra's functions.
        for choice in value.strip("'\"").split(","):  # --multirun accepts several choices.
            problem = f"{group}={choice} is not a file of {CONFIGS / group}"
            require(choice in files, f"{problem}; {describe_choices(choice, files)}")


def check_config_files() -> None:
    """Raise ConfigError for the first file of configs/ that is not YAML, for which Hydra would print a traceback."""
    for path in sorted(CONFIGS.rglob("*.yaml")):
        try:
            yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {error}") from error
