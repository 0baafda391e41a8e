"""The model's configuration as transformers knows it: saved as config.json, loaded by AutoConfig."""

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from glalm.config import ModelConfig


class GLALMConfig(ModelConfig, PreTrainedConfig):
    """A `ModelConfig` (shape, checks and defaults) that is also a transformers config.

    Raises ConfigError (a ValueError) when heads do not divide a width or a size is not positive.
    """

    model_type = "glalm"
    attribute_map = {"num_attention_heads": "num_heads"}  # noqa: RUF012 (transformers reads a plain dict)
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        ModelConfig.__post_init__(self)
        PreTrainedConfig.__post_init__(self, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As transformers has it, with every mixer's options as a mapping."""
        tree = super().to_dict()
        return {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in tree.items()}
