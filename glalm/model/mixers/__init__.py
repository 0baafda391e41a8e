"""The registry of token mixers: the names that `model.mixer` and `model.layers` may contain."""

import difflib
import inspect
import os
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from glalm.config.strict import ConfigError, require
from glalm.model.mixers.attention import Attention
from glalm.model.mixers.base import Mixer
from glalm.model.mixers.deltanet import DeltaNet
from glalm.model.mixers.gated_deltanet import GatedDeltaNet
from glalm.model.mixers.gla import GatedLinearAttention
from glalm.model.mixers.hyena import Hyena
from glalm.model.mixers.kda import KimiDeltaAttention
from glalm.model.mixers.linear import LinearAttention
from glalm.model.mixers.mamba import Mamba
from glalm.model.mixers.mamba2 import Mamba2
from glalm.model.mixers.memsizer import MemSizer
from glalm.model.mixers.regla import ReGLA
from glalm.model.mixers.retention import Retention
from glalm.model.mixers.rpe_attention import RPEAttention
from glalm.model.mixers.transnormer import TransNormer
from glalm.model.mixers.transnormer_diag import DiagAttention

MIXERS: dict[str, type[Mixer]] = {
    "gla": GatedLinearAttention,
    "attention": Attention,
    "linear": LinearAttention,
    "retention": Retention,
    "regla": ReGLA,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "kda": KimiDeltaAttention,
    "transnormer": TransNormer,
    "transnormer_diag": DiagAttention,
    "memsizer": MemSizer,
    "hyena": Hyena,
    "rpe_attention": RPEAttention,
}
# Installed packages offer mixers under this group of entry points: average = "mypackage.mixers:Average".
ENTRY_POINT_GROUP = "glalm.mixers"


def options_by_name() -> dict[str, type]:
    """Return the dataclass of options for every key `model.<name>` that a mixer has. Related mixers may share one."""
    return {mixer.options_name: mixer.Options for mixer in MIXERS.values() if mixer.options_name and mixer.Options}


def check_mixer_name(key: str, name: str) -> None:
    """Raise ConfigError if no mixer is registered as `name`, and no installed package has an entry point of that name.

    `key` is the key of the config that names it.
    """
    if name not in MIXERS:
        register_entry_point(name)
    if name in MIXERS:
        return
    require(
        ":" not in name,
        f"add 'mixers=[{name}]' to glalm eval, --mixer={name} to glalm export or glalm merge, or '{key}=...' to glalm "
        f"train, because code is only imported if a command names it, and the {key} of this file names {name!r}. "
        f"Elsewhere, call glalm.model.mixers.import_mixer({name!r}) first",
    )
    near = difflib.get_close_matches(name, [*MIXERS, *entry_points(group=ENTRY_POINT_GROUP).names], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{key}={name!r} is none of the mixers: {', '.join(MIXERS)}{hint}")


def register_mixer(name: str, mixer: type[Mixer]) -> None:
    """Make `mixer` available as `model.mixer=name`, and to config.json files that name it.

    Several exported folders may each bring a copy of the same source. The first copy serves them all.

    Raises ConfigError if `mixer` is not a Mixer or lacks a method, if the name is taken by a class with another source,
    or if the mixer has its own Options class: only mixers of this package can add keys to the model's config.
    """
    require(
        isinstance(mixer, type) and issubclass(mixer, Mixer),
        f"model.mixer={name} is not a subclass of glalm.model.mixers.base.Mixer",
    )
    for method in ("forward", "flops"):
        require(
            getattr(mixer, method) is not getattr(Mixer, method),
            f"the mixer {name!r} has no method {method}; glalm.model.mixers.base.Mixer says what it computes",
        )
    require(
        name not in MIXERS or is_same_mixer(MIXERS[name], mixer),
        f"the mixer name {name!r} is taken by another class in this process; load the two models in a process each",
    )
    require(
        mixer.options_name is None or options_by_name().get(mixer.options_name) is mixer.Options,
        f"the mixer {name!r} has options of its own (model.{mixer.options_name}), which only a mixer inside glalm can "
        "have; make them constants of the class",
    )
    MIXERS.setdefault(name, mixer)


def is_same_mixer(a: type[Mixer], b: type[Mixer]) -> bool:
    """Return whether `a` and `b` are one class, or two of the same name from files with the same content."""
    if a is b or a.__qualname__ != b.__qualname__:
        return a is b
    try:
        return Path(inspect.getfile(a)).read_bytes() == Path(inspect.getfile(b)).read_bytes()
    except (OSError, TypeError):  # A class of an interactive session has no file.
        return False


def register_entry_point(name: str) -> None:
    """Register the mixer that an installed package offers as the entry point `name`, if there is one.

    Raises ConfigError if several packages offer it, or if it cannot be imported.
    """
    points = entry_points(group=ENTRY_POINT_GROUP, name=name)
    packages = " and ".join(sorted(point.dist.name for point in points if point.dist))
    require(len(points) < 2, f"the packages {packages} each have a mixer {name!r}; uninstall all but one")
    for point in points:
        try:
            mixer = point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"the mixer {name!r} of the package {packages} cannot be imported ({error})") from error
        register_mixer(name, mixer)


def import_mixer(path: str) -> None:
    """Import and register the mixer that a command line names as `package.module:Class`.

    Only for what the user typed or wrote into a config of their own: importing a module runs its code, so a config.json
    must never reach this function. Modules are also found in the current folder, which Python searches for
    `python FILE` but not for an installed command such as `glalm`.

    Raises ConfigError if there is no such module or class, or if the class is not a Mixer.
    """
    module_name, _, class_name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        if module_name.startswith(".") or not module_name:
            raise ImportError("the module's name is empty or relative")
        mixer = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"model.mixer={path} cannot be imported ({error}). Write package.module:Class. The package or module must "
            "be installed, in the current folder, or in a folder on PYTHONPATH."
        ) from error
    register_mixer(path, mixer)


def import_user_mixers(model: dict, more: Iterable[str] = ()) -> None:
    """Import every `package.module:Class` in `more`, and in `mixer` and `layers` of a model's config by the user.

    `layers` is a list or a pattern such as "3*gla+package.module:Class", and so may be each of `more`.
    """
    layers = model.get("layers") or []
    for pattern in (model.get("mixer"), *([layers] if isinstance(layers, str) else layers), *more):
        for part in str(pattern).replace(" ", "").split("+"):
            path = part.rpartition("*")[2]
            if any(mark in path for mark in ":.") and path not in MIXERS:
                import_mixer(path)
