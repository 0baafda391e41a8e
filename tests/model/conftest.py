import pytest
import torch

from glalm.hf import GLALMConfig, GLALMForCausalLM


@pytest.fixture
def tiny():
    """tiny(**config): a small model in float64 away from its initial values, where norms are 1 and biases 0."""

    def made(seed: int = 0, **changes) -> GLALMForCausalLM:
        torch.manual_seed(seed)
        shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 48}
        model = GLALMForCausalLM(GLALMConfig(**(shape | changes))).double().eval()
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        return model

    return made


@pytest.fixture
def tokens():
    def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
        return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))

    return drawn


@pytest.fixture
def assert_is(tiny):
    """assert_is(equations, **config): a mixer is what `equations(weights, x, config)` says of one sequence x [T, d].

    Outputs [T, d] and the gradients of every weight and of x, in float64.
    """

    def check(equations, T: int = 40, **changes) -> None:
        model = tiny(**changes)
        mixer, d = model.model.layers[0].attn, model.config.hidden_size
        x = torch.randn(T, d, dtype=torch.float64, requires_grad=True)
        weights = dict(mixer.named_parameters())
        random = torch.randn(T, d, dtype=torch.float64)
        found, truth = mixer(x[None])[0][0], equations(weights, x, model.config)
        torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-9)
        leaves = {"x": x, **weights}
        found, truth = (torch.autograd.grad((y * random).sum(), [*leaves.values()]) for y in (found, truth))
        for name, a, b in zip(leaves, found, truth, strict=True):
            assert b.norm() > 0, name
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")

    return check
