"""The real Triton kernels at small shapes, through Triton's interpreter. On a GPU they run compiled: tests/gpu."""

from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from interpreter import INTERPRETED, interpreted, record_launched, run_interpreted

from glalm.kernels import context_parallel
from glalm.kernels.triton.tiles import exact_dot

IEEE = 2e-5  # a few roundings of float32
BF16 = 2e-2  # the interpreter cuts bfloat16 off where the GPU rounds it


@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's")
def test_in_the_interpreter():
    run_interpreted(__file__)


def check(limit, *shape, **options):
    from triton_cases import relative_errors

    errors = relative_errors(*shape, **options)
    assert max(errors.values()) < limit, errors


def cut_into_segments(count, monkeypatch):
    """Cut every sequence into `count` segments."""
    from glalm.kernels.triton import gla

    monkeypatch.setattr(gla, "count_segments", lambda *_: count)


@interpreted
@pytest.mark.parametrize("gate", ["slow", "usual", "fast", "wild", "none"])
def test_every_gate(gate):
    check(IEEE, 1, 100, 2, 16, 16, dtype=torch.float32, gate=gate, states=True)
    check(BF16, 1, 100, 1, 16, 16, dtype=torch.bfloat16, gate=gate)


@interpreted
@pytest.mark.parametrize("gate", ["slow", "usual", "fast", "wild"])
def test_one_gate_a_head(gate):
    check(IEEE, 1, 100, 2, 16, 16, dtype=torch.float32, gate=gate, per="head", states=True)
    check(BF16, 1, 100, 1, 16, 16, dtype=torch.bfloat16, gate=gate, per="head")


@interpreted
def test_no_gate():
    check(IEEE, 1, 100, 2, 16, 16, dtype=torch.float32, per="nothing", states=True)


@interpreted
@pytest.mark.parametrize("per", ["channel", "head"])
@pytest.mark.parametrize("normalizer", [16.0, 0.125])  # the smaller one makes gates that take the pairwise path
def test_logits_of_the_gate(per, normalizer):
    check(IEEE, 1, 100, 2, 20, 16, dtype=torch.float32, per=per, logits=normalizer, states=True)
    check(BF16, 1, 100, 1, 16, 16, dtype=torch.bfloat16, per=per, logits=normalizer)


@interpreted
@pytest.mark.parametrize("per", ["head", "fixed", "nothing"])
def test_one_gate_a_head_in_packed_sequences_and_segments(per):
    check(IEEE, 1, 150, 1, 16, 16, dtype=torch.float32, per=per, cu_seqlens=[0, 0, 1, 66, 66, 150], states=True)
    check(IEEE, 1, 600, 1, 16, 16, dtype=torch.float32, per=per, states=True)
    check(BF16, 1, 70, 1, 128, 256, dtype=torch.bfloat16, per=per)


@interpreted
@pytest.mark.parametrize("gate, group, segments", [("slow", 3, 2), ("wild", 2, 1)])  # wild gates take the pairwise path
def test_query_heads_that_share_a_state(gate, group, segments, monkeypatch):
    cut_into_segments(segments, monkeypatch)
    check(IEEE, 1, 70, 2, 16, 24, dtype=torch.float32, gate=gate, states=True, group=group)
    check(BF16, 1, 66, 1, 16, 16, dtype=torch.bfloat16, gate="slow", group=group)


@interpreted
@pytest.mark.parametrize("per", ["head", "fixed", "nothing"])
def test_query_heads_that_share_a_state_with_one_gate(per):
    check(IEEE, 1, 100, 1, 16, 16, dtype=torch.float32, per=per, cu_seqlens=[0, 0, 1, 66, 100], states=True, group=2)


@interpreted
@pytest.mark.parametrize("T", [1, 2, 3, 63, 64, 65])
def test_every_length(T):
    check(IEEE, 2, T, 1, 16, 32, dtype=torch.float32, states=True)


@interpreted
@pytest.mark.parametrize("per", ["channel", "head", "fixed", "nothing"])
@pytest.mark.parametrize("bounds", [None, [0, 0, 0]], ids=["batch", "packed"])
def test_no_tokens(bounds, per):
    from glalm.kernels.triton import gla

    q, k, v, g = torch.zeros(4, 2 if bounds is None else 1, 0, 1, 16).unbind()
    g = {"channel": g, "head": g[..., 0], "fixed": -torch.rand(1), "nothing": None}[per]
    S, dS = torch.randn(2, 2, 1, 16, 16).unbind()
    bounds = None if bounds is None else torch.tensor(bounds)
    o, final_state, saved = gla.forward(q, k, v, g, 1.0, None, S, True, bounds, True)
    *gradients, dS0 = gla.backward(q, k, v, g, 1.0, None, S, bounds, saved, o, dS)
    assert torch.equal(final_state, S) and torch.equal(dS0, dS)
    for gradient, x in zip(gradients, (q, k, v, g if per in ("channel", "head") else None), strict=True):
        assert gradient is x is None or gradient.shape == x.shape


@interpreted
@pytest.mark.parametrize("K, V", [(20, 24), (16, 40), (80, 16)])
def test_head_sizes_that_are_not_powers_of_two(K, V):
    check(IEEE, 1, 70, 2, K, V, dtype=torch.float32, states=True)


@interpreted
def test_large_heads_of_the_table():
    check(BF16, 1, 70, 1, 64, 64, dtype=torch.bfloat16, states=True)
    check(BF16, 1, 70, 1, 128, 256, dtype=torch.bfloat16)


@interpreted
@pytest.mark.parametrize("segments", [1, 3])  # 3 segments are more than a sequence has chunks
def test_packed_sequences(segments, monkeypatch):
    cut_into_segments(segments, monkeypatch)
    check(IEEE, 1, 150, 1, 16, 16, dtype=torch.float32, cu_seqlens=[0, 0, 1, 66, 66, 150], states=True)


@interpreted
def test_segments_of_a_long_sequence():
    check(IEEE, 1, 600, 1, 16, 16, dtype=torch.float32, states=True)


@interpreted
def test_float16_does_not_overflow_and_float32_gates():
    check(1e-3, 1, 70, 1, 16, 16, dtype=torch.float16, states=True)
    check(BF16, 1, 70, 1, 16, 16, dtype=torch.bfloat16, gate_dtype=torch.float32)


@interpreted
@pytest.mark.parametrize("per, logits", [("channel", None), ("channel", 16.0), ("head", None), ("head", 16.0)])
def test_a_nan_gate_gives_nan(per, logits):
    from glalm.kernels.triton import gla

    q, k, v, g = (-torch.rand(1, 100, 1, 16) for _ in range(4))
    g = g if per == "channel" else g[..., 0].contiguous()
    g[0, 70] = float("nan")
    o, S, _ = gla.forward(q, k, v, g, 1.0, logits, None, True, None, False)
    assert o[0, :64].isfinite().all() and o[0, 70:].isnan().all() and S.isnan().all()


@interpreted
def test_boundary_of_the_fast_path():
    """Chunks on both sides of the limit: one channel just below it takes the pairwise path, alone or with the rest."""
    from triton_cases import GATES

    def near(x):
        g = torch.full_like(x, -79.0 / 64)
        g[:, :64, :, 3] = -81.0 / 64
        return g

    GATES["near"] = near
    check(IEEE, 1, 128, 1, 16, 16, dtype=torch.float32, gate="near", states=True)


@interpreted
@pytest.mark.parametrize(
    "H, K, V, bounds, segments, group",
    [
        (2, 16, 16, None, 1, 1),
        (2, 17, 15, None, 2, 1),
        (2, 16, 65, None, 1, 1),  # padded by a whole block of columns
        (1, 17, 15, [0, 0, 1, 67, 67], 3, 1),  # more than any of these has chunks
        (1, 17, 15, None, 2, 2),
    ],
    ids=str,
)
def test_results_do_not_depend_on_uninitialized_memory(H, K, V, bounds, segments, group, monkeypatch):
    from glalm.kernels.triton import gla

    cut_into_segments(segments, monkeypatch)
    T, bounds = (bounds[-1], torch.tensor(bounds)) if bounds else (90, None)
    heads = H * group
    q, k, v, do = (torch.randn(1, T, h, n) for h, n in ((heads, K), (H, K), (H, V), (heads, V)))
    g = -torch.rand(1, T, H, K)

    def run():
        results = []
        for gate in (g, g[..., 0], None):
            o, final, saved_tensors = gla.forward(q, k, v, gate, 0.25, None, None, True, bounds, True)
            results += [o, final, *gla.backward(q, k, v, gate, 0.25, None, None, bounds, saved_tensors, do, None)]
        return [x for x in results if x is not None]

    def poisoned(empty):
        def made(*args, **options):
            x = empty(*args, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-1)

        return made

    first = run()
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@interpreted
@pytest.mark.parametrize(
    "per, bounds, segments, group",
    [
        ("channel", None, 1, 1),
        ("channel", None, 2, 2),
        ("head", None, 2, 1),
        ("nothing", None, 1, 2),
        ("channel", [0, 40, 90], 2, 1),
    ],
)
def test_a_shard_exchanges_states(per, bounds, segments, group, monkeypatch):
    """It sends what it leaves from zero states, and computes from what it gets; so do the gradients backward."""
    from glalm.kernels.triton import gla

    cut_into_segments(segments, monkeypatch)
    r = torch.Generator().manual_seed(0)
    sizes = (group, 16), (1, 16), (1, 24), (group, 24)
    q, k, v, do = (torch.randn(1, 90, h, n, generator=r) for h, n in sizes)
    x = torch.nn.functional.logsigmoid(torch.randn(1, 90, 1, 16, generator=r)) / 4
    g = {"channel": x, "head": x[..., 0].contiguous(), "nothing": None}[per]
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    entering, dleaving = torch.randn(2, 1 if bounds is None else 2, 1, 16, 24, generator=r)
    inputs = q, k, v, g, 0.25, None

    o, leaving, saved = gla.forward(*inputs, entering, True, cu_seqlens, True)
    _, local, _ = gla.forward(*inputs, None, True, cu_seqlens, False)
    grads = gla.backward(*inputs, entering, cu_seqlens, saved, do, dleaving)
    _, _, _, _, dlocal = gla.backward(*inputs, entering, cu_seqlens, saved, do, None)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)

    class Shard:
        def exchange(self, sent, decay, initial):
            close(sent, local)
            close(sent + decay * entering, leaving)
            return entering, leaving

    def reverse_exchange(context, sent, decay, dfinal):
        close(sent, dlocal)
        close(sent + decay * dleaving, grads[4])
        return dleaving, grads[4]

    monkeypatch.setattr(gla, "reverse_exchange", reverse_exchange)
    *found, buffers = gla.forward_over_processes(*inputs, None, cu_seqlens, True, Shard())
    found += gla.backward(*inputs, entering, cu_seqlens, buffers, do, None, Shard())
    for one, other in zip(found, (o, leaving, entering, *grads), strict=True):
        close(one, other)


@interpreted
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("decay_shape", [(2, 1, 5, 1), (2, 1, 1, 1), (2, 1, 5, 3)])
def test_fold_of_summaries(decay_shape, reverse, monkeypatch):
    """The kernel's results are those of the exchange in PyTorch."""
    from glalm.kernels.triton.exchange import fold_summaries

    r = torch.Generator().manual_seed(0)
    local = torch.randn(3, 2, 1, 5, 3, generator=r)
    decay = torch.rand(3, *decay_shape, generator=r)
    messages = torch.cat([local.flatten(2), decay.flatten(2)], 2)
    monkeypatch.setattr(context_parallel, "all_gather", lambda *_: messages)
    for initial in (None, torch.randn(2, 1, 5, 3, generator=r)):
        for rank in range(3):
            shard = context_parallel.ContextShard("turns", rank, 3)
            expected = shard.exchange(local[rank], decay[rank], initial, reverse=reverse)
            found = fold_summaries(messages, local[0].shape, decay[0, 0].numel(), initial, rank, reverse)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)


@interpreted
@pytest.mark.parametrize("segments", [1, 2])
def test_memory_layout_of_states_and_bounds_does_not_matter(segments, monkeypatch):
    from glalm.kernels.triton import gla

    cut_into_segments(segments, monkeypatch)
    q, k, v, g = (torch.randn(1, 70, 1, 16) for _ in range(4))
    S, dS, bounds = torch.randn(1, 1, 16, 16), torch.ones(1, 1, 16, 16), torch.tensor([0, 70])

    def run(S, dS, bounds):
        args = q, k, v, -g.abs(), 1, None, S
        o, final, saved_tensors = gla.forward(*args, True, bounds, True)
        return o, final, *gla.backward(*args, bounds, saved_tensors, v, dS)

    strided = S.mT.contiguous().mT, torch.ones(()).expand_as(dS), torch.tensor([0, -1, 70])[::2]
    assert all(torch.equal(a, b) for a, b in zip(run(S, dS, bounds), run(*strided), strict=True))


@interpreted
def test_an_integer_scale_is_not_compiled_as_a_constant(monkeypatch):
    """Triton would compile a kernel for scale = 1, and the launcher run it for every other integer."""
    from glalm.kernels.triton import gla

    scales = record_launched(monkeypatch, gla, "scale")
    q = torch.randn(1, 5, 2, 16)
    gla.forward(q, q, q, None, 1, None, None, False, None, False)
    assert [type(x) for x in scales] == [float]


@interpreted
def test_no_tokens_do_not_change_the_state():
    from glalm.kernels.triton import gla

    q, k, v = (torch.randn(1, 0, 2, 16) for _ in range(3))
    o, S, _ = gla.forward(q, k, v, q, 1.0, None, torch.ones(1, 2, 16, 16), True, None, False)
    assert o.shape == v.shape and torch.equal(S, torch.ones(1, 2, 16, 16))

    class Shard:
        def exchange(self, sent, decay, initial):
            return initial, sent + decay * initial

    o, final, entering, _ = gla.forward_over_processes(q, k, v, q, 1.0, None, S, None, False, Shard())
    assert o.shape == v.shape and torch.equal(final, S) and torch.equal(entering, S)


@triton.jit
def product_kernel(a, b, out, PARTS: tl.constexpr):
    i, j = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    tl.store(out + i * 64 + j, exact_dot(tl.load(a + i * 64 + j), tl.load(b + i * 64 + j), PARTS))


@interpreted
@pytest.mark.parametrize(("parts", "error"), [(1, 2**-7), (2, 2**-14), (3, 1e-7)])
@pytest.mark.parametrize("left", [False, True])
def test_exact_dot_is_as_exact_as_its_parts(left, parts, error):
    torch.manual_seed(0)  # The greatest error of float32's own sums depends on the numbers.
    ones, x, out = torch.ones(64, 64).tril().bfloat16(), torch.randn(64, 64), torch.empty(64, 64)

    def worst(x: torch.Tensor) -> float:
        a, b = (x, ones) if left else (ones, x)
        product_kernel[(1,)](a, b, out, parts)
        a, b = a.double(), b.double()
        return ((out - a @ b).abs() / (a.abs() @ b.abs()).clamp(min=1e-3)).max().item()

    assert worst(x) < error and (parts == 3 or worst(x) > error / 100)
    assert worst(x.bfloat16().float()) < 1e-7  # one part holds all of what was a bfloat16
