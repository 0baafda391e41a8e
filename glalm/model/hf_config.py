"""The model's configuration as transformers knows it: saved as config.json, loaded by AutoConfig."""

import dataclasses
import difflib
from typing import Any

from transformers import PreTrainedConfig

from glalm.compat import fla
from glalm.config.strict import require
from glalm.model.config import ModelConfig

FIELDS = [f.name for f in dataclasses.fields(ModelConfig)]


class GLALMConfig(ModelConfig, PreTrainedConfig):
    """A `ModelConfig` (shape, checks and defaults) that is also a transformers config.

    A config.json of another library that glalm.compat.fla reads becomes one too. A key that neither we nor
    transformers know is kept, as everywhere in transformers, unless it looks like one of ours misspelt.

    Raises ConfigError (a ValueError) when heads do not divide a width, a size is not positive or a key is misspelt.
    """

    model_type = "glalm"
    attribute_map = {"num_attention_heads": "num_heads"}  # noqa: RUF012 (transformers reads a plain dict)
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        for key in kwargs:
            near = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.85)
            require(not near or hasattr(PreTrainedConfig, key), f"unknown key {key}; did you mean {near and near[0]}?")
        ModelConfig.__post_init__(self)
        PreTrainedConfig.__post_init__(self, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        tree, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return fla.config_in(tree), unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        # A config.json may name an attention kernel, which would be fetched from the hub and run, and a pickle to load.
        tree = fla.config_in(config_dict)
        safe = {k: v for k, v in tree.items() if "_implementation" not in k and k != "transformers_weights"}
        for name in kwargs.keys() & set(FIELDS):  # transformers would set them after all checks, a mapping as it is
            old, new = safe.get(name), kwargs.pop(name)
            safe[name] = old | new if isinstance(old, dict) and isinstance(new, dict) else new
        return super().from_dict(safe, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As transformers has it, with every mixer's options as a mapping."""
        tree = super().to_dict()
        return {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in tree.items()}
