import pytest
import torch

from glalm.hf import GLALMConfig, GLALMForCausalLM


@pytest.fixture
def build_model():
    """build_model(**config) returns a small float64 model whose norms are not 1 and whose biases are not 0."""

    def build(**changes) -> GLALMForCausalLM:
        torch.manual_seed(0)
        shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 48}
        model = GLALMForCausalLM(GLALMConfig(**(shape | changes))).double().eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model

    return build


@pytest.fixture
def random_tokens():
    """random_tokens(*shape, seed=1) returns token ids below 50."""

    def draw(*shape: int, seed: int = 1) -> torch.Tensor:
        return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))

    return draw
