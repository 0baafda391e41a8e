"""The relatives of gated linear attention by their gates, chunkwise and token by token."""

import pytest
import torch
import torch.nn.functional as F

from glalm import kernels
from glalm.kernels.reference import recurrent_gla

GATES = {
    "simple_gla": None,
    "retention": lambda B, T, H: (1 - 2.0 ** (-5 - torch.arange(H).double())).log().expand(B, T, H),
    "linear_attn": lambda B, T, H: torch.zeros(B, T, H, dtype=torch.float64),
}
both_forms = pytest.mark.parametrize("form", ["chunk", "fused_recurrent"])


def as_gla(name: str, args: dict, form: str):
    """Return the operator as a function of chunk_gla's arguments, and these with the operator's gate per head."""
    operator = getattr(kernels, f"{form}_{name}")
    gate = args["g"][..., 0] if GATES[name] is None else GATES[name](*args["q"].shape[:3]).to(args["g"].dtype)

    def call(g, **rest):
        o, state = operator(**rest, g=g) if GATES[name] is None else operator(**rest)
        return o + 0 * g.sum(), state  # g gets a gradient, if only 0.

    return call, {**args, "g": gate}


# One gate per head, a fixed one, or none --------------------------------------------------------------------


@both_forms
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("bounds", [None, [0, 1, 40, 40, 70]], ids=["batch", "packed"])
def test_relatives_are_gla_with_their_gate(name, form, bounds, draw, differentiate):
    args = draw(B=1 if bounds else 2, bounds=bounds, dtype=torch.float64)
    operator, args = as_gla(name, args, form)
    found = differentiate(lambda **a: operator(**a, output_final_state=True), args)

    def reference(g, **rest):
        return recurrent_gla(g=g[..., None].expand(rest["q"].shape), **rest)

    expected = differentiate(reference, args)
    for key in expected:
        if key == "dg" and name != "simple_gla":
            assert found[key].abs().max() == 0
        else:
            torch.testing.assert_close(
                found[key], expected[key], rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}"
            )


@both_forms
@pytest.mark.parametrize("name", GATES)
def test_an_explicit_scale(name, form, draw):
    args = draw(dtype=torch.float64)
    operator, with_gate = as_gla(name, args, form)
    gates = with_gate["g"][..., None].expand(args["q"].shape)
    expected, _ = recurrent_gla(**{**args, "g": gates}, scale=0.7)
    torch.testing.assert_close(operator(**with_gate, scale=0.7)[0], expected, rtol=1e-9, atol=1e-9)


def test_retention_decays_in_float32():
    q = torch.ones(1, 3, 4, 2)
    o, _ = kernels.chunk_retention(q, q, q, scale=0.5)
    decay = 1 - 2.0 ** (-5 - torch.arange(4.0))
    torch.testing.assert_close(o[0, 2, :, 0], 1 + decay + decay**2)


@both_forms
def test_retention_takes_other_constant_decays(form, draw):
    args = draw(dtype=torch.float64)
    H = args["q"].shape[2]
    g = -torch.linspace(0, 2, H, dtype=torch.float64)
    expected, _ = recurrent_gla(**{**args, "g": g[:, None].expand(args["q"].shape)})
    found, _ = getattr(kernels, f"{form}_retention")(**{**args, "g": g})
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=rf"g: expected the shape \[H\] = \[{H}\]"):
        getattr(kernels, f"{form}_retention")(**{**args, "g": g[1:]})


def test_a_gate_of_the_wrong_shape_is_named():
    q = torch.ones(1, 3, 4, 2)
    with pytest.raises(ValueError, match=r"g: expected the shape \[B, T, H\] = \[1, 3, 4\], got \[1, 3, 4, 2\]"):
        kernels.chunk_simple_gla(q, q, q, -q)


@both_forms
@pytest.mark.parametrize("name", ["retention", "linear_attn"])
def test_an_option_of_other_operators_is_refused(form, name):
    q = torch.ones(1, 3, 4, 2)
    with pytest.raises(TypeError, match="gate_logit_normalizer"):
        getattr(kernels, f"{form}_{name}")(q, q, q, gate_logit_normalizer=16.0)


# Logits of the gate -----------------------------------------------------------------------------------------

GATE_PER_CHANNEL = (kernels.chunk_gla, kernels.fused_recurrent_gla)
GATE_PER_HEAD = (kernels.chunk_simple_gla, kernels.fused_recurrent_simple_gla)


@pytest.mark.parametrize("operator", [*GATE_PER_CHANNEL, *GATE_PER_HEAD])
@pytest.mark.parametrize("bounds", [None, [0, 1, 40, 40, 70]], ids=["batch", "packed"])
def test_logits_give_the_log_gate(operator, bounds, draw, differentiate):
    args = draw(B=1 if bounds else 2, bounds=bounds, dtype=torch.float64)
    logits = 5 * torch.randn(args["q"].shape, dtype=torch.float64)
    args["g"] = logits if operator in GATE_PER_CHANNEL else logits[..., 0]

    def from_log_gates(g, **rest):
        return operator(**rest, g=F.logsigmoid(g) / 16, output_final_state=True)

    def from_logits(**all_):
        return operator(**all_, gate_logit_normalizer=16.0, output_final_state=True)

    found = differentiate(from_logits, args)
    torch.testing.assert_close(found, differentiate(from_log_gates, args), rtol=1e-9, atol=1e-10)


@both_forms
def test_logits_of_a_gate_per_head(form, draw):
    args = draw(dtype=torch.float64)
    logits = 50 * args.pop("g")[..., 0] + 2
    gates = (F.logsigmoid(logits) / 3)[..., None].expand(args["q"].shape)
    found, _ = getattr(kernels, f"{form}_simple_gla")(**args, g=logits, gate_logit_normalizer=3.0)
    torch.testing.assert_close(found, recurrent_gla(**args, g=gates)[0], rtol=1e-9, atol=1e-9)


def test_logits_may_be_positive_and_log_gates_may_not(draw):
    args = draw()
    args["g"] = args["g"].abs() + 1
    kernels.chunk_gla(**args, gate_logit_normalizer=16.0)
    with pytest.raises(ValueError, match="g: expected log forget gates <= 0"):
        kernels.chunk_gla(**args)


# A gate on the value axis -----------------------------------------------------------------------------------


def recurrent_value_gla(q, k, v, g, initial_state=None, cu_seqlens=None):
    """Each value channel alone is GLA with one value channel, and with the same gate for all keys."""
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
def test_value_gate_keeps_the_digits_after_a_gate_that_forgets_everything(gate, draw, differentiate):
    args = draw(T=40, K=6, V=4)
    args["g"] = draw(T=40, K=4, seed=2)["g"].index_fill(1, torch.tensor([0, 18]), gate)
    found = differentiate(lambda **a: kernels.chunk_value_gla(**a, output_final_state=True), args)
    expected = differentiate(recurrent_value_gla, args)
    for name in expected:
        torch.testing.assert_close(found[name].double(), expected[name].double(), rtol=1e-5, atol=1e-5)


def test_value_gate_of_packed_sequences_without_states(draw, differentiate):
    args = draw(B=1, T=50, K=6, V=4, dtype=torch.float64, bounds=[0, 1, 18, 18, 32, 35, 50])
    args |= {"g": draw(B=1, T=50, K=4, gates=2.0, dtype=torch.float64, seed=2)["g"], "initial_state": None}
    found = differentiate(lambda **a: (kernels.chunk_value_gla(**a)[0], a["q"].sum()), args)
    expected = differentiate(lambda **a: (recurrent_value_gla(**a)[0], a["q"].sum()), args)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("bounds", [None, [0, 1, 18, 18, 35]], ids=["batch", "packed"])
def test_value_gate_is_a_recurrence_per_channel(bounds, draw, differentiate):
    args = draw(B=1 if bounds else 2, T=35, K=6, V=4, gates=2.0, dtype=torch.float64, bounds=bounds)
    args["g"] = draw(B=1 if bounds else 2, T=35, K=4, gates=2.0, dtype=torch.float64, seed=2)["g"]
    found = differentiate(lambda **a: kernels.chunk_value_gla(**a, output_final_state=True), args)
    expected = differentiate(recurrent_value_gla, args)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10)


def test_value_gate_rounds_half_precision_once(draw):
    args = draw(K=12, V=12, dtype=torch.bfloat16)
    exact, _ = kernels.chunk_value_gla(**{n: x if x is None else x.float() for n, x in args.items()})
    assert torch.equal(kernels.chunk_value_gla(**args)[0], exact.bfloat16())


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"cu_seqlens": torch.tensor([0, 70])}, "cu_seqlens: expected all sequences packed into one row"),
        ({"g": torch.ones(2, 70, 2, 20)}, "g: expected log forget gates <= 0"),
    ],
)
def test_wrong_arguments_of_the_value_gate_are_named(wrong, message, draw):
    with pytest.raises(ValueError, match=message):
        kernels.chunk_value_gla(**{**draw(), "g": -torch.ones(2, 70, 2, 20), **wrong})


def test_value_gate_refuses_a_gate_on_the_key_axis(draw):
    with pytest.raises(ValueError, match=r"g: expected the shape \[B, T, H, V\]"):
        kernels.chunk_value_gla(**draw(K=6, V=4))
