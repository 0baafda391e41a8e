"""The Triton recurrence compiled, on random data of a new seed every run."""

import secrets

import pytest
import torch

pytestmark = pytest.mark.gpu
SEED = secrets.randbits(31)
BF16, FP16, FP32 = 3e-3, 1e-3, 1e-6


def check(limit, *shape, **options):
    from recurrent_cases import relative_errors

    errors = relative_errors(*shape, device="cuda", seed=SEED, **options)
    assert max(errors.values()) < limit, (SEED, errors)


@pytest.mark.parametrize("gate", ["channel", "head", "fixed", "none"])
@pytest.mark.parametrize("H, K, V", [(16, 64, 64), (4, 128, 256), (4, 256, 512), (2, 96, 40), (1, 512, 512), (1, 1, 1)])
def test_every_gate_and_head_size(H, K, V, gate):
    check(FP32, 3, 1, H, K, V, dtype=torch.float32, gate=gate)
    check(BF16, 1, 9, H, K, V, dtype=torch.bfloat16, gate=gate, in_place=True)


@pytest.mark.parametrize("gate", ["channel", "head", "fixed", "none"])
def test_query_heads_that_share_a_state(gate):
    check(FP32, 3, 1, 2, 128, 256, dtype=torch.float32, gate=gate, group=4)
    check(BF16, 1, 9, 2, 96, 40, dtype=torch.bfloat16, gate=gate, in_place=True, group=3)


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize("H, K, V", [(8, 128, 128), (6, 128, 256), (2, 96, 40)])
def test_delta_rule(H, K, V, gate):
    check(3 * FP32, 3, 1, H, K, V, dtype=torch.float32, gate=gate, delta=True)
    check(BF16, 1, 9, H, K, V, dtype=torch.bfloat16, gate=gate, in_place=True, delta=True)


def test_packed_wild_and_empty():
    check(FP32, 1, 300, 2, 64, 64, dtype=torch.float32, bounds=[0, 0, 1, 150, 150, 299, 300], wild=True)
    check(FP16, 2, 0, 2, 64, 64, dtype=torch.float16)
    check(FP16, 2, 33, 2, 64, 64, dtype=torch.float16, gate_dtype=torch.float32)


def step(q, k, v, g, S):
    from glalm.kernels import fused_recurrent_gla
    from glalm.kernels.recurrent import states_in_place

    with torch.no_grad(), states_in_place():
        return fused_recurrent_gla(q, k, v, g, initial_state=S, output_final_state=True)[0]


def inputs(B=4, H=4, K=128, V=256):
    q, k, g, v = (torch.randn(B, 1, H, n, device="cuda", dtype=torch.bfloat16) for n in (K, K, K, V))
    return q, k, v, -g.abs(), torch.randn(B, H, K, V, device="cuda")


def test_no_host_synchronisation_and_no_compilation_for_another_length():
    from glalm.kernels import fused_recurrent_gla

    def packed(bounds):
        T = bounds[-1]
        q, k, v = (torch.randn(1, T, 2, 64, device="cuda") for _ in range(3))
        return (q, k, v, -v.abs()), {"cu_seqlens": torch.tensor(bounds, device="cuda"), "output_final_state": True}

    first, second = packed([0, 5, 9]), packed([0, 1, 16, 16])
    fused_recurrent_gla(*first[0], **first[1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_recurrent_gla(*second[0], **second[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_in_a_cuda_graph():
    args = inputs()
    S = args[4].clone()
    expected = [step(*args[:4], S) for _ in range(3)][-1]
    step(*args[:4], args[4].clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step(*args)
    for _ in range(3):
        graph.replay()
    assert torch.equal(o, expected) and torch.equal(args[4], S)


def test_compiled():
    from glalm.kernels import fused_recurrent_gla

    def step(q, k, v, g, S):
        return fused_recurrent_gla(q, k, v, g, initial_state=S, output_final_state=True)

    *args, S = inputs()
    before = S.clone()
    with torch.no_grad():
        expected, found = step(*args, S), torch.compile(step, fullgraph=True)(*args, S)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and torch.equal(S, before)
