"""A wrong argument is a ValueError whose message begins with the name of the argument."""

import pytest
import torch
from ssd_cases import random_arguments

from glalm.kernels import (
    chunk_delta_rule,
    chunk_gla,
    chunk_ssd,
    fused_recurrent_delta_rule,
    fused_recurrent_gla,
    fused_recurrent_ssd,
)

WRONG = [
    ("q", "three dimensions", lambda a: {"q": a["q"][0]}),
    ("q", "no channels", lambda a: {n: a[n][..., :0] for n in "qkg"}),
    ("q", "integers", lambda a: {n: a[n].long() for n in "qkv"}),
    ("k", "another T", lambda a: {"k": a["k"][:, 1:]}),
    ("k", "another dtype", lambda a: {"k": a["k"].bfloat16()}),
    ("k", "another device", lambda a: {"k": a["k"].to("meta")}),
    ("k", "more heads", lambda a: {n: a[n].repeat(1, 1, 2, 1) for n in "kvg"}),
    ("k", "no heads", lambda a: {n: a[n][:, :, :0] for n in "kvg"}),
    ("v", "another number of heads", lambda a: {"v": a["v"][:, :, :1]}),
    ("v", "three dimensions", lambda a: {"v": a["v"][..., 0]}),
    ("v", "another dtype", lambda a: {"v": a["v"].double()}),
    ("g", "one gate a head", lambda a: {"g": a["g"][..., :1]}),
    ("g", "integers", lambda a: {"g": a["g"].long()}),
    ("g", "above 0", lambda a: {"g": a["g"].abs()}),
    ("initial_state", "of fewer sequences", lambda a: {"initial_state": a["initial_state"][1:]}),
    ("initial_state", "with the heads of q", lambda a: {n: a[n][:, :, :1] for n in "kvg"}),
    ("initial_state", "V x K", lambda a: {"initial_state": a["initial_state"].mT}),
    ("initial_state", "bfloat16", lambda a: {"initial_state": a["initial_state"].bfloat16()}),
    ("initial_state", "float64", lambda a: {"initial_state": a["initial_state"].double()}),
    ("initial_state", "another device", lambda a: {"initial_state": a["initial_state"].to("meta")}),
    ("initial_state", "a list", lambda a: {"initial_state": a["initial_state"].tolist()}),
    ("cu_seqlens", "a list", lambda a: {"cu_seqlens": [0, 2, 5]}),
    ("gate_logit_normalizer", "below 0", lambda a: {"gate_logit_normalizer": -2.0}),
    ("gate_logit_normalizer", "0", lambda a: {"gate_logit_normalizer": 0}),
    ("cu_seqlens", "floats", lambda a: {"cu_seqlens": a["cu_seqlens"].float()}),
    ("cu_seqlens", "two dimensions", lambda a: {"cu_seqlens": a["cu_seqlens"][None]}),
    ("cu_seqlens", "one bound", lambda a: {"cu_seqlens": a["cu_seqlens"][:1]}),
    ("cu_seqlens", "not from 0", lambda a: {"cu_seqlens": torch.tensor([1, 2, 5])}),
    ("cu_seqlens", "not to T", lambda a: {"cu_seqlens": torch.tensor([0, 2, 4])}),
    ("cu_seqlens", "a step down", lambda a: {"cu_seqlens": torch.tensor([0, 6, 5])}),
    ("cu_seqlens", "two rows", lambda a: {n: a[n].expand(2, -1, -1, -1) for n in "qkvg"}),
]


@pytest.mark.parametrize("operator", [chunk_gla, fused_recurrent_gla])
@pytest.mark.parametrize(("name", "what", "wrong"), WRONG, ids=[f"{name}: {what}" for name, what, _ in WRONG])
def test_wrong_arguments_are_named(draw, operator, name, what, wrong):
    args = draw(1, 5, bounds=[0, 2, 5])
    operator(**args)
    with pytest.raises(ValueError, match=f"^{name}: "):
        operator(**{**args, **wrong(args)})


def test_float64_inputs_require_a_float64_state(draw):
    args = draw(dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^initial_state: .*float64"):
        chunk_gla(**{**args, "initial_state": args["initial_state"].float()})


@pytest.mark.parametrize("operator", [chunk_delta_rule, fused_recurrent_delta_rule])
def test_the_delta_rule_has_as_many_heads_of_keys_as_of_queries(draw, operator):
    args = draw(group=2)
    with pytest.raises(ValueError, match=r"^k: expected the shape of q, \[2, 70, 4, 12\], got"):
        operator(args["q"], args["k"], args["v"], args["g"][..., 0].exp())


@pytest.mark.parametrize("operator", [chunk_ssd, fused_recurrent_ssd])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda a: {"A": -a["A"]}, r"^A: expected dt A <= 0 \(A < 0 and dt > 0\), got a maximum of "),
        (lambda a: {n: a[n][..., :0] for n in "BC"}, r"^B: expected the shape .* and N > 0, got \[2, 5, 1, 0\]"),
        (lambda a: {"C": a["C"].double()}, "^C: expected the dtype of x"),
    ],
)
def test_wrong_arguments_of_mamba_2_have_its_names(operator, wrong, message):
    """On the CPU, an operator with other names computes it."""
    args = random_arguments(2, 5, 2, 1, 4, 6, states=False)
    operator(**args)
    with pytest.raises(ValueError, match=message):
        operator(**{**args, **wrong(args)})
