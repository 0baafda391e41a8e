import pytest
import torch

from glalm.hf import GLALMConfig, GLALMForCausalLM


@pytest.fixture
def tiny():
    """tiny(seed=0, **config) builds a small model in float64, in eval mode, away from its initial norms and biases."""

    def build(seed: int = 0, **changes) -> GLALMForCausalLM:
        torch.manual_seed(seed)
        shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 48}
        model = GLALMForCausalLM(GLALMConfig(**(shape | changes))).double().eval()
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        return model

    return build


@pytest.fixture
def tokens():
    """tokens(*shape, seed=1) draws token ids of the tiny model."""

    def draw(*shape: int, seed: int = 1) -> torch.Tensor:
        return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture
def assert_is(tiny):
    """assert_is(equations, **config) compares a mixer with `equations(weights, x, config)` of one sequence x [T, d].

    It compares the outputs [T, d] and the gradients of x and of every weight, in float64.
    """

    def compare(equations, T: int = 40, **changes) -> None:
        model = tiny(**changes)
        mixer = model.model.layers[0].attn
        x = torch.randn(T, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
        weights = dict(mixer.named_parameters())
        output_gradient = torch.randn(x.shape, dtype=torch.float64)
        found = mixer(x[None])[0][0]
        expected = equations(weights, x, model.config)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
        leaves = {"x": x, **weights}
        found_gradients = torch.autograd.grad(found, [*leaves.values()], output_gradient)
        expected_gradients = torch.autograd.grad(expected, [*leaves.values()], output_gradient)
        for name, a, b in zip(leaves, found_gradients, expected_gradients, strict=True):
            assert b.norm() > 0, name
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")

    return compare
