"""Registration with torch.library: torch.compile, autocast, and what autograd may ask for."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from glalm.kernels import chunk_gla, fused_recurrent_gla


def loss(operator, args, **more):
    o, final_state = operator(**args, **more)
    return o.float().square().sum() + (0 if final_state is None else final_state.square().sum())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("output_final_state", [False, True])
@pytest.mark.parametrize("bounds", [None, [0, 3, 3, 20]], ids=["dense", "packed"])
def test_chunk_gla_compiles_whole(draw, bounds, output_final_state, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(chunk_gla, fullgraph=True, backend="aot_eager", dynamic=dynamic)

    for T in (20, 40):
        args = draw(1, T, bounds=None if bounds is None else [*bounds[:-1], T], dtype=torch.bfloat16)
        names = [n for n in args if n != "cu_seqlens"]
        grads = []
        for operator in (compiled, chunk_gla):
            leaves = {n: args[n].clone().requires_grad_() for n in names}
            loss(operator, {**args, **leaves}, output_final_state=output_final_state).backward()
            grads.append([x.grad for x in leaves.values()])
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_decoding_compiles_whole(draw):
    args = draw(T=1)
    args.pop("cu_seqlens")
    compiled = torch.compile(fused_recurrent_gla, fullgraph=True, backend="aot_eager")
    expected = fused_recurrent_gla(**args, output_final_state=True)
    torch.testing.assert_close(compiled(**args, output_final_state=True), expected)


@pytest.mark.parametrize("bounds", [None, [0, 0, 5]], ids=["dense", "packed"])
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("per, normalizer", [("channel", None), ("head", 16.0), ("fixed", None), ("nothing", None)])
def test_opcheck(draw, bounds, final, per, normalizer):
    args = draw(1, 5, bounds=bounds, gate_dtype=torch.float64)
    cu_seqlens = args.pop("cu_seqlens")
    q, k, v, g = (args[n].requires_grad_() for n in "qkvg")
    heads = g[..., 0].detach()
    g = {"channel": g, "head": heads.clone().requires_grad_(), "fixed": heads[0, 0], "nothing": None}[per]
    state = args["initial_state"] if final else None
    forward = (q, k, v, g, 0.3, normalizer, state, final, cu_seqlens, True)
    torch.library.opcheck(torch.ops.glalm.chunk_gla.default, forward)
    kept = [torch.empty(0)] * 5
    backward = (q, k, v, g, 0.3, normalizer, state, cu_seqlens, kept, torch.ones_like(v), state)
    backward = [x.detach() if isinstance(x, torch.Tensor) else x for x in backward]
    torch.library.opcheck(torch.ops.glalm.chunk_gla_backward.default, tuple(backward))


@pytest.mark.parametrize("operator", [chunk_gla, fused_recurrent_gla])
def test_autocast_leaves_the_precision_alone(draw, differentiate, operator):
    args = draw()
    expected = differentiate(lambda **a: operator(**a, output_final_state=True), args)
    with torch.autocast("cpu", torch.bfloat16):
        found = differentiate(lambda **a: operator(**a, output_final_state=True), args)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_second_derivatives_are_refused(draw):
    args = draw(T=5)
    q = args["q"].requires_grad_()
    (dq,) = torch.autograd.grad(loss(chunk_gla, args), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="chunk_gla: no second derivatives"):
        dq.sum().backward()


def test_inputs_and_states_are_left_as_they_were(draw):
    args = draw(T=70)
    before = {n: x.clone() for n, x in args.items() if x is not None}
    leaves = {n: x.requires_grad_() for n, x in args.items() if x is not None}
    loss(chunk_gla, leaves, output_final_state=True).backward()
    for n, x in before.items():
        torch.testing.assert_close(leaves[n].detach(), x, rtol=0, atol=0)


@pytest.mark.parametrize("operator", [chunk_gla, fused_recurrent_gla])
def test_values_are_checked_when_compiled_too(draw, operator):
    args = draw(T=5)
    args["g"][0, 0, 0, 0] = 0.5
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"^g: "):
        compiled(**args)


@pytest.mark.parametrize("operator", [chunk_gla, fused_recurrent_gla])
def test_fake_tensors(draw, operator):
    args = draw(T=5, dtype=torch.bfloat16)
    expected = operator(**args, output_final_state=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {n: x if x is None else mode.from_tensor(x) for n, x in args.items()}
        found = operator(**fakes, output_final_state=True)
    for fake, real in zip(found, expected, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_the_gradient_of_the_final_state_alone(draw):
    args = draw(T=5)
    v = args["v"].requires_grad_()
    _, state = chunk_gla(**args, output_final_state=True)
    (dv,) = torch.autograd.grad(state.sum(), v)
    _, expected = fused_recurrent_gla(**args, output_final_state=True)
    torch.testing.assert_close(dv, torch.autograd.grad(expected.sum(), v)[0])
