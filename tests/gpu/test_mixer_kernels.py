"""The kernels of Mamba, Mamba-2 and the short convolution compiled, on random data of a new seed every run."""

import secrets

import pytest
import torch

from glalm import kernels

pytestmark = pytest.mark.gpu
SEED = secrets.randbits(31)
HALF = {torch.bfloat16: 4e-3, torch.float16: 1e-3}


def check(module: str, limit: float, *shape, **options) -> None:
    cases = __import__(f"{module}_cases")
    errors = cases.relative_errors(*shape, device="cuda", seed=SEED, **options)
    assert max(errors.values()) < limit, (SEED, errors)


@pytest.mark.parametrize("d, N", [(128, 16), (96, 16), (65, 24), (1, 1), (64, 64)])
def test_selective_scan(d, N):
    check("selective_scan", 2e-5, 2, 150, d, N)
    check("selective_scan", 2e-5, 1, 700, d, N, states=False, fused=False)
    check("selective_scan", 2e-5, 1, 300, d, N, bounds=[0, 0, 1, 150, 150, 299, 300])
    for dtype, limit in HALF.items():
        check("selective_scan", limit, 2, 150, d, N, dtype=dtype)


@pytest.mark.parametrize("D, taps", [(256, 4), (1000, 4), (70, 3), (7, 2), (1, 1), (64, 9)])
def test_short_conv(D, taps):
    for T in (1, 2, 3, 65, 700):
        check("short_conv", 2e-5, 2, T, D, taps)
    check("short_conv", 2e-5, 1, 300, D, taps, bounds=[0, 0, 1, 150, 150, 299, 300])
    for dtype, limit in HALF.items():
        check("short_conv", limit, 2, 150, D, taps, dtype=dtype, states=False)


@pytest.mark.parametrize(
    "H, G, N, P", [(8, 1, 128, 64), (8, 4, 64, 64), (4, 2, 16, 32), (2, 1, 256, 128), (3, 1, 40, 24)]
)
def test_chunk_ssd(H, G, N, P):
    check("ssd", 2e-5, 2, 150, H, G, N, P)
    check("ssd", 2e-5, 1, 1100, H, G, N, P, states=False)
    check("ssd", 2e-5, 1, 300, H, G, N, P, bounds=[0, 0, 1, 150, 150, 299, 300])
    check("ssd", 2e-5, 1, 300, H, G, N, P, strong=True)
    check("ssd", 2e-3, 2, 150, H, G, N, P, dtype=torch.float16)
    check("ssd", 1e-2, 2, 150, H, G, N, P, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["selective_scan", "short_conv", "chunk_ssd"])
def test_the_same_call_gives_the_same_bits(name):
    module = {"chunk_ssd": "ssd"}.get(name, name)
    cases = __import__(f"{module}_cases")
    shape = {"selective_scan": (2, 300, 128, 16), "short_conv": (2, 300, 256, 4), "ssd": (2, 300, 8, 1, 128, 64)}[
        module
    ]
    args = cases.random_arguments(*shape, dtype=torch.bfloat16, device="cuda", seed=SEED)
    options = {"output_final_state": True} if name == "chunk_ssd" else {}

    def run() -> dict:
        return cases.differentiate(lambda **a: getattr(kernels, name)(**a, **options), args)

    first = run()
    assert all(torch.equal(first[key], x) for _ in range(3) for key, x in run().items())


def test_no_host_synchronisation():
    from selective_scan_cases import random_arguments

    args = random_arguments(1, 16, 64, 16, bounds=[0, 1, 16, 16], device="cuda")
    kernels.selective_scan(**args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.selective_scan(**args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["chunk_delta_rule", "chunk_ssd", "selective_scan"])
def test_shards_equal_whole_sequences(name, monkeypatch):
    from test_context_exchange import compare_shards

    compare_shards(name, 2e-2, monkeypatch, torch.bfloat16, "cuda")
