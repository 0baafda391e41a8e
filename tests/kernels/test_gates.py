import pytest
import torch
import torch.nn.functional as F

from glalm import kernels

PAIRS = {
    "vector": (kernels.chunk_gla, kernels.fused_recurrent_gla),
    "scalar": (kernels.chunk_simple_gla, kernels.fused_recurrent_simple_gla),
}


@pytest.mark.parametrize("operator", [op for pair in PAIRS.values() for op in pair])
@pytest.mark.parametrize("bounds", [None, [0, 1, 40, 40, 70]], ids=["batch", "packed"])
def test_logits_are_those_of_the_gate(operator, bounds, draw, differentiate):
    args = draw(B=1 if bounds else 2, bounds=bounds, dtype=torch.float64)
    logits = 5 * torch.randn(args["q"].shape, dtype=torch.float64)
    args["g"] = logits if operator in PAIRS["vector"] else logits[..., 0]

    def outside(g, **rest):
        return operator(**rest, g=F.logsigmoid(g) / 16, output_final_state=True)

    def inside(**all_):
        return operator(**all_, gate_logit_normalizer=16.0, output_final_state=True)

    torch.testing.assert_close(differentiate(inside, args), differentiate(outside, args), rtol=1e-9, atol=1e-10)


def test_logits_may_be_positive_and_log_gates_may_not(draw):
    args = draw()
    args["g"] = args["g"].abs() + 1
    kernels.chunk_gla(**args, gate_logit_normalizer=16.0)
    with pytest.raises(ValueError, match="g: expected log forget gates <= 0"):
        kernels.chunk_gla(**args)
