"""The gated RMSNorm's kernels compiled, on random data of a new seed every run."""

import secrets

import pytest
import torch

from glalm.kernels import gated_rms_norm

pytestmark = pytest.mark.gpu
SEED = secrets.randbits(31)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 3e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("shape", [(1, 3), (3, 700, 4, 256), (2, 1000, 2, 512), (999, 64), (500, 1000), (9, 8192)])
def test_equals_its_formula(shape, dtype, limit):
    from gated_norm_cases import relative_errors

    errors = relative_errors(*shape, dtype=dtype, device="cuda", seed=SEED)
    assert max(errors.values()) < limit, (SEED, errors)


@pytest.mark.parametrize(("gate_dtype", "limit"), [(torch.float32, 3e-6), (torch.bfloat16, 4e-3)])
def test_sigmoid(gate_dtype, limit):
    from gated_norm_cases import relative_errors

    options = {"activation": "sigmoid", "gate_dtype": gate_dtype, "device": "cuda", "seed": SEED}
    errors = relative_errors(2, 500, 8, 128, **options)
    assert max(errors.values()) < limit, (SEED, errors)


def test_compiles_to_one_graph():
    from gated_norm_cases import EPS, differentiate, random_arguments

    args = random_arguments(300, 256, dtype=torch.bfloat16, device="cuda", seed=SEED)
    dy = torch.ones_like(args["x"])

    def norm(x, gate, weight):
        return gated_rms_norm(x, gate, weight, EPS)

    compiled = differentiate(args, dy, torch.compile(norm, fullgraph=True))
    eager = differentiate(args, dy, norm)
    assert all(torch.equal(compiled[name], eager[name]) for name in eager)
