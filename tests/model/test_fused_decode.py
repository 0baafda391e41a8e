"""The fused decoding step: its kernels by Triton's interpreter, in a process of its own; on the GPU compiled."""

import pytest
import torch
import torch.nn.functional as F
from interpreter import INTERPRETED, interpreted, run_interpreted

from glalm.generation import fused_decode


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_in_the_interpreter():
    run_interpreted(__file__)


def check_matvec(device: str) -> None:
    from glalm.kernels.triton.matvec import matvec

    def draw(*shape):
        return torch.randn(*shape, device=device)

    x, weights = draw(96), [draw(n, 96) / 10 for n in (70, 1, 96, 300, 16)]
    for count in (1, 3, 5):
        for y, w in zip(matvec(x, weights[:count]), weights[:count], strict=True):
            torch.testing.assert_close(y, w @ x, rtol=1e-4, atol=1e-5)
    norm, residual = draw(96), draw(300)
    [y] = matvec(x, weights[3:4], norm=norm, eps=1e-3, residual=residual)
    torch.testing.assert_close(y, weights[3] @ F.rms_norm(x, (96,), norm, 1e-3) + residual, rtol=1e-4, atol=1e-5)
    [y] = matvec(x, [weights[2], weights[2] * 2], swiglu=True)
    torch.testing.assert_close(y, F.silu(weights[2] @ x) * (2 * weights[2] @ x), rtol=1e-4, atol=1e-5)
    x, gate, norm, w = draw(128), draw(128), draw(32), draw(50, 128) / 10
    [y] = matvec(x, [w], norm=norm, eps=1e-3, gate=gate)
    expected = w @ (F.rms_norm(x.view(4, 32), (32,), norm, 1e-3).flatten() * F.silu(gate))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    half = [y.half() for y in (x, w)]
    [y] = matvec(half[0], [half[1]])
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), half[1].float() @ half[0].float(), rtol=2e-3, atol=2e-3)


def check_step(device: str) -> None:
    from glalm.kernels.triton.decode_step import gla_decode_step

    for H, K, V, R in ((2, 24, 40, 5), (4, 64, 128, 16)):
        q, k, v, low, weight, bias = (
            torch.randn(*shape, device=device) for shape in ((H * K,), (H * K,), (H * V,), (R,), (H * K, R), (H * K,))
        )
        S = torch.randn(1, H, K, V, device=device)
        gate = (F.logsigmoid(weight @ low + bias) / 4).exp()
        expected = S * gate.view(H, K, 1) + k.view(H, K, 1) * v.view(H, 1, V)
        read = torch.einsum("hk,hkv->hv", q.view(H, K) * K**-0.5, expected[0])
        o = gla_decode_step(q, k, v, low, weight, bias, 4.0, S)
        torch.testing.assert_close(S, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(o, read.flatten(), rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize("check", [check_matvec, check_step])
def test_a_kernel(check):
    check("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("check", [check_matvec, check_step])
def test_a_kernel_on_the_gpu(check):
    check("cuda")


@interpreted
@torch.no_grad()
def test_is_the_models_step(tiny, tokens):
    model = tiny().float()
    assert fused_decode.is_supported(model)
    cache = model(tokens(1, 20), use_cache=True).past_key_values
    states = [S.clone() for S in cache.states]
    for t in range(3):
        token = tokens(1, 1, seed=t)
        out = model(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = fused_decode.decode_token(model, token, states)
        torch.testing.assert_close(logits, out.logits[:, -1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(states, cache.states, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixer": "regla"},
        {"layers": "gla+attention"},
        {"gla": {"gate": "scalar"}},
        {"gla": {"output_gate": False}},
        {"gla": {"short_conv": 4}},
        {"gla": {"feature_map": "relu"}},
        {"gla": {"num_kv_heads": 1}},
        {"gla": {"min_log_gate": -1.0}},
        {"intermediate_size": 0},
        {"hidden_size": 48},
    ],
    ids=str,
)
def test_only_the_papers_model_is_supported(tiny, changes):
    assert not fused_decode.is_supported(tiny(**changes).float())


@pytest.mark.parametrize("half_lives", [None, [4.0, 64.0]])
def test_the_papers_model_is_supported(tiny, half_lives):
    assert fused_decode.is_supported(tiny(gla={"initial_half_lives": half_lives}).float())


def test_adapted_layers_are_not_supported(tiny):
    class Adapted(torch.nn.Linear):
        pass

    model = tiny()
    assert not fused_decode.is_supported(model)  # It is in float64.
    assert fused_decode.is_supported(model.float())
    model.model.layers[0].attn.q_proj = Adapted(32, 16, bias=False)
    assert not fused_decode.is_supported(model)


def test_hooked_layers_are_not_supported(tiny):
    model = tiny().float()
    layer = model.model.layers[1].mlp.up_proj
    for hook in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = hook(lambda *args: None)
        assert not fused_decode.is_supported(model)
        handle.remove()
        assert fused_decode.is_supported(model)
    layer.forward = layer.forward  # accelerate does this.
    assert not fused_decode.is_supported(model)


@pytest.mark.gpu
@torch.no_grad()
def test_captured_it_is_the_models_step_in_bf16(tiny, tokens):
    from glalm.generation.cuda_graph import CudaGraphGenerator, prefill_prompt

    model = tiny(hidden_size=256, num_heads=4, intermediate_size=700).cuda()
    ids = tokens(1, 40).cuda()
    exact = [
        prefill_prompt(model, torch.cat([ids, tokens(1, 6).cuda()[:, :t]], 1), None, None, 99)[0] for t in range(1, 7)
    ]
    model.bfloat16()
    step = CudaGraphGenerator(model).start_step(prefill_prompt(model, ids, None, None, 99)[1])
    assert step.fused and step.graph is not None
    for t, expected in enumerate(exact):
        logits = step(tokens(1, 6).cuda()[:, t : t + 1])
        assert ((logits - expected).norm() / expected.norm()) < 0.03
