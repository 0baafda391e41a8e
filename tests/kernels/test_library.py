"""What PyTorch may do with an operator: compile, checkpoint and differentiate it, under autocast and torch.func."""

from functools import partial

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from glalm import kernels
from glalm.kernels import chunk_gla, fused_recurrent_gla
from glalm.kernels.triton.delta_channel_gate import gate_sum_matrices
from glalm.kernels.triton.tiles import running_sum_matrices

# Operators with a registered backward pass, and their forward pass as torch.compile and checkpointing see it.
REGISTERED = {
    "chunk_gla": torch.ops.glalm.chunk_gla.default,
    "chunk_simple_gla": torch.ops.glalm.chunk_gla.default,
    "chunk_retention": torch.ops.glalm.chunk_gla.default,
    "chunk_linear_attn": torch.ops.glalm.chunk_gla.default,
    "chunk_delta_rule": torch.ops.glalm.delta_carry.default,
}
# Operators that PyTorch differentiates by itself.
DERIVED = [
    "chunk_value_gla",
    "fused_recurrent_gla",
    "fused_recurrent_simple_gla",
    "fused_recurrent_retention",
    "fused_recurrent_linear_attn",
    "selective_scan",
]
registered_operators = pytest.mark.parametrize("name", REGISTERED)
derived_operators = pytest.mark.parametrize("name", DERIVED)


@pytest.fixture
def draw_call(draw):
    """draw_call(name, T, ...): an operator that returns o alone, and its tensor arguments by name."""

    def draw_operator_and_arguments(name: str, T: int = 5, dtype=torch.float64, **options):
        args = draw(T=T, K=3, V=4, dtype=dtype, **options)
        args = {name: args[name] for name in ("q", "k", "v", "g")}
        if name == "selective_scan":
            args = {"x": args["q"][:, :, 0], "dt": -args["g"][:, :, 0], "A": -args["k"][0, :3, 0].exp().contiguous()}
            args |= {
                "B": draw(T=T, H=1, K=3, dtype=dtype)["q"][:, :, 0],
                "C": draw(T=T, H=1, K=3, dtype=dtype)["k"][:, :, 0],
            }
        elif name == "chunk_value_gla":
            args["g"] = F.logsigmoid(args["v"].flip(1))
        elif name == "chunk_delta_rule":
            args["k"] = F.normalize(args["k"], dim=-1)
            args["beta"] = args["g"][..., 1].exp()
            args["g"] = args["g"][..., 0].contiguous()
        elif "simple" in name:
            args["g"] = args["g"][..., 0].contiguous()
        elif "gla" not in name:
            del args["g"]
        return lambda **tensors: getattr(kernels, name)(**tensors)[0], args

    return draw_operator_and_arguments


def gradients(function, args: dict) -> list[torch.Tensor]:
    """Return the gradients of the sum of squares of function(**args)."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in args.items()}
    function(**leaves).square().sum().backward()
    return [x.grad for x in leaves.values()]


def loss(operator, args, **options):
    o, final_state = operator(**args, **options)
    return o.float().square().sum() + (0 if final_state is None else final_state.square().sum())


# Compilation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("output_final_state", [False, True])
@pytest.mark.parametrize("bounds", [None, [0, 3, 3, 20]], ids=["dense", "packed"])
def test_chunk_gla_compiles_to_one_graph(draw, bounds, output_final_state, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(chunk_gla, fullgraph=True, backend="aot_eager", dynamic=dynamic)

    for T in (20, 40):
        args = draw(1, T, bounds=None if bounds is None else [*bounds[:-1], T], dtype=torch.bfloat16)
        names = [n for n in args if n != "cu_seqlens"]
        grads = []
        for operator in (compiled, chunk_gla):
            leaves = {n: args[n].clone().requires_grad_() for n in names}
            loss(operator, {**args, **leaves}, output_final_state=output_final_state).backward()
            grads.append([x.grad for x in leaves.values()])
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


@pytest.mark.parametrize("operator", [chunk_gla, fused_recurrent_gla])
def test_query_heads_that_share_a_state_compile_to_one_graph(draw, operator):
    torch._dynamo.reset()
    args = draw(T=3, group=2)
    del args["cu_seqlens"]
    found = gradients(lambda **a: torch.compile(operator, fullgraph=True, backend="aot_eager")(**a)[0], args)
    expected = gradients(lambda **a: operator(**a)[0], args)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        *((name, False) for name in [*REGISTERED, *DERIVED]),
        *((name, True) for name in REGISTERED if name != "chunk_delta_rule"),
        ("fused_recurrent_gla", True),
        ("selective_scan", True),
        # Symbolic shapes of padded chunks take the compiler long.
        pytest.param("chunk_delta_rule", True, marks=pytest.mark.slow),
        pytest.param("chunk_value_gla", True, marks=pytest.mark.slow),
    ],
)
def test_every_operator_compiles_to_one_graph(draw_call, name, dynamic):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    operator, _ = draw_call(name)
    compiled = torch.compile(operator, fullgraph=True, backend=counter, dynamic=dynamic)
    lengths = (70, 80, 130) if dynamic and name in REGISTERED else (5,)
    for T in lengths:
        _, args = draw_call(name, T)
        torch.testing.assert_close(gradients(compiled, args), gradients(operator, args))
    assert counter.frame_count == 1  # one dynamic graph for every length
    with torch.no_grad():
        torch.testing.assert_close(compiled(**args), operator(**args))


def test_decoding_compiles_to_one_graph(draw):
    args = draw(T=1)
    args.pop("cu_seqlens")
    compiled = torch.compile(fused_recurrent_gla, fullgraph=True, backend="aot_eager")
    expected = fused_recurrent_gla(**args, output_final_state=True)
    torch.testing.assert_close(compiled(**args, output_final_state=True), expected)


@pytest.mark.parametrize("operator", [chunk_gla, fused_recurrent_gla])
def test_compiled_code_checks_values(draw, operator):
    args = draw(T=5)
    args["g"][0, 0, 0, 0] = 0.5
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"^g: "):
        compiled(**args)


@pytest.mark.parametrize("operator", [chunk_gla, fused_recurrent_gla])
def test_fake_tensors(draw, operator):
    args = draw(T=5, dtype=torch.bfloat16)
    expected = operator(**args, output_final_state=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {n: x if x is None else mode.from_tensor(x) for n, x in args.items()}
        found = operator(**fakes, output_final_state=True)
    for fake, real in zip(found, expected, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


# Activation checkpointing -----------------------------------------------------------------------------------


class CountCalls(TorchDispatchMode):
    """Count the calls of every operator."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function] = self.calls.get(function, 0) + 1
        return function(*args, **(kwargs or {}))


def save_our_operators(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.namespace == "glalm" else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_all(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTING = {
    "full": {},
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, save_our_operators)},
    "recompute all": {"context_fn": partial(create_selective_checkpoint_contexts, recompute_all)},
}


def checkpointed(operator, policy: str):
    """Return the operator between two elementwise functions, in a checkpoint."""

    def function(**args):
        names = list(args)

        def body(*tensors):
            scaled = {name: x * 0.5 for name, x in zip(names, tensors, strict=True)}
            return operator(**scaled).sin()

        return checkpoint(body, *args.values(), use_reentrant=False, **CHECKPOINTING[policy])

    return function


@registered_operators
@pytest.mark.parametrize(("policy", "calls"), [("full", 2), ("recompute all", 2), ("selective", 1)])
def test_checkpointing_recomputes_what_the_policy_says(draw_call, name, policy, calls):
    operator, args = draw_call(name, 9)
    with CountCalls() as counter:
        found = gradients(checkpointed(operator, policy), args)
    expected = gradients(lambda **a: operator(**{n: x * 0.5 for n, x in a.items()}).sin(), args)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert counter.calls[REGISTERED[name]] == calls


@registered_operators
@pytest.mark.parametrize(("policy", "calls"), [("recompute all", 2), ("selective", 1)])
def test_compiled_checkpointing_recomputes_what_the_policy_says(draw_call, name, policy, calls):
    torch._dynamo.reset()
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    operator, args = draw_call(name, 9)
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    compiled = torch.compile(checkpointed(operator, policy), fullgraph=True, backend=backend)
    found = gradients(compiled, args)
    torch.testing.assert_close(found, gradients(checkpointed(operator, policy), args))
    assert sum(node.target is REGISTERED[name] for graph in graphs for node in graph.graph.nodes) == calls


@derived_operators
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_checkpointing_of_pytorch_operators_changes_nothing(draw_call, name, policy, compiled):
    torch._dynamo.reset()
    operator, args = draw_call(name)
    function = checkpointed(operator, policy)
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = gradients(lambda **a: operator(**{n: x * 0.5 for n, x in a.items()}).sin(), args)
    torch.testing.assert_close(gradients(function, args), expected)


# Registration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [None, [0, 0, 5]], ids=["dense", "packed"])
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("per, normalizer", [("channel", None), ("head", 16.0), ("fixed", None), ("nothing", None)])
def test_opcheck(draw, bounds, final, per, normalizer):
    args = draw(1, 5, bounds=bounds, gate_dtype=torch.float64)
    cu_seqlens = args.pop("cu_seqlens")
    q, k, v, g = (args[n] for n in "qkvg")
    heads = g[..., 0]
    g = {"channel": g, "head": heads.clone(), "fixed": heads[0, 0], "nothing": None}[per]
    state = args["initial_state"] if final else None
    forward = (q, k, v, g, 0.3, normalizer, state, final, cu_seqlens, True)
    torch.library.opcheck(torch.ops.glalm.chunk_gla.default, forward)
    saved = [torch.empty(0)] * 5
    backward = (q, k, v, g, 0.3, normalizer, state, cu_seqlens, saved, torch.ones_like(v), state)
    torch.library.opcheck(torch.ops.glalm.chunk_gla_backward.default, backward)


@pytest.mark.parametrize("requires_grad", range(4))
def test_a_registered_operator_refuses_to_lose_a_gradient(draw, requires_grad):
    args = draw(T=5)
    inputs = [args[n] for n in "qkvg"]
    inputs[requires_grad].requires_grad_()
    state = args["initial_state"]
    calls = [
        (torch.ops.glalm.chunk_gla.default, (*inputs, 0.3, None, None, False, None, True)),
        (torch.ops.glalm.fused_recurrent.default, (*inputs, 0.3, None, False, None)),
        (torch.ops.glalm.fused_recurrent_update.default, (*inputs, 0.3, state)),
    ]
    for operator, call in calls:
        with pytest.raises(RuntimeError, match=f"{operator.name()} has no derivative"):
            operator(*call)
        compiled = torch.compile(lambda *a, operator=operator: operator(*a), backend="aot_eager", fullgraph=True)
        with pytest.raises(RuntimeError, match="has no derivative"):
            compiled(*call)
        with torch.no_grad():
            operator(*call)


# Precision and memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [chunk_gla, fused_recurrent_gla])
def test_autocast_does_not_change_the_precision(draw, differentiate, operator):
    args = draw()
    expected = differentiate(lambda **a: operator(**a, output_final_state=True), args)
    with torch.autocast("cpu", torch.bfloat16):
        found = differentiate(lambda **a: operator(**a, output_final_state=True), args)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_inputs_and_states_are_not_modified(draw):
    args = draw(T=70)
    before = {n: x.clone() for n, x in args.items() if x is not None}
    leaves = {n: x.requires_grad_() for n, x in args.items() if x is not None}
    loss(chunk_gla, leaves, output_final_state=True).backward()
    for n, x in before.items():
        torch.testing.assert_close(leaves[n].detach(), x, rtol=0, atol=0)


def test_the_gradient_of_the_final_state_alone(draw):
    args = draw(T=5)
    v = args["v"].requires_grad_()
    _, state = chunk_gla(**args, output_final_state=True)
    (dv,) = torch.autograd.grad(state.sum(), v)
    _, expected = fused_recurrent_gla(**args, output_final_state=True)
    torch.testing.assert_close(dv, torch.autograd.grad(expected.sum(), v)[0])


# Double backward and functional transforms ------------------------------------------------------------------


@registered_operators
@pytest.mark.parametrize("linear", [False, True], ids=["square loss", "linear loss"])
def test_double_backward_is_refused(draw_call, name, linear):
    """With a linear loss, the gradient of o is a constant, but that of v depends on q and k all the same."""
    operator, args = draw_call(name)
    leaves = {n: x.requires_grad_() for n, x in args.items()}
    o = operator(**leaves)
    (dv,) = torch.autograd.grad(o.sum() if linear else o.square().sum(), leaves["v"], create_graph=True)
    for x in leaves.values():  # autograd.grad runs only the part of the graph that leads to x.
        with pytest.raises(NotImplementedError, match=f"{name} does not support double backward"):
            torch.autograd.grad(dv.sum(), x, retain_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name} does not support double backward"):
        dv.sum().backward()


@derived_operators
def test_double_backward_of_pytorch_operators(draw_call, name):
    operator, args = draw_call(name, 3)
    names = list(args)
    leaves = [x.requires_grad_() for x in args.values()]
    if "g" in args:  # Finite differences must not raise a log gate above 0.
        args["g"].data -= 0.1
    assert torch.autograd.gradgradcheck(lambda *a: operator(**dict(zip(names, a, strict=True))), leaves)


def forward_mode(function, x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent


TRANSFORMS = {
    "torch.func.grad": lambda f, x, dx: torch.func.grad(lambda x: f(x).sum())(x),
    "torch.func.vjp": lambda f, x, dx: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "torch.func.jvp": lambda f, x, dx: torch.func.jvp(f, (x,), (dx,))[1],
    "torch.func.vmap": lambda f, x, dx: torch.func.vmap(f)(torch.stack([x, dx])),
    "torch.func.functionalize": lambda f, x, dx: torch.func.functionalize(f)(x),
    "forward-mode": forward_mode,
    "forward-mode automatic": lambda f, x, dx: torch.func.linearize(f, x)[1](dx),
}


def close_over_first(operator, args: dict):
    """Return the operator as a function of its first argument, and that argument."""
    first, *_ = args
    return lambda x: operator(**{**args, first: x}), args[first]


@registered_operators
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused_by_name(draw_call, name, transform):
    function, x = close_over_first(*draw_call(name))
    with pytest.raises(NotImplementedError, match=f"^{name} does not support .*{transform}"):
        TRANSFORMS[transform](function, x, torch.ones_like(x))


@registered_operators
def test_transforms_of_the_backward_pass_are_refused_by_name(draw_call, name):
    """Also where the forward pass ran outside of the transform."""
    operator, args = draw_call(name)
    o = operator(**{n: x.requires_grad_() for n, x in args.items()})
    do = torch.randn(2, *o.shape, dtype=o.dtype)

    def dv(do: torch.Tensor, **options) -> torch.Tensor:
        return torch.autograd.grad(o, args["v"], do, retain_graph=True, **options)[0]

    with pytest.raises(NotImplementedError, match=f"^{name} does not support .*is_grads_batched"):
        dv(do, is_grads_batched=True)
    for transform in ("torch.func.grad", "torch.func.jvp", "torch.func.vmap", "forward-mode"):
        with pytest.raises(NotImplementedError, match=f"^{name} does not support .*{transform}"):
            TRANSFORMS[transform](dv, do[0], do[1])


@registered_operators
def test_compiled_forward_mode_is_refused_by_name(draw_call, name):
    """Also where the compiled function has been called outside of forward mode before."""
    torch._dynamo.reset()
    function, x = close_over_first(*draw_call(name))
    compiled = torch.compile(function, backend="aot_eager")
    compiled(x)
    with pytest.raises(NotImplementedError, match=f"^{name} does not support forward-mode"):
        forward_mode(compiled, x, torch.ones_like(x))


@registered_operators
@pytest.mark.parametrize("transform", ["torch.func.grad", "torch.func.jvp", "torch.func.vmap"])
def test_compiled_transforms_are_refused_by_name(draw_call, name, transform):
    torch._dynamo.reset()
    function, x = close_over_first(*draw_call(name))
    compiled = torch.compile(lambda x, dx: TRANSFORMS[transform](function, x, dx), backend="aot_eager")
    with pytest.raises(NotImplementedError, match=f"^{name} does not support .*{transform}"):
        compiled(x, torch.ones_like(x))


@derived_operators
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_pytorch_operators(draw_call, name, transform):
    function, x = close_over_first(*draw_call(name))
    dx = x.flip(1).sin()
    found = TRANSFORMS[transform](function, x, dx)
    if transform == "torch.func.vmap":
        expected = torch.stack([function(x), function(dx)])
    elif transform == "torch.func.functionalize":
        expected = function(x)
    elif transform == "torch.func.jvp" or "forward-mode" in transform:
        expected = (function(x + 1e-6 * dx) - function(x - 1e-6 * dx)) / 2e-6
    else:
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(leaf).sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("build", [running_sum_matrices, gate_sum_matrices])
def test_a_constant_of_all_calls_is_not_built_in_the_context_of_the_first(build):
    """Like the modes here, a CUDA graph's memory pool is of the calling thread."""
    build.cache_clear()
    with FakeTensorMode(), torch.inference_mode():
        constant = build(torch.device("cpu"))
    assert type(constant) is torch.Tensor
    assert not constant.is_inference()
    assert build(torch.device("cpu")) is constant
