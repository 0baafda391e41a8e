"""Parameters and operations by formula, against the model and torch's flop counter."""

import sys
from math import log2, prod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from glalm.config.strict import ConfigError, build_dataclass
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.kernels import delta
from glalm.kernels.common import CHUNK
from glalm.model.config import ModelConfig
from glalm.model.decoder import model_cost
from glalm.model.mixers import MIXERS, hyena

CONFIGS = Path(__file__).parents[2] / "configs" / "model"


def load_preset(name: str, **changes) -> ModelConfig:
    return build_dataclass(ModelConfig, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) | changes)


def chunk_gla_flops(q_shape, k_shape, v_shape, *_, **__) -> int:
    """Count the matmuls of the chunkwise form (GLA, section 3) one by one."""
    (B, T, H, K), states, V, C = q_shape, k_shape[2], v_shape[3], min(q_shape[1], 64)
    scores, values, read, update = (C, K, C), (C, C, V), (C, K, V), (K, C, V)
    of_head = sum(2 * prod(matmul) for matmul in (scores, values, read))
    return B * (T // C) * (H * of_head + states * 2 * prod(update))


def solve_flops(A_shape, B_shape, *_, **__) -> int:
    """Count half a matmul, because half of a triangular matrix is zeros."""
    return prod(B_shape) * A_shape[-1]


def carry_flops(k_shape, new_shape, *_, **__) -> int:
    """Count the products with the state, S and k^T u, of each chunk."""
    return 2 * 2 * prod(k_shape) * new_shape[-1]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve by conv1d, because torch's counter ignores elementwise operations."""
    return F.conv1d(x.mT, weight[:, None], groups=x.shape[2]).mT


def sum_products(x: Tensor, y: Tensor, decay: Tensor) -> Tensor:
    """Sum the products of a chunk's pairs by a matmul also where each channel has a decay, as the GPU does."""
    return x @ y.mT * decay[..., 0]


def convolve_short(z: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Convolve by conv1d, as above."""
    return F.conv1d(z.mT, weight.mT[:, None], groups=z.shape[2]).mT


def fft_flops(x_shape, dims, *_, out_shape, **__) -> float:
    """Count 5/2 n log2 n for each FFT of n real numbers, of which one axis has the spectrum, n / 2 + 1 numbers."""
    [dim] = dims
    n = max(x_shape[dim], out_shape[dim])
    return prod(x_shape) / x_shape[dim] * 2.5 * n * log2(n)


@pytest.mark.parametrize("T", [32, 128])
@pytest.mark.parametrize("name", [*MIXERS, "hybrid", "gla grouped"])
def test_operations_are_those_that_torch_counts(name, T, monkeypatch):
    monkeypatch.setattr(sys.modules["glalm.kernels.short_conv"], "convolve", convolve)
    monkeypatch.setattr(delta, "sum_products", sum_products)
    monkeypatch.setattr(delta, "CHANNEL_GATE_CHUNK", CHUNK)
    monkeypatch.setattr(hyena, "convolve_short", convolve_short)
    changes = {"linear": {"linear": {"feature_map": "hedgehog"}}, "gla grouped": {"gla": {"num_kv_heads": 1}}}
    with FakeTensorMode():
        preset = load_preset(f"{name.split()[0]}_tiny", vocab_size=100, **changes.get(name, {}))
        config = GLALMConfig(**vars(preset))
        config.attention.window = None  # The counter includes the masked half of the scores.
        # One sequence, because a batch computes a long filter only once.
        model, ids = GLALMForCausalLM(config), torch.zeros(1, T, dtype=torch.long)
        mapping = {torch.ops.glalm.chunk_gla: chunk_gla_flops, torch.ops.glalm.delta_carry: carry_flops}
        mapping[torch.ops.aten.linalg_solve_triangular] = solve_flops
        mapping |= {torch.ops.aten._fft_r2c: fft_flops, torch.ops.aten._fft_c2r: fft_flops}
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            model(ids)
    assert model_cost(config, T).forward == pytest.approx(counter.get_total_flops() / ids.numel(), rel=1e-3)


@pytest.mark.parametrize("size, millions", [("tiny", 1.390), ("small", 42.18), ("340m", 374.5), ("1b3", 1365.5)])
def test_presets_have_as_many_parameters_as_gla(size, millions):
    for name in (*MIXERS, "hybrid"):
        parameters = model_cost(load_preset(f"{name}_{size}"), 2048).parameters / 1e6
        assert parameters == pytest.approx(millions, rel=0.01), name


def test_the_10m_preset_has_10_million_parameters():
    parameters = model_cost(load_preset("gla_10m", vocab_size=8192), 512).parameters
    assert parameters == 10_194_048 == 8_096_896 + 256 * 8192
    with pytest.raises(ConfigError, match=r"model.vocab_size is null; set it"):
        model_cost(load_preset("gla_10m"), 512)


def test_a_tied_head_is_counted_once():
    untied, tied = (model_cost(load_preset("gla_tiny", tie_word_embeddings=tie), 64) for tie in (False, True))
    assert untied.parameters - tied.parameters == 2048 * 128
    assert untied.forward == tied.forward and untied.training == 3 * untied.forward
