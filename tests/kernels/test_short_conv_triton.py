"""The kernels of the short convolution at small shapes in Triton's interpreter, which needs a process of its own."""

import pytest
import torch
from interpreter import INTERPRETED, interpreted, run_interpreted

IEEE = 2e-6
BF16 = 1e-2  # The interpreter truncates to bfloat16; the GPU rounds.


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's")
def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Let CPU tensors take the kernels, in chunks of 8 tokens."""
    from glalm.kernels import common
    from glalm.kernels.triton import launch

    monkeypatch.setattr(common, "has_kernel", lambda x: x.dtype != torch.float64)
    config = launch.LaunchConfig({"ROWS": 4, "C": 8, "BD": 64}, 1, 1)
    monkeypatch.setitem(launch.SHORT_CONV, 9, launch.ConvConfigs(config, config))


def check(limit, *shape, **options):
    from short_conv_cases import relative_errors

    errors = relative_errors(*shape, **options)
    assert max(errors.values()) < limit, errors  # A NaN fails, too.


@interpreted
@pytest.mark.parametrize("T", [1, 2, 3, 8, 9, 19])
@pytest.mark.parametrize("states", [False, True])
def test_every_length(T, states):
    check(IEEE, 2, T, 5, 4, states=states)


@interpreted
def test_no_tokens_do_not_change_the_state():
    from selective_scan_cases import differentiate
    from short_conv_cases import random_arguments

    from glalm.kernels import short_conv

    args = random_arguments(2, 0, 5, 4)
    found = differentiate(short_conv, args)
    assert found["y"].shape == (2, 0, 5) and torch.equal(found["state"], args["initial_state"])
    assert not found["dweight"].any() and not found["dbias"].any() and found["dinitial_state"].any()


@interpreted
@pytest.mark.parametrize("states", [False, True])
def test_packed_sequences(states):
    check(IEEE, 1, 26, 5, 4, bounds=[0, 0, 1, 3, 6, 6, 14, 26, 26], states=states)


@interpreted
@pytest.mark.parametrize("D, taps", [(1, 1), (130, 2), (5, 6)])
def test_channels_and_taps(D, taps):
    check(IEEE, 1, 11, D, taps, bias=D != 5)


@interpreted
def test_other_dtypes():
    check(BF16, 1, 11, 5, 4, dtype=torch.bfloat16)
    check(2e-3, 1, 11, 5, 4, dtype=torch.float16)


@interpreted
def test_one_token_of_any_layout():
    """The stride of an axis of size 1 says nothing."""
    from short_conv_cases import random_arguments

    from glalm.kernels import short_conv

    args = random_arguments(3, 1, 5, 4)
    expected = short_conv(**args)
    args["x"] = torch.empty(3, 5, 1).copy_(args["x"].mT).mT
    assert args["x"].stride(1) == 1
    assert all(torch.equal(x, y) for x, y in zip(short_conv(**args), expected, strict=True))


@interpreted
def test_memory_layout_does_not_matter():
    from short_conv_cases import random_arguments

    from glalm.kernels import short_conv

    args = random_arguments(2, 9, 6, 4)
    expected = short_conv(**args)
    x = torch.cat([args["x"], args["x"]], -1)[..., 6:]
    strided = {**args, "x": x, "initial_state": args["initial_state"].mT.contiguous().mT}
    assert not x.is_contiguous()
    found = short_conv(**strided)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(short_conv(**{**args, "x": args["x"].mT.contiguous().mT})[0], expected[0])


@interpreted
def test_results_do_not_depend_on_uninitialized_memory(monkeypatch):
    from selective_scan_cases import differentiate
    from short_conv_cases import random_arguments

    from glalm.kernels import short_conv

    args = random_arguments(1, 17, 5, 4, bounds=[0, 0, 1, 6, 6, 17, 17])

    def poisoned(empty):
        def made(*shape, **options):
            x = empty(*shape, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-1)

        return made

    first = differentiate(short_conv, args)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    second = differentiate(short_conv, args)
    assert all(torch.equal(first[name], second[name]) for name in first)


@interpreted
def test_pytorch_may_check_compile_and_refuse():
    """The registered operators are as PyTorch requires, compile to one graph, and refuse what they cannot do."""
    from selective_scan_cases import differentiate
    from short_conv_cases import random_arguments

    from glalm.kernels import short_conv

    args = random_arguments(1, 5, 5, 3, bounds=[0, 2, 5])
    inputs = tuple(args[n] for n in ("x", "weight", "bias", "initial_state", "cu_seqlens"))
    torch.library.opcheck(torch.ops.glalm.short_conv.default, inputs)
    state = args["initial_state"]
    torch.library.opcheck(torch.ops.glalm.short_conv_backward.default, (*inputs, args["x"], state))
    compiled = torch.compile(short_conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(differentiate(compiled, args), differentiate(short_conv, args), rtol=0, atol=0)
    x = args.pop("x").requires_grad_()
    (dx,) = torch.autograd.grad(short_conv(x, **args)[0].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^short_conv does not support double backward"):
        dx.sum().backward()
    with pytest.raises(NotImplementedError, match=r"^short_conv does not support torch\.func"):
        torch.func.grad(lambda x: short_conv(x, **args)[0].sum())(x)
    with pytest.raises(ValueError, match=r"^weight: on CUDA"):
        short_conv(torch.ones(1, 2, 3), torch.ones(3, 17))
