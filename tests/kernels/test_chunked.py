"""The PyTorch chunkwise path: strong gates, the choice of how a block is computed, and memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glalm.kernels import chunk_gla, chunked

INF = float("inf")


@pytest.mark.parametrize("gate", [-30, -88, -104, -745, -800, -1e5, -3e38, -INF], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_strong_gate_in_a_chunk(draw, assert_matches_reference, gate, dtype):
    args = draw(T=140, dtype=dtype)
    args["g"][:, [0, 20, 31, 32, 63, 64, 100], :, ::2] = gate
    assert_matches_reference(chunk_gla, args, 1e-6 if dtype == torch.float32 else 1e-14)


def test_a_strong_gate_does_not_blur_the_tokens_after_it(draw, differentiate):
    """Their results are, bit for bit, those of a sequence that begins with them."""
    args = draw(B=1, T=64)
    args["g"][:, 32] = -1e5
    reset = differentiate(lambda **a: chunk_gla(**a, output_final_state=True), args)
    fresh = {n: x[:, 32:] if n in "qkvg" else x for n, x in args.items()}
    fresh = differentiate(lambda **a: chunk_gla(**a, output_final_state=True), fresh)
    torch.testing.assert_close(reset["o"][:, 32:], fresh["o"], rtol=0, atol=0)
    torch.testing.assert_close(reset["final_state"], fresh["final_state"], rtol=0, atol=0)


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("bounds", [None, [0, 0, 1, 70, 71, 140]], ids=["dense", "packed"])
def test_gates_that_forget_completely(draw, assert_matches_reference, share, bounds):
    args = draw(1, 140, bounds=bounds)
    forgotten = torch.rand(args["g"].shape, generator=torch.Generator().manual_seed(3)) < share
    args["g"][forgotten] = -INF
    found = assert_matches_reference(chunk_gla, args, 1e-6)
    assert (found["dg"][forgotten] == 0).all()


def test_a_nan_gate_spreads_to_later_tokens_of_its_sequence_only(draw):
    args = draw(B=2, T=140)
    args["g"][1, 70] = float("nan")
    o, final_state = chunk_gla(**args, output_final_state=True)
    assert o[1, 70:].isnan().all() and final_state[1].isnan().all()
    assert o[0].isfinite().all() and o[1, :64].isfinite().all()


@pytest.fixture
def block_calls(monkeypatch):
    """The functions that computed blocks, each with the length of its blocks."""
    calls = set()

    def record_calls(name):
        function = getattr(chunked, name)

        def spy(q, *rest):
            calls.add((name, q.shape[1]))
            return function(q, *rest)

        monkeypatch.setattr(chunked, name, spy)

    record_calls("compute_direct_block")
    record_calls("compute_halved_block")
    return calls


@pytest.mark.parametrize(
    ("sum_of_half", "expected"),
    [
        (0.999 * chunked.MAX_EXPONENT, {("compute_direct_block", 64)}),
        (1.001 * chunked.MAX_EXPONENT, {("compute_halved_block", 64), ("compute_direct_block", 32)}),
    ],
    ids=["below", "above"],
)
@pytest.mark.parametrize("half", [0, 1], ids=["first half", "second half"])
def test_blocks_are_halved_from_the_largest_exponent_on(
    draw, assert_matches_reference, block_calls, sum_of_half, expected, half
):
    args = draw(B=1, T=64)
    tokens = slice(1, 32) if half == 0 else slice(32, 64)  # No pair of tokens spans the first gate.
    args["g"] /= args["g"][:, tokens].sum(1, keepdim=True) / -sum_of_half
    args["g"][:, 32 * (1 - half) : 32 * (2 - half)] = -0.01
    assert_matches_reference(chunk_gla, args, 4e-6)
    assert block_calls == expected


def test_direct_and_halved_blocks_of_every_length_in_one_call(draw, assert_matches_reference, block_calls):
    args = draw(B=2, T=256)
    args["g"][0, 64:128] *= 100
    args["g"][1, 128:] *= 1e4
    assert_matches_reference(chunk_gla, args, 2e-6)
    direct = {C for name, C in block_calls if name == "compute_direct_block"}
    halved = {C for name, C in block_calls if name == "compute_halved_block"}
    assert 64 in direct & halved and 1 in direct and {2, 4, 8, 16, 32} <= halved


def test_the_largest_direct_exponents_do_not_overflow(draw, assert_matches_reference):
    args = draw(B=1, T=64)
    args["g"][:] = -0.99 * chunked.MAX_EXPONENT / 32
    for n in "qk":
        args[n] *= 1e8
    assert_matches_reference(chunk_gla, args, 1e-5)  # 32 roundings of a sum near 20 in float32


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in (result if isinstance(result, (tuple, list)) else [result]) if torch.is_tensor(x)]
        self.numel = max([self.numel, *(x.untyped_storage().nbytes() // x.itemsize for x in tensors)])
        return result


@pytest.mark.parametrize("gates", [1 / 16, 10], ids=["weak gates", "strong gates"])
def test_memory_is_linear_in_time(draw, gates):
    def largest(T):
        args = draw(B=1, T=T, gates=gates)
        inputs = [args[n] for n in "qkvg"]
        with LargestTensor() as seen:
            call = chunked.ChunkedGLA(*inputs, 1.0, None, None)
            call.outputs()
            call.gradients(args["v"], None)
        return seen.numel

    assert largest(1024) <= 4 * largest(256) + 1024
    assert largest(1024) <= 1024 * 2 * 64  # one [C, C] matrix per chunk and head
