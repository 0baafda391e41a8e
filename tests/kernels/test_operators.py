"""Both forms of GLA against the float64 recurrence: results and gradients for all kinds of arguments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm.kernels import chunk_gla, fused_recurrent_gla
from glalm.kernels.reference import recurrent_gla

both_forms = pytest.mark.parametrize("operator", [chunk_gla, fused_recurrent_gla])


def test_reference_is_masked_attention_with_decay(draw):
    """The parallel form (GLA, equation 4) checks the reference, against which everything else is tested."""
    args = draw(B=1, T=9, H=1, K=3, V=4, gates=1, dtype=torch.float64)
    o, final_state = recurrent_gla(**args, scale=0.7)
    q, k, v, g = (args[n][0, :, 0] for n in "qkvg")
    S, b = args["initial_state"][0, 0], g.cumsum(0)
    P = torch.einsum("ik,jk,ijk->ij", q, k, (b[:, None] - b[None]).exp()).tril()
    torch.testing.assert_close(o[0, :, 0], 0.7 * (P @ v + (q * b.exp()) @ S))
    torch.testing.assert_close(final_state[0, 0], b[-1].exp()[:, None] * S + (k * (b[-1] - b).exp()).T @ v)


SHAPES = [  # B, T, H, K, V
    (2, 64, 2, 16, 16),
    (1, 1, 1, 8, 8),
    (3, 1, 2, 5, 9),
    (1, 2, 1, 1, 1),
    (1, 63, 1, 64, 64),
    (2, 65, 2, 7, 33),
    (2, 130, 3, 60, 20),
    (1, 300, 1, 20, 60),
]


@pytest.mark.parametrize("gates", [1 / 16, 1, 10], ids=lambda x: f"gates {x:.2f}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunk_gla_over_shapes_and_gates(draw, assert_matches_reference, shape, gates):
    assert_matches_reference(chunk_gla, draw(*shape, gates=gates), 2e-6)


@pytest.mark.parametrize("shape", [(3, 1, 2, 5, 9), (2, 17, 2, 7, 33)], ids=str)
def test_fused_recurrent_gla_over_shapes(draw, assert_matches_reference, shape):
    assert_matches_reference(fused_recurrent_gla, draw(*shape), 1e-6)


@both_forms
@pytest.mark.parametrize(
    ("dtype", "gate_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-14),
        (torch.float64, torch.float32, 1e-7),  # dg is rounded to float32.
        (torch.float32, torch.float64, 1e-6),
        (torch.bfloat16, torch.float32, 3e-3),  # Rounding the results gives 2^-9.
        (torch.bfloat16, torch.bfloat16, 3e-3),
        (torch.float16, torch.float32, 4e-4),
        (torch.float16, torch.float16, 4e-4),
    ],
    ids=str,
)
def test_dtypes(draw, assert_matches_reference, operator, dtype, gate_dtype, tolerance):
    found = assert_matches_reference(operator, draw(dtype=dtype, gate_dtype=gate_dtype), tolerance)
    assert {found[n].dtype for n in ("o", "dq", "dk", "dv")} == {dtype}
    assert found["dg"].dtype == gate_dtype
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert {found[n].dtype for n in ("final_state", "dinitial_state")} == {state_dtype}


@both_forms
@pytest.mark.parametrize("bounds", [None, [0, 0, 1, 66]], ids=["dense", "packed"])
@pytest.mark.parametrize("gates", [1 / 16, 10], ids=lambda x: f"gates {x:.2f}")
def test_query_heads_that_share_a_state(draw, assert_matches_reference, operator, bounds, gates):
    B = 1 if bounds else 2
    found = assert_matches_reference(operator, draw(B, 66, group=3, bounds=bounds, gates=gates), 2e-6)
    assert found["o"].shape[2] == 6 and found["final_state"].shape[1] == 2


@settings(max_examples=10, deadline=None)
@given(
    T=st.integers(0, 70), H=st.integers(1, 3), group=st.integers(1, 4), forget=st.sampled_from([0.0, 0.1, 30.0]),
    operator=st.sampled_from([chunk_gla, fused_recurrent_gla]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_shared_head_equals_its_repetition(T, H, group, forget, operator, seed):
    random = torch.Generator().manual_seed(seed)
    shapes = (1, T, H * group, 3), (1, T, H, 3), (1, T, H, 2), (1, T, H, 3), (1, H, 3, 2)
    leaves = [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in shapes]
    leaves[3] = -forget * leaves[3].abs()
    leaves = [x.requires_grad_() for x in leaves]
    q, *shared, S = leaves
    o, final = operator(q, *shared, initial_state=S, output_final_state=True)
    repeated = [x.repeat_interleave(group, 2) for x in shared]
    expected, states = chunk_gla(q, *repeated, initial_state=S.repeat_interleave(group, 1), output_final_state=True)
    weights = torch.randn(o.shape, generator=random, dtype=torch.float64)
    found = [o, final, *torch.autograd.grad((o * weights).sum() + final.square().sum(), leaves)]
    truth = [expected, states[:, ::group]]
    total = (expected * weights).sum() + states[:, ::group].square().sum()
    for x, y in zip(found, [*truth, *torch.autograd.grad(total, leaves)], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@both_forms
def test_autocast_does_not_round(draw, differentiate, operator):
    """Inputs that are float32 under autocast are so on purpose."""
    args = draw()
    expected = differentiate(lambda **a: operator(**a, output_final_state=True), args)
    with torch.autocast("cpu", torch.bfloat16):
        found = differentiate(lambda **a: operator(**a, output_final_state=True), args)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


PACKINGS = [
    [0, 15],
    [0, 0, 16],
    [0, 1, 2, 3],
    [0, 0, 1, 65, 66, 66, 194, 195, 200, 200],  # empty, of one token, shorter and longer than a chunk
]


@both_forms
@pytest.mark.parametrize("bounds", PACKINGS, ids=str)
@pytest.mark.parametrize("gates", [1 / 16, 10], ids=lambda x: f"gates {x:.2f}")
def test_packed_sequences(draw, assert_matches_reference, operator, bounds, gates):
    assert_matches_reference(operator, draw(1, bounds[-1], bounds=bounds, gates=gates), 2e-6)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=6), seed=st.integers(0, 99), int32=st.booleans())
def test_packed_sequences_are_independent(lengths, seed, int32):
    random = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    q, k, g, v = (torch.randn(1, T, 2, D, generator=random) for D in (4, 4, 4, 6))
    g = -g.abs()
    initial_state = torch.randn(len(lengths), 2, 4, 6, generator=random)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32 if int32 else torch.int64)
    o, final_state = chunk_gla(q, k, v, g, initial_state=initial_state, output_final_state=True, cu_seqlens=cu_seqlens)
    pieces = zip(*(x.split(lengths, 1) for x in (q, k, v, g)), initial_state.split(1), strict=True)
    alone = [chunk_gla(*x, initial_state=S, output_final_state=True) for *x, S in pieces]
    torch.testing.assert_close(o, torch.cat([o for o, _ in alone], 1))
    torch.testing.assert_close(final_state, torch.cat([S for _, S in alone]))


@both_forms
def test_no_tokens_do_not_change_the_state(draw, operator):
    args = draw(T=0)
    o, final_state = operator(**args, output_final_state=True)
    assert o.shape == args["v"].shape
    torch.testing.assert_close(final_state, args["initial_state"])


@both_forms
@pytest.mark.parametrize("cut", [1, 50, 64])
def test_a_carried_state_continues_the_sequence(draw, operator, cut):
    args = draw(T=100)
    args.pop("cu_seqlens")
    tokens = {n: args.pop(n) for n in "qkvg"}
    whole, last = chunk_gla(**tokens, **args, output_final_state=True)
    first, S = operator(**{n: x[:, :cut] for n, x in tokens.items()}, **args, output_final_state=True)
    second, S = operator(**{n: x[:, cut:] for n, x in tokens.items()}, initial_state=S, output_final_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(S, last)


@both_forms
def test_without_an_initial_state_it_is_zero(draw, operator):
    args = draw()
    expected = operator(**{**args, "initial_state": torch.zeros_like(args["initial_state"])}, output_final_state=True)
    args.pop("initial_state")
    found = operator(**args, output_final_state=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@both_forms
def test_the_final_state_is_returned_on_request(draw, operator):
    args = draw()
    assert operator(**args)[1] is None
    assert operator(**args, output_final_state=True)[1].shape == args["initial_state"].shape


@both_forms
def test_scale(draw, operator):
    args = draw(K=9)
    plain, _ = operator(**args)
    torch.testing.assert_close(plain, operator(**args, scale=1 / 3)[0])
    torch.testing.assert_close(plain * 6, operator(**args, scale=2.0)[0])


@both_forms
@pytest.mark.parametrize("used", [0, 1], ids=["only o", "only the final state"])
def test_gradients_of_one_result_alone(draw, differentiate, operator, used):
    args = draw(gates=1)

    def weighted(function, **more):
        def results(**a):
            results = function(**a, **more)
            return tuple(x if i == used else 0 * x for i, x in enumerate(results))

        return results

    found = differentiate(weighted(operator, output_final_state=True), args)
    truth = differentiate(weighted(recurrent_gla), args)
    for name in truth:
        torch.testing.assert_close(found[name], truth[name].to(found[name].dtype), rtol=1e-4, atol=1e-4)


@both_forms
def test_memory_layout_does_not_matter(draw, operator):
    args = draw(dtype=torch.float64)
    args.pop("cu_seqlens")

    def gradients(leaves, strided):
        leaves = {n: x.requires_grad_() for n, x in leaves.items()}
        o, _ = operator(**leaves)
        do = torch.ones(()).to(o).expand_as(o) if strided else torch.ones_like(o)
        return o, *torch.autograd.grad(o, list(leaves.values()), do)

    strided = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in args.items()}
    assert not strided["q"].is_contiguous()
    torch.testing.assert_close(gradients(strided, True), gradients(args, False), rtol=0, atol=1e-14)


@both_forms
@pytest.mark.parametrize("gates", [1 / 16, 20], ids=["weak gates", "strong gates"])
@pytest.mark.parametrize("bounds", [None, [0, 2, 2, 3, 9]], ids=["dense", "packed"])
def test_gradcheck(draw, operator, gates, bounds):
    args = draw(1, 9, 1, 2, 3, gates=gates, dtype=torch.float64, bounds=bounds)
    cu_seqlens = args.pop("cu_seqlens")
    leaves = [x.requires_grad_() for x in args.values()]

    def function(q, k, v, g, initial_state):
        # A finite difference must not raise a gate above 0.
        return operator(q, k, v, g - 1e-3, initial_state=initial_state, output_final_state=True, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(function, leaves)
