"""The config of a model: the decoder's shape, and one dataclass of options for every mixer that has some."""

import math
from dataclasses import dataclass, field

from glalm.config.strict import convert_fields, describe_divisors, require, require_positive
from glalm.model.mixers import MIXERS, check_mixer_name, options_by_name


def add_mixer_options(cls: type) -> type:
    """Add the field `<name>: <Options>` to a dataclass for every options name of the registered mixers.

    The fields come from the registry, so that adding a mixer touches no shared file but the registry.
    """
    for name, options in options_by_name().items():
        cls.__annotations__[name] = options
        setattr(cls, name, field(default_factory=options))
    return cls


@dataclass
@add_mixer_options
class ModelConfig:
    """The shape of the decoder. One skeleton serves every mixer; sizes follow the GLA paper (arXiv 2312.06635).

    num_heads, expand_k, expand_v, gate_low_rank_dim and gate_logit_normalizer are shared by the mixers whose state is a
    matrix per head. The options of a single mixer are under its name, for example `gla.short_conv`.
    """

    mixer: str = "gla"  # the mixer of every layer; its name in glalm.model.mixers.MIXERS
    layers: str | list[str] | None = None  # a mixer per layer: "3*gla+attention" or a list, repeated to the last layer
    vocab_size: int | None = None  # null: that of the tokenizer of the training data
    hidden_size: int = 1024  # d, the width of the residual stream
    num_hidden_layers: int = 24  # blocks
    num_heads: int = 4  # of mixers whose state is a matrix for each head
    expand_k: float = 0.5  # width of the keys of all heads together, in units of d
    expand_v: float = 1.0  # width of the values of all heads together, in units of d
    gate_low_rank_dim: int = 16  # rank of the forget gate's projection
    gate_logit_normalizer: float = 16.0  # temperature: log gate = logsigmoid(logit) / gate_logit_normalizer
    intermediate_size: int | None = None  # width of SwiGLU; null: 8/3 d rounded up to a multiple of 256; 0: no SwiGLU
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    initializer_range: float = 0.02  # standard deviation of every initial matrix
    tie_word_embeddings: bool = False  # whether the head shares the weight of the embeddings

    def __post_init__(self):
        # A config.json may hold values of any type, and mappings in place of dataclasses.
        convert_fields(self, ModelConfig, "model")
        if self.intermediate_size is None:
            self.intermediate_size = 256 * math.ceil(self.hidden_size * 8 / 3 / 256)
        require_positive(
            self,
            "model",
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "expand_k", "expand_v"),
            *("gate_low_rank_dim", "gate_logit_normalizer", "norm_eps", "initializer_range"),
            finite=True,
        )
        require(self.intermediate_size >= 0, "model.intermediate_size must be positive, or 0 for no SwiGLU")
        for name in ("expand_k", "expand_v"):
            width = self.hidden_size * getattr(self, name)
            require(
                math.isclose(width, round(width)) and round(width) % self.num_heads == 0,
                f"model.num_heads={self.num_heads} does not divide the width model.hidden_size * model.{name} = "
                f"{width:g}; {describe_divisors(round(width))}",
            )
        for name in dict.fromkeys(self.layer_mixers()):
            MIXERS[name].check_config(self)

    def check_context_support(self, key: str) -> None:
        """Raise ConfigError unless every mixer can share a sequence between processes. `key` names the setting."""
        for name in dict.fromkeys(self.layer_mixers()):
            able = ", ".join(other for other, mixer in MIXERS.items() if mixer.supports_context)
            require(
                MIXERS[name].supports_context,
                f"{key}: the mixer {name} cannot share a sequence between processes; set parallel.context=1, or "
                f"model.mixer to one of {able}",
            )

    @property
    def key_dim(self) -> int:
        """The width of the keys of all heads together."""
        return round(self.hidden_size * self.expand_k)

    @property
    def value_dim(self) -> int:
        """The width of the values of all heads together."""
        return round(self.hidden_size * self.expand_v)

    def layer_mixers(self) -> list[str]:
        """Return the name of each layer's mixer: the pattern in `layers`, repeated and cut to num_hidden_layers."""
        check_mixer_name("model.mixer", self.mixer)
        if self.layers is None:
            return [self.mixer] * self.num_hidden_layers
        pattern = []
        for part in self.layers.split("+") if isinstance(self.layers, str) else self.layers:
            count, _, name = part.replace(" ", "").rpartition("*")
            require(
                not count or (count.isdecimal() and int(count) > 0),
                f'model.layers: {part!r} must be a mixer or a number of layers times one, as in "3*gla+attention"',
            )
            check_mixer_name("model.layers", name)
            pattern += [name] * int(count or 1)
        require(len(pattern) > 0, 'model.layers is empty; write for example "3*gla+attention", or null for model.mixer')
        return [pattern[i % len(pattern)] for i in range(self.num_hidden_layers)]
