"""The check of a mixer of one's own: every mixer of glalm passes it, and each kind of mistake is named."""

import pytest
import torch
from choices import CHOICES
from torch import nn

from glalm.config.strict import ConfigError, build_dataclass
from glalm.model.check_mixer import check_mixer
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.model.mixers import MIXERS, register_mixer
from glalm.model.mixers.base import Mixer


class Sum(Mixer):
    """y_t is the sum of W x_s for s <= t, and the state the sum before the text."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, *, state=None, return_state=False, cu_seqlens=None, padding=None):
        v = self.proj(x)
        if cu_seqlens is not None:
            parts = v[0].split(cu_seqlens.diff().tolist())
            return torch.cat([part.cumsum(0) for part in parts])[None], None
        y = v.cumsum(1) + (0 if state is None else state[:, None])
        return y, y[:, -1].clone() if return_state else None

    def flops(self, T):
        return self.proj.out_features


class OutputsOnly(Sum):
    def forward(self, x, **options):
        return super().forward(x, **options)[0]


class Sums(Sum):
    def forward(self, x, **options):
        y, state = super().forward(x, **options)
        return y.sum(1), state


class Noncausal(Sum):
    def forward(self, x, **options):
        y, state = super().forward(x, **options)
        return y + x.mean(1, keepdim=True), state


class Stateless(Sum):
    def forward(self, x, **options):
        return super().forward(x, **options)[0], None


class Forgetful(Sum):
    def forward(self, x, *, state=None, **options):
        return super().forward(x, state=None, **options)


class InPlace(Sum):
    def forward(self, x, *, state=None, **options):
        y, new = super().forward(x, state=state, **options)
        if state is not None:
            state += 1
        return y, new


class Unpacked(Sum):
    def forward(self, x, *, cu_seqlens=None, **options):
        return super().forward(x, **options)


class Biased(Sum):
    def forward(self, x, **options):
        y, state = super().forward(x + 1, **options)
        return y, state


class Unused(Sum):
    def __init__(self, config):
        super().__init__(config)
        self.spare = nn.Parameter(torch.zeros(3))


class Constant(Sum):
    def forward(self, x, **options):
        y, state = super().forward(x, **options)
        return y if self.training else y + 5, state


class Nested(Sum):
    """Its state is a list with a mapping, which no cache could write."""

    def forward(self, x, *, state=None, **options):
        y, new = super().forward(x, state=state[0]["sum"] if state else None, **options)
        return y, None if new is None else [{"sum": new}]


class Fractions(Sum):
    def flops(self, T):
        return T / 2


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_every_mixer_passes(choice):
    config = build_dataclass(ModelConfig, {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2} | choice)
    check_mixer(MIXERS[config.layer_mixers()[0]], config)


def test_a_mixer_in_plain_pytorch_passes():
    check_mixer(Sum)


@pytest.mark.parametrize(
    "mixer, message",
    [
        (OutputsOnly, r"the forward of the mixer OutputsOnly must return \(y, state\), not a Tensor"),
        (Sums, r"must return y of the shape of x, \[2, 12, 32\], not \[2, 32\]"),
        (Noncausal, r"Noncausal: the outputs of a token, when only later ones change, must be those of"),
        (Stateless, r"Stateless: with return_state=True, forward must return a state"),
        (Nested, r"Nested: with return_state=True, forward must return a state: a tensor or a tuple of tensors"),
        (Constant, r"Constant: the outputs of training and evaluation must be those of"),
        (Forgetful, r"the outputs of two segments with the state carried over must"),
        (InPlace, r"InPlace: forward must not change the state that it is given"),
        (Unpacked, r"the outputs of packed sequences \(cu_seqlens\) must"),
        (Biased, r"the outputs of a row that is padded on the left must"),
        (Unused, r"Unused: the parameter spare has no gradient"),
        (Fractions, r"Fractions.flops must return an integer from 0 on, not 6.0"),
    ],
)
def test_what_is_wrong_is_named(mixer, message):
    with pytest.raises(ConfigError, match=message):
        check_mixer(mixer)


@pytest.mark.parametrize("mixer", [OutputsOnly, Sums])
def test_a_model_refuses_wrong_outputs(mixer, monkeypatch):
    """A tensor of a batch of two would be unpacked, and a y without the axis of tokens be added by broadcasting."""
    monkeypatch.setitem(MIXERS, "wrong", mixer)
    model = CausalLM(ModelConfig(mixer="wrong", vocab_size=50, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ConfigError, match=f"the forward of the mixer {mixer.__name__} must return"):
        model(torch.zeros(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("method", ["forward", "flops"])
def test_a_class_without_a_method_is_refused(method):
    mixer = type("Incomplete", (Sum,), {method: getattr(Mixer, method)})
    with pytest.raises(ConfigError, match=f"the mixer 'x:Incomplete' has no method {method}"):
        register_mixer("x:Incomplete", mixer)
