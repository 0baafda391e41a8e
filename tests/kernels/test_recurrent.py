"""What fused_recurrent_* do beyond chunk_gla (see test_operators): states in place, and gates of every shape."""

import threading
from contextlib import nullcontext

import pytest
import torch

from glalm import kernels
from glalm.kernels.recurrent import states_in_place


def gate_arguments(args: dict) -> dict:
    """Return the gate argument of every operator, by the operator's name."""
    return {
        "gla": {"g": args["g"]},
        "simple_gla": {"g": args["g"][..., 0]},
        "retention": {},
        "linear_attn": {},
    }


@pytest.mark.parametrize("name", ["gla", "simple_gla", "retention", "linear_attn"])
@pytest.mark.parametrize("T", [0, 1, 5])
def test_states_in_place(draw, name, T):
    args = draw(T=T)
    operator, S, gate = getattr(kernels, f"fused_recurrent_{name}"), args["initial_state"], gate_arguments(args)[name]
    inputs = {n: args[n] for n in "qkv"} | gate
    o, expected = operator(**inputs, initial_state=S.clone(), output_final_state=True)
    before = S.clone()
    operator(**inputs, initial_state=S, output_final_state=True)
    assert torch.equal(S, before)
    with states_in_place():
        found, final = operator(**inputs, initial_state=S, output_final_state=True)
    assert final is S and torch.equal(S, expected) and torch.equal(found, o)


def test_packed_and_differentiated_states_are_not_updated_in_place(draw):
    args = draw(1, 5, bounds=[0, 2, 5])
    S = args["initial_state"]
    before = S.clone()
    with states_in_place():
        kernels.fused_recurrent_gla(**args, output_final_state=True)
        args.pop("cu_seqlens")
        one = {**args, "initial_state": S[:1].requires_grad_()}
        kernels.fused_recurrent_gla(**one, output_final_state=True)[1].sum().backward()
    assert torch.equal(S, before)


def test_states_in_place_ends_after_an_error(draw):
    args = draw(T=1)
    with pytest.raises(RuntimeError), states_in_place():
        raise RuntimeError
    before = args["initial_state"].clone()
    kernels.fused_recurrent_gla(**args, output_final_state=True)
    assert torch.equal(args["initial_state"], before)


def test_states_in_place_holds_for_one_thread(draw):
    args = draw(T=1)
    before, inside, done = args["initial_state"].clone(), threading.Event(), threading.Event()

    def decode():
        with states_in_place():
            inside.set()
            done.wait(10)

    other = threading.Thread(target=decode)
    other.start()
    assert inside.wait(10)
    kernels.fused_recurrent_gla(**args, output_final_state=True)
    done.set()
    other.join()
    assert torch.equal(args["initial_state"], before)


@pytest.mark.parametrize("traced_in_place", [False, True])
def test_compiled_code_does_not_update_states_in_place(draw, traced_in_place):
    torch._dynamo.reset()

    def step(q, k, v, g, S):
        o, S = kernels.fused_recurrent_gla(q, k, v, g.exp().neg(), initial_state=S, output_final_state=True)
        return o * 2, S

    args = draw(T=1)
    inputs = [args[n] for n in "qkvg"]
    S, before = args["initial_state"], args["initial_state"].clone()
    expected, compiled = step(*inputs, S), torch.compile(step, fullgraph=True, backend="aot_eager")
    with states_in_place() if traced_in_place else nullcontext():
        torch.testing.assert_close(compiled(*inputs, S), expected)
    torch.testing.assert_close(compiled(*inputs, S), expected)
    assert torch.equal(S, before)


def test_opcheck(draw):
    args = draw(1, 2)
    inputs = [args[n] for n in "qkvg"]
    torch.library.opcheck(
        torch.ops.glalm.fused_recurrent.default, (*inputs, 0.3, args["initial_state"][:1], True, None)
    )
    torch.library.opcheck(torch.ops.glalm.fused_recurrent.default, (*inputs[:3], None, 0.3, None, False, None))
    torch.library.opcheck(torch.ops.glalm.fused_recurrent_update.default, (*inputs, 0.3, args["initial_state"][:1]))


@pytest.mark.parametrize("name", ["gla", "simple_gla"])
def test_a_gate_of_the_wrong_shape_is_named(draw, name):
    args = draw()
    with pytest.raises(ValueError, match=r"^g: expected"):
        getattr(kernels, f"fused_recurrent_{name}")(args["q"], args["k"], args["v"], args["g"][..., :1])
