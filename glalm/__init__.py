"""Pretraining of Gated Linear Attention language models, end to end.

Importing this makes transformers' AutoConfig, AutoModel and AutoModelForCausalLM know our models and the checkpoints
of flash-linear-attention that glalm.model.interop reads (unless that package is imported too: then those are its own).
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

__version__ = "0.1.0"

MODEL_TYPES = ("glalm", "gla", "retnet", "transformer")  # what a config.json may say that we read
AUTO = "transformers.models.auto.configuration_auto"


class ConfigOnDemand:
    """Stands in for GLALMConfig in transformers' tables until one is needed: importing the model takes seconds."""

    @staticmethod
    def from_dict(config_dict: dict, **kwargs):
        from glalm.model import GLALMConfig

        return GLALMConfig.from_dict(config_dict, **kwargs)


def register(auto) -> None:
    """Enters our model types in transformers' table, auto.CONFIG_MAPPING, where nobody else has theirs."""
    for name in MODEL_TYPES:
        if name not in auto.CONFIG_MAPPING:
            auto.CONFIG_MAPPING.register(name, ConfigOnDemand)


class RegisterWhenImported(MetaPathFinder):
    """Registers as soon as someone imports the Auto classes, which `import glalm` itself need not wait for."""

    def find_spec(self, name, path=None, target=None):
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        load = spec.loader.exec_module

        def load_and_register(module) -> None:
            load(module)
            register(module)

        spec.loader.exec_module = load_and_register
        return spec


if AUTO in sys.modules:
    register(sys.modules[AUTO])
else:
    sys.meta_path.insert(0, RegisterWhenImported())
