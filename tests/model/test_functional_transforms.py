"""Derivatives of a model other than by .backward(): right, or refused by an error that names the transform."""

import re

import pytest
import torch
from choices import CHOICES
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from glalm.model.mixers import MIXERS

every_mixer = pytest.mark.parametrize("mixer", sorted(MIXERS))


@every_mixer
def test_forward_mode_is_right_or_refused(tiny, mixer):
    """A plain function below an operator would lose the tangent that goes through it, without an error."""
    model = tiny(mixer=mixer, num_hidden_layers=1).requires_grad_(False)
    x, dx = torch.randn(2, 1, 9, 32, dtype=torch.float64)

    def hidden_states(x):
        return model.model(inputs_embeds=x, use_cache=False).last_hidden_state

    try:
        _, found = torch.func.jvp(hidden_states, (x,), (dx,))
    except NotImplementedError as error:
        # PyTorch refuses attention by itself.
        assert "does not support torch.func.jvp" in str(error) or "forward AD" in str(error)
        return
    expected = (hidden_states(x + 1e-5 * dx) - hidden_states(x - 1e-5 * dx)) / 2e-5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@every_mixer
@pytest.mark.parametrize("result", ["loss", "logits"])
def test_functional_gradient_is_right_or_refused(tiny, tokens, mixer, result):
    model = tiny(mixer=mixer, num_hidden_layers=1).train()
    ids = tokens(2, 9)

    def compute(parameters: dict):
        if result == "loss":
            return torch.func.functional_call(model, parameters, (ids,), {"labels": ids}).loss
        return torch.func.functional_call(model, parameters, (ids,)).logits.logsumexp(-1).sum()

    try:
        found = torch.func.grad(compute)({name: p.detach() for name, p in model.named_parameters()})
    except NotImplementedError as error:
        assert "does not support torch.func.grad" in str(error)
        return
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(compute(parameters), list(parameters.values()), materialize_grads=True)
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6)


@every_mixer
def test_gradients_of_each_sequence_are_right_or_refused(tiny, tokens, mixer):
    model, ids = tiny(mixer=mixer, num_hidden_layers=1), tokens(3, 9)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def compute(parameters: dict, ids: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (ids[None],)).logits.logsumexp(-1).sum()

    try:
        found = torch.func.vmap(torch.func.grad(compute), in_dims=(None, 0))(parameters, ids)
    except NotImplementedError as error:
        assert "does not support torch.func.grad" in str(error)
        return
    for i, row in enumerate(ids):
        expected = torch.func.grad(compute)(parameters, row)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-6, atol=1e-6)


# Each computes a derivative of f at x in the direction dx, or applies f to both.


def forward_mode(f, x, dx):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, dx))).tangent


def second_derivative(f, x, dx):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad((gradient * dx).sum(), x)[0]


def batched_gradients(f, x, dx):
    x = x.clone().requires_grad_()
    o = f(x)
    return torch.autograd.grad(o, x, torch.stack([torch.ones_like(o), 2 * torch.ones_like(o)]), is_grads_batched=True)[
        0
    ]


def gradient(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def difference(f, x, dx):
    return (f(x + 1e-6 * dx) - f(x - 1e-6 * dx)) / 2e-6


# Name: the transform, and what it must equal.
TRANSFORMS = {
    "torch.func.jvp": (lambda f, x, dx: torch.func.jvp(f, (x,), (dx,))[1], difference),
    "forward-mode": (forward_mode, difference),
    "torch.func.grad": (lambda f, x, dx: torch.func.grad(lambda x: f(x).sum())(x), lambda f, x, dx: gradient(f, x)),
    "torch.func.vmap": (
        lambda f, x, dx: torch.func.vmap(f)(torch.stack([x, dx])),
        lambda f, x, dx: torch.stack([f(x), f(dx)]),
    ),
    "torch.func.functionalize": (lambda f, x, dx: torch.func.functionalize(f)(x), lambda f, x, dx: f(x)),
    "double backward": (
        second_derivative,
        lambda f, x, dx: difference(lambda x: gradient(lambda x: f(x).square(), x), x, dx),
    ),
    "is_grads_batched": (batched_gradients, lambda f, x, dx: torch.stack([gradient(f, x), 2 * gradient(f, x)])),
}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    choice=st.sampled_from(list(CHOICES)),
    transform=st.sampled_from(list(TRANSFORMS)),
    layout=st.sampled_from(["batch", "padded", "packed", "continued"]),
    T=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@example(choice="rpe_attention", transform="double backward", layout="padded", T=2, seed=1)  # derivatives at x = 0
def test_any_transform_is_right_or_refused_by_name(tiny, choice, transform, layout, T, seed):
    model = tiny(**({"num_hidden_layers": 1} | CHOICES[choice])).requires_grad_(False)
    torch.manual_seed(seed)
    x, dx, past = torch.randn(3, 1, T, 32, dtype=torch.float64)
    cut = seed % (T + 1)
    inputs = {
        "batch": {},
        "padded": {"attention_mask": (torch.arange(T) >= min(cut, T - 1)).long()[None]},
        "packed": {"cu_seqlens": torch.tensor([0, cut, T])},
        "continued": {"past_key_values": model.model(inputs_embeds=past, use_cache=True).past_key_values},
    }[layout]

    def hidden_states(x):
        return model.model(inputs_embeds=x, use_cache=False, **inputs).last_hidden_state

    apply, truth = TRANSFORMS[transform]
    try:
        found = apply(hidden_states, x, dx)
    except (NotImplementedError, RuntimeError) as error:
        # PyTorch refuses derivatives of its own attention, with a RuntimeError that names them.
        assert re.search(f"does not support .*{transform}|scaled_dot_product", str(error))
        return
    torch.testing.assert_close(found, truth(hidden_states, x, dx), rtol=1e-4, atol=1e-4)
