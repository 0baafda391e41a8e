"""The Triton recurrence at small shapes in Triton's interpreter, which needs a process of its own."""

import pytest
import torch
from interpreter import INTERPRETED, interpreted, record_launched, run_interpreted

IEEE = 1e-6


@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's")
def test_in_the_interpreter():
    run_interpreted(__file__)


def check(limit, *shape, **options):
    from recurrent_cases import relative_errors

    errors = relative_errors(*shape, **options)
    assert max(errors.values()) < limit, errors  # A NaN fails, too.


@interpreted
@pytest.mark.parametrize("gate", ["channel", "head", "fixed", "none"])
@pytest.mark.parametrize("T", [1, 7])
def test_every_gate(gate, T):
    check(IEEE, 2, T, 3, 16, 16, dtype=torch.float32, gate=gate)
    check(IEEE, 1, T, 2, 16, 16, dtype=torch.float32, gate=gate, states=False)


@interpreted
@pytest.mark.parametrize("gate", ["channel", "head", "fixed", "none"])
def test_query_heads_that_share_a_state(gate):
    check(IEEE, 2, 3, 2, 16, 20, dtype=torch.float32, gate=gate, group=3)


@interpreted
@pytest.mark.parametrize("K, V", [(20, 24), (1, 1), (80, 65), (256, 40)])
def test_head_sizes_that_are_not_powers_of_two(K, V):
    check(IEEE, 1, 3, 2, K, V, dtype=torch.float32)


@interpreted
@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_delta_rule(gate):
    check(IEEE, 2, 3, 2, 20, 24, dtype=torch.float32, gate=gate, delta=True)


@interpreted
def test_a_state_updated_in_place():
    check(IEEE, 3, 1, 2, 20, 70, dtype=torch.float32, in_place=True)
    check(IEEE, 1, 9, 1, 16, 16, dtype=torch.float32, in_place=True, bounds=[0, 3, 3, 9])


@interpreted
def test_memory_layout_of_states_does_not_matter(monkeypatch):
    from glalm.kernels import common, recurrent

    monkeypatch.setattr(common, "has_kernel", lambda q: True)
    q, k, v, g = (torch.randn(2, 3, 2, 16) for _ in range(4))
    S = torch.randn(2, 2, 16, 16)
    strided = S.mT.contiguous().mT
    o, final = recurrent.recurrent_forward(q, k, v, -g.abs(), 0.3, S, True, None)
    found = recurrent.recurrent_forward(q, k, v, -g.abs(), 0.3, strided, True, None)
    assert torch.equal(found[0], o) and torch.equal(found[1], final)
    assert torch.equal(recurrent.recurrent_update(q, k, v, -g.abs(), 0.3, strided), o) and torch.equal(strided, final)


@interpreted
@pytest.mark.parametrize("gate", ["channel", "head"])
def test_packed_sequences(gate):
    check(IEEE, 1, 12, 2, 16, 16, dtype=torch.float32, gate=gate, bounds=[0, 0, 1, 6, 6, 12, 12])


@interpreted
def test_gates_that_forget_everything():
    check(IEEE, 1, 12, 2, 16, 16, dtype=torch.float32, wild=True)


@interpreted
def test_other_dtypes():
    check(2e-2, 1, 5, 2, 16, 16, dtype=torch.bfloat16)  # The interpreter truncates to bfloat16; the GPU rounds.
    check(2e-2, 1, 5, 2, 16, 16, dtype=torch.bfloat16, gate_dtype=torch.float32)
    check(1e-3, 1, 5, 2, 16, 16, dtype=torch.float16)


@interpreted
def test_no_tokens_do_not_change_the_state():
    check(IEEE, 2, 0, 2, 16, 16, dtype=torch.float32)
    check(IEEE, 2, 0, 2, 16, 16, dtype=torch.float32, in_place=True)


@interpreted
def test_an_integer_scale_is_not_compiled_as_a_constant(monkeypatch):
    """Triton would compile a kernel for scale = 1, and the launcher run it for every other integer."""
    from glalm.kernels.triton import recurrent

    scales = record_launched(monkeypatch, recurrent, "scale")
    q = torch.randn(1, 5, 2, 16)
    recurrent.forward(q, q, q, None, 1, None, None, None)
    assert [type(x) for x in scales] == [float]
