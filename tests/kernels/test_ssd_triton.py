"""Mamba-2's kernels at small shapes in Triton's interpreter, which needs a process of its own."""

from itertools import product

import pytest
import torch
from interpreter import INTERPRETED, interpreted, run_interpreted

IEEE = 2e-5
BF16 = 2e-2  # The interpreter truncates to bfloat16; the GPU rounds.


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's")
def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Let CPU tensors take the kernels, in chunks of 16 tokens."""
    from glalm.kernels import common

    monkeypatch.setattr(common, "has_kernel", lambda x: x.dtype != torch.float64)
    use_configs(16, monkeypatch)


def use_configs(chunk, monkeypatch):
    """Let the kernels work on chunks of `chunk` tokens in small tiles."""
    from glalm.kernels.triton import launch

    scan = launch.LaunchConfig({"BV": 16}, 2, 1)
    config = launch.SSDConfigs(
        chunk=chunk,
        scan_forward=scan,
        scan_states=scan,
        scan_backward=scan,
        gradients=launch.LaunchConfig({"BK": 16, "BV": 16}, 2, 1),
    )
    monkeypatch.setattr("glalm.kernels.triton.ssd.ssd_config", lambda *_: config)


def cut_into_segments(count, monkeypatch):
    from glalm.kernels.triton.ssd import SSDPlan

    monkeypatch.setattr(SSDPlan, "count_segments", lambda *_: count)


def check(limit, *shape, **options):
    from ssd_cases import relative_errors

    errors = relative_errors(*shape, **options)
    assert max(errors.values()) < limit, errors  # A NaN fails, too.


@pytest.mark.skipif(INTERPRETED, reason="nothing to interpret")
@pytest.mark.parametrize("bits", [16, 32])
def test_tiles_divide_padded_heads(bits):
    """The buffers of states have padded heads, beyond which no program may store."""
    from glalm.kernels.triton.launch import ssd_config

    for KP, VP in product((16, 32, 64, 128, 256), repeat=2):
        config = ssd_config(torch.device("cpu"), KP, VP, bits)
        assert all(VP % kernel.tile["BV"] == 0 for kernel in config[1:]), (KP, VP)
        assert KP % config.gradients.tile["BK"] == 0, (KP, VP)


@interpreted
@pytest.mark.parametrize("T", [1, 16, 35])
def test_every_length(T):
    check(IEEE, 2, T, 2, 1, 8, 8)


@interpreted
@pytest.mark.parametrize("segments", [1, 3])
def test_packed_sequences_and_segments(segments, monkeypatch):
    cut_into_segments(segments, monkeypatch)
    check(IEEE, 1, 70, 2, 1, 8, 8, bounds=[0, 0, 1, 18, 18, 70, 70])


@interpreted
@pytest.mark.parametrize("G, splits", [(2, 1), (1, 2), (4, 1)])
def test_groups_of_heads(G, splits, monkeypatch):
    from glalm.kernels.triton.ssd import SSDPlan

    monkeypatch.setattr(SSDPlan, "count_splits", lambda *_: splits)
    check(IEEE, 1, 20, 4, G, 8, 8)


@interpreted
def test_slices_of_one_projection_are_not_copied(monkeypatch):
    from selective_scan_cases import differentiate
    from ssd_cases import random_arguments

    from glalm.kernels import chunk_ssd

    def run(args: dict) -> dict:
        return differentiate(lambda **a: chunk_ssd(**a, output_final_state=True), args)

    args = random_arguments(2, 35, 4, 2, 16, 16)
    expected = run(args)
    together = torch.cat([args[name].flatten(2) for name in ("x", "B", "C")], 2)
    for name, part in zip(("x", "B", "C"), together.split([64, 32, 32], 2), strict=True):
        args[name] = part.unflatten(2, args[name].shape[2:])
    monkeypatch.setattr(torch.Tensor, "contiguous", refuse_slices(torch.Tensor.contiguous))
    found = run(args)
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def refuse_slices(contiguous):
    """Return Tensor.contiguous, except that it fails on a slice of the tests' projection of 128 channels."""

    def checked(x: torch.Tensor) -> torch.Tensor:
        assert x.dim() < 3 or x.stride(1) != 128 or x.shape[2:].numel() == 128
        return contiguous(x)

    return checked


@interpreted
def test_parts_of_the_batch(monkeypatch):
    from glalm.kernels.triton.ssd import SSDPlan

    monkeypatch.setattr(SSDPlan, "count_parts", lambda *_: 2)
    check(IEEE, 2, 20, 2, 1, 8, 8)
    check(IEEE, 2, 20, 2, 1, 8, 8, fused=False, states=False)


@interpreted
def test_one_token_of_any_layout():
    """The stride of an axis of size 1 says nothing."""
    from ssd_cases import random_arguments

    from glalm.kernels import chunk_ssd

    args = random_arguments(3, 1, 2, 1, 16, 16, states=False)
    do = torch.randn(3, 1, 2, 16)
    oddly_spaced = do.as_strided(do.shape, (32, 1, 16, 1))
    x = args["x"].requires_grad_()
    expected, found = (torch.autograd.grad(chunk_ssd(**args)[0], x, d)[0] for d in (do, oddly_spaced))
    assert torch.equal(found, expected)


@interpreted
def test_precision_that_was_set_for_cuda_alone():
    """After this setting, torch.get_float32_matmul_precision raises."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    check(IEEE, 1, 20, 2, 1, 16, 16)


@interpreted
def test_head_sizes_of_several_blocks():
    check(IEEE, 1, 20, 2, 1, 40, 24)


@interpreted
def test_time_steps_alone():
    check(IEEE, 1, 20, 2, 1, 8, 8, fused=False, states=False)


@interpreted
def test_gates_that_forget_everything():
    check(IEEE, 1, 40, 2, 1, 8, 8, strong=True)


@interpreted
def test_gates_that_forget_everything_in_long_chunks(monkeypatch):
    use_configs(64, monkeypatch)
    check(IEEE, 1, 130, 2, 1, 8, 8, strong=True)


@interpreted
def test_other_dtypes():
    check(BF16, 1, 20, 2, 1, 8, 8, dtype=torch.bfloat16)
    check(2e-3, 1, 20, 2, 1, 8, 8, dtype=torch.float16)


@interpreted
def test_results_do_not_depend_on_uninitialized_memory(monkeypatch):
    from selective_scan_cases import differentiate
    from ssd_cases import random_arguments

    from glalm.kernels import chunk_ssd

    args = random_arguments(1, 40, 2, 1, 8, 24, bounds=[0, 0, 1, 18, 18, 40, 40], states=False)

    def poisoned(empty):
        def made(*shape, **options):
            x = empty(*shape, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-1)

        return made

    def run():
        return differentiate(lambda **a: chunk_ssd(**a, output_final_state=True), args)

    first = run()
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    second = run()
    assert all(torch.equal(first[name], second[name]) for name in first)


@interpreted
def test_pytorch_may_check_compile_and_refuse():
    """The registered operators are as PyTorch requires, compile to one graph, and refuse what they cannot do."""
    from selective_scan_cases import differentiate
    from ssd_cases import random_arguments

    from glalm.kernels import chunk_ssd

    def operator(**args):
        return chunk_ssd(**args, output_final_state=True)

    args = random_arguments(1, 5, 2, 1, 4, 4, bounds=[0, 2, 5], fused=False)
    args["D"] = torch.ones(2)
    inputs = tuple(args[n] for n in ("x", "dt", "A", "B", "C", "D", "initial_state"))
    bounds = args["cu_seqlens"]
    state = args["initial_state"]
    torch.library.opcheck(torch.ops.glalm.chunk_ssd.default, (*inputs, True, bounds))
    torch.library.opcheck(torch.ops.glalm.chunk_ssd_backward.default, (*inputs, bounds, args["x"], state))
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(differentiate(compiled, args), differentiate(operator, args), rtol=0, atol=0)
    x = args.pop("x").requires_grad_()
    (dx,) = torch.autograd.grad(chunk_ssd(x, **args)[0].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^chunk_ssd does not support double backward"):
        dx.sum().backward()
    with pytest.raises(NotImplementedError, match=r"^chunk_ssd does not support torch\.func"):
        torch.func.grad(lambda x: chunk_ssd(x, **args)[0].sum())(x)
