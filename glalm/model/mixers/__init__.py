"""The registry of token mixers: the names that `model.mixer` and `model.layers` may contain."""

import difflib
from collections.abc import Iterable
from importlib import import_module

from glalm.config.strict import ConfigError, require
from glalm.model.mixers.attention import Attention
from glalm.model.mixers.base import Mixer
from glalm.model.mixers.deltanet import DeltaNet
from glalm.model.mixers.gated_deltanet import GatedDeltaNet
from glalm.model.mixers.gla import GatedLinearAttention
from glalm.model.mixers.kda import KimiDeltaAttention
from glalm.model.mixers.linear import LinearAttention
from glalm.model.mixers.mamba import Mamba
from glalm.model.mixers.mamba2 import Mamba2
from glalm.model.mixers.regla import ReGLA
from glalm.model.mixers.retention import Retention

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
}


def options_by_name() -> dict[str, type]:
    """Return the dataclass of options for every key `model.<name>` that a mixer has. Related mixers may share one."""
    return {mixer.options_name: mixer.Options for mixer in MIXERS.values() if mixer.options_name and mixer.Options}


def check_mixer_name(key: str, name: str) -> None:
    """Raise ConfigError if no mixer is registered as `name`. `key` is the key of the config that names it."""
    if name in MIXERS:
        return
    if ":" in name:
        hint = (
            ". `glalm train` imports a package.module:Class in model.mixer, and `glalm eval` in mixers; elsewhere, "
            "call glalm.model.mixers.import_mixer first"
        )
    else:
        near = difflib.get_close_matches(name, MIXERS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{key}={name!r} is none of the mixers: {', '.join(MIXERS)}{hint}")


def register_mixer(name: str, mixer: type[Mixer]) -> None:
    """Make `mixer` available as `model.mixer=name`, and to config.json files that name it.

    Raises ConfigError if the name is taken by another class, or if the mixer has its own Options class: only mixers of
    this package can add keys to the model's config.
    """
    require(MIXERS.get(name, mixer) is mixer, f"the mixer name {name!r} is taken by another class")
    require(
        mixer.options_name is None or options_by_name().get(mixer.options_name) is mixer.Options,
        f"the mixer {name!r} has options of its own (model.{mixer.options_name}), which only a mixer inside glalm can "
        "have; make them constants of the class",
    )
    MIXERS[name] = mixer


def import_mixer(path: str) -> None:
    """Import and register the mixer that a command line names as `package.module:Class`.

    Only for what the user typed or wrote into a config of their own: importing a module runs its code, so a config.json
    must never reach this function.

    Raises ConfigError if there is no such module or class, or if the class is not a Mixer.
    """
    module_name, _, class_name = path.partition(":")
    try:
        mixer = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"model.mixer={path} cannot be imported ({error}). Write package.module:Class, and put the folder that "
            "contains the package on PYTHONPATH."
        ) from error
    require(
        isinstance(mixer, type) and issubclass(mixer, Mixer),
        f"model.mixer={path} is not a subclass of glalm.model.mixers.base.Mixer",
    )
    register_mixer(path, mixer)


def import_user_mixers(model: dict, more: Iterable[str] = ()) -> None:
    """Import every `package.module:Class` in `more`, and in `mixer` and `layers` of a model's config by the user.

    `layers` is a list or a pattern such as "3*gla+package.module:Class".
    """
    layers = model.get("layers") or []
    parts = layers.split("+") if isinstance(layers, str) else layers
    for name in (model.get("mixer"), *parts, *more):
        path = str(name).replace(" ", "").rpartition("*")[2]
        if ":" in path and path not in MIXERS:
            import_mixer(path)
