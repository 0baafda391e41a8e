"""Derivatives of a model other than by .backward(): right, or refused by an error that names the transform."""

import pytest
import torch

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
