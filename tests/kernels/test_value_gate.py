import pytest
import torch

from glalm.kernels import chunk_value_gla
from glalm.kernels.reference import recurrent_gla


def truth(q, k, v, g, initial_state=None, cu_seqlens=None):
    """Each value channel by itself is a GLA with one value channel and the same gate for all keys."""
    columns = range(v.shape[3])
    parts = [
        recurrent_gla(
            q,
            k,
            v[..., i : i + 1],
            g[..., i : i + 1].expand(q.shape),
            initial_state=None if initial_state is None else initial_state[..., i : i + 1],
            cu_seqlens=cu_seqlens,
        )
        for i in columns
    ]
    return tuple(torch.cat(x, -1) for x in zip(*parts, strict=True))


@pytest.mark.parametrize("gate", [-torch.inf, -1e5])
def test_what_follows_a_gate_that_forgets_all_keeps_its_digits(gate, draw, differentiate):
    args, g = draw(T=40, K=6, V=4), draw(T=40, K=4, seed=2)["g"]
    args["g"] = g.index_fill(1, torch.tensor([0, 18]), gate)
    found = differentiate(lambda **a: chunk_value_gla(**a, output_final_state=True), args)
    expected = differentiate(truth, args)
    for name in expected:
        torch.testing.assert_close(found[name].double(), expected[name].double(), rtol=1e-5, atol=1e-5)


def test_packed_without_states_is_a_recurrence_a_channel(draw, differentiate):
    args = draw(B=1, T=50, K=6, V=4, dtype=torch.float64, bounds=[0, 1, 18, 18, 32, 35, 50])
    args |= {"g": draw(B=1, T=50, K=4, gates=2.0, dtype=torch.float64, seed=2)["g"], "initial_state": None}
    found = differentiate(lambda **a: (chunk_value_gla(**a)[0], a["q"].sum()), args)
    expected = differentiate(lambda **a: (truth(**a)[0], a["q"].sum()), args)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("bounds", [None, [0, 1, 18, 18, 35]], ids=["batch", "packed"])
def test_is_a_recurrence_a_channel(bounds, draw, differentiate):
    args = draw(B=1 if bounds else 2, T=35, K=6, V=4, gates=2.0, dtype=torch.float64, bounds=bounds)
    args["g"] = draw(B=1 if bounds else 2, T=35, K=4, gates=2.0, dtype=torch.float64, seed=2)["g"]
    found = differentiate(lambda **a: chunk_value_gla(**a, output_final_state=True), args)
    expected = differentiate(truth, args)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10)


def test_half_precision_inputs_are_rounded_once(draw):
    args = draw(K=12, V=12, dtype=torch.bfloat16)
    exact, _ = chunk_value_gla(**{n: x if x is None else x.float() for n, x in args.items()})
    assert torch.equal(chunk_value_gla(**args)[0], exact.bfloat16())


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"cu_seqlens": torch.tensor([0, 70])}, "cu_seqlens: expected all sequences packed into one row"),
        ({"g": torch.ones(2, 70, 2, 20)}, "g: expected log forget gates <= 0"),
    ],
)
def test_wrong_arguments_are_named(wrong, message, draw):
    with pytest.raises(ValueError, match=message):
        chunk_value_gla(**{**draw(), "g": -torch.ones(2, 70, 2, 20), **wrong})


def test_a_gate_on_the_key_axis_is_refused(draw):
    args = draw(K=6, V=4)
    with pytest.raises(ValueError, match="g: expected the shape of v"):
        chunk_value_gla(**args)
