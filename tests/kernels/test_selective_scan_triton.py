"""The kernels of the selective scan at small shapes in Triton's interpreter, which needs a process of its own."""

import pytest
import torch
from interpreter import INTERPRETED, interpreted, run_interpreted

IEEE = 3e-6
BF16 = 1.5e-2  # The interpreter truncates to bfloat16; the GPU rounds.


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's")
def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Let CPU tensors take the kernels, in tiles of 2 tokens and cells of 4."""
    from glalm.kernels import common
    from glalm.kernels.triton import launch

    monkeypatch.setattr(common, "has_kernel", lambda x: x.dtype != torch.float64)
    tile = {"ROWS": 2, "BD": 32, "CELL": 4}
    config = launch.LaunchConfig(tile, 1, 1)
    monkeypatch.setitem(launch.SELECTIVE_SCAN, 9, launch.SelectiveScanConfigs(config, config))


def give_threads_two_channels(monkeypatch):
    from glalm.kernels.triton import launch

    config = launch.LaunchConfig({"ROWS": 2, "BD": 64, "CELL": 4}, 1, 1)
    monkeypatch.setitem(launch.SELECTIVE_SCAN, 9, launch.SelectiveScanConfigs(config, config))


def cut_into_segments(count, monkeypatch):
    from glalm.kernels.triton.selective_scan import ScanPlan

    monkeypatch.setattr(ScanPlan, "count_segments", lambda *_: count)


def check(limit, *shape, **options):
    from selective_scan_cases import relative_errors

    errors = relative_errors(*shape, **options)
    assert max(errors.values()) < limit, errors  # A NaN fails, too.


@interpreted
@pytest.mark.parametrize("T", [1, 4, 9])
def test_every_length(T):
    check(IEEE, 2, T, 5, 2)


@interpreted
@pytest.mark.parametrize("segments", [1, 3])
def test_packed_sequences(segments, monkeypatch):
    cut_into_segments(segments, monkeypatch)
    check(IEEE, 1, 13, 5, 2, bounds=[0, 0, 1, 4, 4, 13, 13])


@interpreted
@pytest.mark.parametrize("states", [True, False])
def test_segments_of_a_long_sequence(states, monkeypatch):
    cut_into_segments(3, monkeypatch)
    check(IEEE, 1, 15, 5, 2, states=states)


@interpreted
def test_time_steps_alone():
    check(IEEE, 1, 9, 5, 2, fused=False)
    check(IEEE, 1, 9, 5, 2, fused=False, states=False)


@interpreted
@pytest.mark.parametrize("d, N", [(33, 2), (32, 1), (3, 20)])
def test_channels_and_state_sizes(d, N):
    check(IEEE, 1, 6, d, N)


@interpreted
def test_two_channels_in_a_thread(monkeypatch):
    give_threads_two_channels(monkeypatch)
    check(IEEE, 1, 6, 70, 2)


@interpreted
def test_other_dtypes():
    check(BF16, 1, 9, 5, 3, dtype=torch.bfloat16)
    check(BF16, 1, 6, 5, 2, dtype=torch.bfloat16, step_dtype=torch.float32)
    check(2e-3, 1, 6, 5, 2, dtype=torch.float16)


@interpreted
def test_results_do_not_depend_on_uninitialized_memory(monkeypatch):
    from selective_scan_cases import differentiate, random_arguments

    from glalm.kernels import selective_scan

    args = random_arguments(1, 13, 5, 2, bounds=[0, 0, 1, 4, 4, 13, 13], states=False)

    def poisoned(empty):
        def made(*shape, **options):
            x = empty(*shape, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-1)

        return made

    first = differentiate(selective_scan, args)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    second = differentiate(selective_scan, args)
    assert all(torch.equal(first[name], second[name]) for name in first)


@interpreted
def test_pytorch_may_check_compile_and_refuse():
    """The registered operators are as PyTorch requires, compile to one graph, and refuse what they cannot do."""
    from selective_scan_cases import differentiate, random_arguments

    from glalm.kernels import selective_scan

    args = random_arguments(1, 5, 5, 2, bounds=[0, 2, 5])
    inputs = tuple(args[n] for n in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "cu_seqlens"))
    torch.library.opcheck(torch.ops.glalm.selective_scan.default, (*inputs, True))
    _, state, checkpoints = torch.ops.glalm.selective_scan.default(*inputs, True)
    torch.library.opcheck(torch.ops.glalm.selective_scan_backward.default, (*inputs, checkpoints, args["x"], state))
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(differentiate(compiled, args), differentiate(selective_scan, args), rtol=0, atol=0)
    x = args.pop("x").requires_grad_()
    (dx,) = torch.autograd.grad(selective_scan(x, **args)[0].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^selective_scan does not support double backward"):
        dx.sum().backward()
    with pytest.raises(NotImplementedError, match=r"^selective_scan does not support torch\.func"):
        torch.func.grad(lambda x: selective_scan(x, **args)[0].sum())(x)
    with pytest.raises(ValueError, match=r"^A: on CUDA"):
        selective_scan(torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.ones(3, 65), *torch.ones(2, 1, 2, 65))
