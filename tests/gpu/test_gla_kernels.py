"""The Triton kernels compiled, at real shapes, on random data of a new seed every run."""

import secrets

import pytest
import torch

from glalm.kernels import chunk_gla, chunk_simple_gla

pytestmark = pytest.mark.gpu
SEED = secrets.randbits(31)
BF16, FP16, FP32 = 2**-8, 1.2e-3, 5e-6  # bfloat16's is what rounding the result alone may take


def check(limit, *shape, **options):
    from triton_cases import relative_errors

    errors = relative_errors(*shape, device="cuda", seed=SEED, **options)
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


@pytest.mark.parametrize("gate", ["slow", "usual", "fast", "wild"])
@pytest.mark.parametrize("H, K, V", [(4, 64, 64), (2, 128, 256), (2, 256, 512), (2, 96, 40)])
def test_one_gate_a_head(H, K, V, gate):
    check(BF16, 1, 320, H, K, V, dtype=torch.bfloat16, gate=gate, per="head", states=True)


@pytest.mark.parametrize("H, K, V", [(4, 64, 64), (2, 128, 256), (2, 256, 512), (2, 96, 40)])
def test_no_gate(H, K, V):
    check(BF16, 1, 320, H, K, V, dtype=torch.bfloat16, per="nothing", states=True)


@pytest.mark.parametrize("per", ["head", "fixed", "nothing"])
def test_simpler_gates_in_every_form(per):
    check(FP16, 1, 300, 2, 64, 64, dtype=torch.float16, per=per, states=True)
    check(FP32, 1, 300, 2, 64, 64, dtype=torch.float32, per=per, states=True)
    check(BF16, 1, 700, 2, 64, 64, dtype=torch.bfloat16, per=per, cu_seqlens=[0, 0, 15, 16, 300, 700], states=True)
    check(BF16, 1, 4100, 1, 128, 256, dtype=torch.bfloat16, per=per, states=True)


@pytest.mark.parametrize("per", ["channel", "head"])
@pytest.mark.parametrize("normalizer", [16.0, 1.0, 0.125])
def test_logits_of_the_gate(per, normalizer):
    check(BF16, 1, 320, 2, 64, 64, dtype=torch.bfloat16, per=per, logits=normalizer, states=True)
    check(BF16, 1, 320, 2, 128, 256, dtype=torch.bfloat16, per=per, logits=normalizer)
    # The smaller normalizers make chunks that forget exp(-40) and more: the last bit of such an exponent is 4e-6, and
    # the gate's own gradient is a small difference.
    check(FP32 if normalizer == 16 else 10 * FP32, 1, 320, 2, 64, 64, dtype=torch.float32, per=per, logits=normalizer)


@pytest.mark.parametrize("gate", ["slow", "wild"])
@pytest.mark.parametrize("H, group, K, V", [(2, 2, 64, 64), (1, 4, 128, 256), (1, 2, 256, 512), (2, 3, 96, 40)])
def test_query_heads_that_share_a_state(H, group, K, V, gate):
    check(BF16, 1, 320, H, K, V, dtype=torch.bfloat16, gate=gate, states=True, group=group)


@pytest.mark.parametrize("per", ["channel", "head", "fixed", "nothing"])
def test_query_heads_that_share_a_state_in_every_form(per):
    check(FP16, 1, 300, 2, 64, 64, dtype=torch.float16, per=per, states=True, group=2)
    check(FP32, 1, 300, 2, 64, 64, dtype=torch.float32, per=per, states=True, group=2)
    bounds = [0, 0, 15, 16, 300, 700]
    check(BF16, 1, 700, 2, 64, 64, dtype=torch.bfloat16, per=per, cu_seqlens=bounds, states=True, group=2)
    check(BF16, 1, 4100, 1, 128, 256, dtype=torch.bfloat16, per=per, states=True, group=4)


def tensors(B, T, H, K, V, group=1, **options):
    shapes = (B, T, H * group, K), (B, T, H, K), (B, T, H, V), (B, T, H, K)
    return [torch.randn(s, device="cuda", dtype=torch.bfloat16, **options) for s in shapes]


def differentiated(operator, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    o, state = operator(*inputs, gate_logit_normalizer=16.0, output_final_state=True)
    return o, state, *torch.autograd.grad(o.float().square().sum() + state.square().sum(), inputs)


def test_inputs_that_are_not_contiguous():
    inputs = tensors(2, 100, 4, 64, 64)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    for a, b in zip(differentiated(chunk_gla, inputs), differentiated(chunk_gla, strided), strict=True):
        assert torch.equal(a, b)


def test_states_that_are_not_contiguous_and_scales_that_are_integers():
    *inputs, S = *tensors(2, 100, 4, 64, 64), torch.randn(2, 4, 64, 64, device="cuda")
    strided = S.mT.contiguous().mT
    for scale in (1, 2):
        found = []
        for given, weight in ((S, torch.ones_like(S)), (strided, 1)):  # the sum's gradient is expanded
            leaves = [x.detach().requires_grad_() for x in (*inputs, given)]
            q, k, v, g, initial = leaves
            o, final = chunk_gla(q, k, v, -g.abs(), scale=scale, initial_state=initial, output_final_state=True)
            found.append((o, final, *torch.autograd.grad((final * weight).sum(), leaves[1:])))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        q, k, v, g = inputs
        o, _ = chunk_gla(q, k, v, -g.abs(), scale=scale, initial_state=S)
        other, _ = chunk_gla(q, k, v, -g.abs(), scale=float(scale), initial_state=S)
        assert torch.equal(o, other)


@pytest.mark.parametrize("T, group", [(64, 1), (100, 1), (100, 2)])
def test_compiled_whole(T, group):
    torch._dynamo.reset()
    inputs = tensors(2, T, 4, 64, 64, group)
    compiled = torch.compile(chunk_gla, fullgraph=True)
    for a, b in zip(differentiated(compiled, inputs), differentiated(chunk_gla, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 1000, 4, 128, 256),
        (2, 1000, 4, 64, 64),
        (1, 200, 2, 32, 65),
        (1, 200, 1, 256, 300),
        (2, 1000, 1, 128, 256, 4),
    ],
)
@pytest.mark.parametrize("per", ["channel", "head", "nothing"])
def test_same_bits_twice_whatever_memory_held(shape, per, monkeypatch):
    from glalm.kernels.triton import gla

    q, k, v, g = tensors(*shape)
    g = {"channel": -g.abs(), "head": -g.abs()[..., 0].contiguous(), "nothing": None}[per]
    do = torch.randn_like(q[..., :1].expand(*q.shape[:3], v.shape[3]))

    def run():
        o, S, kept = gla.forward(q, k, v, g, 0.1, None, None, True, None, True)
        return [x for x in (o, S, *gla.backward(q, k, v, g, 0.1, None, None, None, kept, do, S)) if x is not None]

    first, empty = run(), torch.empty

    def poisoned(*shape, **options):
        x = empty(*shape, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(255 if x.dtype == torch.uint8 else -1)

    monkeypatch.setattr(torch, "empty", poisoned)
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_same_bits_on_two_gpus():
    inputs = tensors(2, 1000, 4, 128, 256)
    # Without making the second the current device: a model may be spread over both.
    results = [[x.cpu() for x in differentiated(chunk_gla, [x.to(d) for x in inputs])] for d in ("cuda:0", "cuda:1")]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("per", ["channel", "head"])
@pytest.mark.parametrize("normalizer", [None, 16.0])
def test_a_gate_that_is_not_a_number_shows(per, normalizer):
    q, k, v, g = tensors(1, 200, 2, 64, 64)
    g = -g.abs() if per == "channel" else -g.abs()[..., 0].contiguous()
    g[0, 70] = float("nan")
    operator = chunk_gla if per == "channel" else chunk_simple_gla
    o, _ = operator(q, k, v, g, gate_logit_normalizer=normalizer)
    assert torch.isfinite(o[0, :64]).all()
    assert torch.isnan(o[0, 70:]).all()
