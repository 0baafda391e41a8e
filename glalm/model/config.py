"""The model's config: the skeleton's, and one small dataclass of options for each mixer."""

import difflib
import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from glalm.config.strict import convert_fields, describe_divisors, require

# The token mixers by name, and where each is defined: imported only when a model is made of it. GLA is the default.
MIXERS = {
    "gla": "glalm.model.mixers.gla.GatedLinearAttention",
    "attention": "glalm.model.mixers.attention.Attention",
    "linear": "glalm.model.mixers.linear.LinearAttention",
    "retention": "glalm.model.mixers.retention.Retention",
    "regla": "glalm.model.mixers.regla.ReGLA",
    "mamba": "glalm.model.mixers.mamba.Mamba",
    "mamba2": "glalm.model.mixers.mamba2.Mamba2",
    "deltanet": "glalm.model.mixers.deltanet.DeltaNet",
    "gated_deltanet": "glalm.model.mixers.gated_deltanet.GatedDeltaNet",
}


@dataclass
class GLAConfig:
    """What the GLA paper ablates, and what others added. The defaults are the paper's model."""

    gate: Literal["vector", "scalar", "fixed", "none"] = "vector"  # one a key channel; one a head; 1 - 2^(-5-h); 1
    min_log_gate: float | None = None  # clamps every log gate from below; null: no clamp
    output_gate: bool = True  # y = norm(o) * swish(x W_r), or norm(o) alone
    short_conv: int = 0  # taps of a causal convolution over q, k and v; 0: none
    num_kv_heads: int | None = None  # fewer than model.num_heads: these share keys, values and gates; null: as many
    feature_map: Literal["identity", "relu"] = "identity"  # of q and k; relu where they come from softmax attention


@dataclass
class AttentionConfig:
    """Softmax attention as in LLaMA."""

    num_heads: int | None = None  # null: heads of 64 channels, or model.num_heads where those do not fit
    num_kv_heads: int | None = None  # fewer than num_heads: grouped-query attention; null: as many
    window: int | None = None  # a token sees itself and the window - 1 tokens before it; null: all
    rope_theta: float = 10000.0


@dataclass
class LinearConfig:
    """Linear attention without a gate."""

    feature_map: Literal["elu1", "relu", "identity", "hedgehog"] = "elu1"
    normalise: bool = True  # divide by the sum of the weights; false: an RMSNorm on every head's output instead


@dataclass
class ReGLAConfig:
    """What the ReGLA paper varies; the defaults are its full model."""

    refined_gate: bool = True  # F = g (g + 2 r (1 - g)) instead of g
    gate_axis: Literal["key", "value"] = "key"  # which axis of the state [K, V] has a gate a channel
    feature_map: Literal["exp", "elu1", "relu", "identity", "hedgehog"] = "exp"  # exp: the normalised exponential
    variance_scale: bool = True  # the exponential map times 1 / (e sqrt(K (e^2 - 1)))
    output_norm: bool = True  # an RMSNorm on every head's output; false: divided by the sum of the weights instead
    initial_forget: float = 0.96  # F of every channel before training; 0.96 is GLA's with a zero bias


@dataclass
class MambaConfig:
    state_size: int = 16
    expand: int = 2  # channels inside: expand * d
    conv: int = 4  # taps


@dataclass
class Mamba2Config:
    state_size: int = 128
    head_dim: int = 64
    expand: int = 2  # channels inside: expand * d
    groups: int = 1  # of heads that share B and C
    conv: int = 4  # taps


@dataclass
class DeltaNetConfig:
    """DeltaNet and, with a gate, Gated DeltaNet."""

    short_conv: int = 4  # taps of a causal convolution over q, k and v; 0: none


POSITIVE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "expand_k", "expand_v", "gate_low_rank_dim"),
    *("gate_logit_normalizer", "norm_eps", "initializer_range"),
    *("attention.num_heads", "attention.num_kv_heads", "attention.rope_theta"),
    *("mamba.state_size", "mamba.expand", "mamba.conv"),
    *("mamba2.state_size", "mamba2.head_dim", "mamba2.expand", "mamba2.groups", "mamba2.conv"),
)


@dataclass
class ModelConfig:
    """The decoder's shape. One skeleton serves every mixer; sizes follow the GLA paper (arXiv 2312.06635).

    The keys up to gate_logit_normalizer are shared by the mixers with a matrix for a state; what a mixer has
    for itself is below, under its name.
    """

    mixer: str = "gla"  # a name in MIXERS, for every layer
    layers: str | list[str] | None = None  # one each: "3*gla+attention" or a list, repeated to the last layer
    vocab_size: int = 32000
    hidden_size: int = 1024  # d, the width of the residual stream
    num_hidden_layers: int = 24
    num_heads: int = 4
    expand_k: float = 0.5  # all heads' keys together are expand_k * d wide
    expand_v: float = 1.0  # all heads' values together are expand_v * d wide
    gate_low_rank_dim: int = 16  # rank of the forget gate's projection
    gate_logit_normalizer: float = 16.0  # temperature: log gate = logsigmoid(logit) / this
    intermediate_size: int | None = None  # SwiGLU's width; null: 8/3 d rounded up to a multiple of 256; 0: no SwiGLU
    norm_eps: float = 1e-6
    initializer_range: float = 0.02  # standard deviation of every initial matrix
    tie_word_embeddings: bool = False
    gla: GLAConfig = field(default_factory=GLAConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)
    regla: ReGLAConfig = field(default_factory=ReGLAConfig)
    mamba: MambaConfig = field(default_factory=MambaConfig)
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    deltanet: DeltaNetConfig = field(default_factory=DeltaNetConfig)

    def __post_init__(self):
        convert_fields(self, ModelConfig, "model")  # a config.json may have anything, and mappings for dataclasses
        if self.intermediate_size is None:
            self.intermediate_size = 256 * math.ceil(self.hidden_size * 8 / 3 / 256)
        for name in POSITIVE:
            value = attrgetter(name)(self)
            require(value is None or 0 < value < math.inf, f"model.{name} must be positive and finite, not {value}")
        require(self.intermediate_size >= 0, "model.intermediate_size must be positive, or 0 for no SwiGLU")
        for name, expand in (("expand_k", self.expand_k), ("expand_v", self.expand_v)):
            width = self.hidden_size * expand
            require(
                math.isclose(width, round(width)) and round(width) % self.num_heads == 0,
                f"model.num_heads={self.num_heads} does not divide the width model.hidden_size * model.{name} = "
                f"{width:g}; {describe_divisors(round(width))}",
            )
        require(
            "retention" not in self.layer_mixers() or self.key_dim % (2 * self.num_heads) == 0,
            f"model.num_heads={self.num_heads} does not cut the width model.hidden_size * model.expand_k = "
            f"{self.key_dim} into heads of an even number of channels, which retention's positions turn in pairs; "
            f"{describe_divisors(self.key_dim // 2)}",
        )
        if "attention" in self.layer_mixers():
            self._check_attention()
        kv = self.gla.num_kv_heads
        require(
            kv is None or (kv > 0 and self.num_heads % kv == 0),
            f"model.gla.num_kv_heads={kv} does not divide model.num_heads={self.num_heads}; "
            f"{describe_divisors(self.num_heads)}",
        )
        for name in ("gla", "deltanet"):
            taps = getattr(self, name).short_conv
            require(taps == 0 or taps > 1, f"model.{name}.short_conv must be 0 or 2 taps or more, not {taps}")
        clamp = self.gla.min_log_gate
        require(clamp is None or clamp <= 0, f"model.gla.min_log_gate must be null or at most 0, not {clamp}")
        require(
            self.linear.feature_map != "identity" or not self.linear.normalise,
            "model.linear.feature_map=identity gives weights of both signs, whose sum normalises nothing; write "
            "model.linear.normalise=false",
        )
        inner = self.mamba2.expand * self.hidden_size
        require(
            "mamba2" not in self.layer_mixers() or inner % (self.mamba2.head_dim * self.mamba2.groups) == 0,
            f"model.mamba2.head_dim={self.mamba2.head_dim} does not cut the {inner} channels (model.mamba2.expand * "
            f"model.hidden_size) into heads, the same number in each of {self.mamba2.groups} groups",
        )
        regla = self.regla
        require(0 < regla.initial_forget < 1, "model.regla.initial_forget must lie between 0 and 1")
        require(
            regla.output_norm or (regla.feature_map != "identity" and regla.gate_axis == "key"),
            "model.regla.output_norm=false divides by the sum of the weights, which needs a positive "
            "model.regla.feature_map and model.regla.gate_axis=key",
        )

    @property
    def key_dim(self) -> int:
        return round(self.hidden_size * self.expand_k)

    @property
    def value_dim(self) -> int:
        return round(self.hidden_size * self.expand_v)

    @property
    def attention_heads(self) -> tuple[int, int]:
        """Softmax attention's query heads and key-value heads."""
        of_64 = self.hidden_size // 64 if self.hidden_size % 64 == 0 else self.num_heads
        heads = self.attention.num_heads or of_64
        return heads, self.attention.num_kv_heads or heads

    def _check_attention(self) -> None:
        heads, kv_heads = self.attention_heads
        require(
            self.hidden_size % (2 * heads) == 0,
            f"model.attention.num_heads={heads} does not cut model.hidden_size={self.hidden_size} into heads of an "
            f"even number of channels; {describe_divisors(self.hidden_size // 2)}",
        )
        require(
            heads % kv_heads == 0,
            f"model.attention.num_kv_heads={kv_heads} does not divide the {heads} query heads; "
            f"{describe_divisors(heads)}",
        )
        window = self.attention.window
        require(window is None or window > 0, f"model.attention.window must be positive or null, not {window}")

    def layer_mixers(self) -> list[str]:
        """The mixer of each layer: the pattern in `layers`, repeated and cut to num_hidden_layers."""
        single = _known_mixer("model.mixer", self.mixer)
        if self.layers is None:
            return [single] * self.num_hidden_layers
        pattern = []
        for part in self.layers.split("+") if isinstance(self.layers, str) else self.layers:
            count, _, name = part.replace(" ", "").rpartition("*")
            require(
                not count or (count.isdigit() and int(count) > 0),
                f'model.layers: {part!r} must be a mixer or a number of layers times one, as in "3*gla+attention"',
            )
            pattern += [_known_mixer("model.layers", name)] * int(count or 1)
        require(len(pattern) > 0, 'model.layers is empty; write for example "3*gla+attention", or null for model.mixer')
        return [pattern[i % len(pattern)] for i in range(self.num_hidden_layers)]


def _known_mixer(key: str, name: str) -> str:
    near = difflib.get_close_matches(name, MIXERS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    require(name in MIXERS, f"{key}={name!r} is none of the mixers: {', '.join(MIXERS)}{hint}")
    return name
