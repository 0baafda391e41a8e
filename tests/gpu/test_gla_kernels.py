"""The Triton kernels compiled, at real shapes, on random data of a new seed every run."""

import secrets

import pytest
import torch

pytestmark = pytest.mark.gpu
SEED = secrets.randbits(31)
BF16, FP16, FP32 = 3.0e-3, 1.2e-3, 5e-6


def check(limit, *shape, **options):
    from triton_cases import case

    errors = case(*shape, device="cuda", seed=SEED, **options)
    assert max(errors.values()) < limit, (SEED, errors)


@pytest.mark.parametrize("gate", ["slow", "usual", "fast", "wild", "none"])
@pytest.mark.parametrize("H, K, V", [(4, 64, 64), (2, 128, 256), (2, 256, 512)])
def test_every_gate(H, K, V, gate):
    check(BF16, 1, 320, H, K, V, dtype=torch.bfloat16, gate=gate)


@pytest.mark.parametrize("K, V", [(16, 16), (96, 40), (64, 128), (128, 128), (320, 64), (512, 512)])
def test_other_head_sizes(K, V):
    check(BF16, 1, 200, 2, K, V, dtype=torch.bfloat16)


@pytest.mark.parametrize("T", [1, 63, 65, 1000])
def test_every_length(T):
    check(BF16, 2, T, 2, 64, 64, dtype=torch.bfloat16, states=True)


def test_segments_of_a_long_sequence():
    check(BF16, 1, 4100, 1, 128, 256, dtype=torch.bfloat16, states=True)


def test_packed_sequences():
    bounds = [0, 0, 15, 16, 300, 300, *range(310, 400, 7), 700]
    check(BF16, 1, 700, 2, 64, 64, dtype=torch.bfloat16, cu_seqlens=bounds, states=True)


def test_other_dtypes():
    check(FP16, 1, 300, 2, 64, 64, dtype=torch.float16, states=True)
    check(FP32, 1, 300, 2, 64, 64, dtype=torch.float32, states=True)
    check(BF16, 1, 300, 2, 64, 64, dtype=torch.bfloat16, gate_dtype=torch.float32, states=True)


def test_same_bits_twice():
    from glalm.kernels.triton import gla

    q, k, v, do = (torch.randn(2, 1000, 4, n, device="cuda", dtype=torch.bfloat16) for n in (128, 128, 256, 256))
    g = -torch.rand_like(q)
    first, second = (gla.backward(q, k, v, g, 0.1, None, None, do, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)
