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


def as_gla(name: str, args: dict, form: str):
    """The operator as a function of chunk_gla's arguments, and these with the gate that it stands for."""
    operator = getattr(kernels, f"{form}_{name}")
    gate = args["g"][..., 0] if GATES[name] is None else GATES[name](*args["q"].shape[:3]).to(args["g"].dtype)
    given = {**args, "g": gate}

    def simple(g, **rest):
        o, state = operator(**rest, g=g) if GATES[name] is None else operator(**rest)
        return o + 0 * g.sum(), state  # so that g has a gradient, if only 0

    return simple, given


@pytest.mark.parametrize("form", ["chunk", "fused_recurrent"])
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("bounds", [None, [0, 1, 40, 40, 70]], ids=["batch", "packed"])
def test_is_gla_with_that_gate(name, form, bounds, draw, differentiate):
    args = draw(B=1 if bounds else 2, bounds=bounds, dtype=torch.float64)
    operator, given = as_gla(name, args, form)
    found = differentiate(lambda **a: operator(**a, output_final_state=True), given)

    def truth(g, **rest):
        return recurrent_gla(g=g[..., None].expand(rest["q"].shape), **rest)

    expected = differentiate(truth, given)
    for key in expected:
        if key == "dg" and name != "simple_gla":
            assert found[key].abs().max() == 0
        else:
            torch.testing.assert_close(
                found[key], expected[key], rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("form", ["chunk", "fused_recurrent"])
@pytest.mark.parametrize("name", GATES)
def test_the_scale_is_the_one_given(name, form, draw):
    args = draw(dtype=torch.float64)
    operator, given = as_gla(name, args, form)
    gates = given["g"][..., None].expand(args["q"].shape)
    expected, _ = recurrent_gla(**{**args, "g": gates}, scale=0.7)
    torch.testing.assert_close(operator(**given, scale=0.7)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["chunk", "fused_recurrent"])
def test_a_gate_a_head_may_be_given_as_logits(form, draw):
    args = draw(dtype=torch.float64)
    logits = 50 * args.pop("g")[..., 0] + 2
    gates = (F.logsigmoid(logits) / 3)[..., None].expand(args["q"].shape)
    found, _ = getattr(kernels, f"{form}_simple_gla")(**args, g=logits, gate_logit_normalizer=3.0)
    torch.testing.assert_close(found, recurrent_gla(**args, g=gates)[0], rtol=1e-9, atol=1e-9)


def test_retention_decays_in_float32():
    q = torch.ones(1, 3, 4, 2)
    o, _ = kernels.chunk_retention(q, q, q, scale=0.5)
    decay = 1 - 2.0 ** (-5 - torch.arange(4.0))
    torch.testing.assert_close(o[0, 2, :, 0], 1 + decay + decay**2)


def test_a_gate_of_the_wrong_shape_is_named():
    q = torch.ones(1, 3, 4, 2)
    with pytest.raises(ValueError, match=r"g: expected the shape \[B, T, H\] = \[1, 3, 4\], got \[1, 3, 4, 2\]"):
        kernels.chunk_simple_gla(q, q, q, -q)
