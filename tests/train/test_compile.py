"""Compiled blocks, and blocks that recompute activations in the backward pass, equal plain ones."""

import dataclasses
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy

from glalm.config.run import TrainConfig
from glalm.config.stages import StageConfig
from glalm.config.strict import ConfigError
from glalm.kernels.common import assume_gpu
from glalm.model.config import ModelConfig
from glalm.model.decoder import Block, CausalLM
from glalm.model.layers import GatedRMSNorm
from glalm.model.mixers import MIXERS
from glalm.train import compile
from glalm.train.compile import apply_training_forward, check_compile_limit, list_forward_shapes
from glalm.train.state import plan_batches
from glalm.train.trainer import detach_cache, model_inputs, train

CPU = torch.device("cpu")
KEPT = ["none", "selective", "full"]


def tiny(layers: str, **train) -> CausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "num_hidden_layers": 3}
    config = ModelConfig(layers=layers, initializer_range=0.2, **shape)
    model = CausalLM(config).train()
    apply_training_forward(model, TrainConfig(**train), CPU)
    return model


def tokens(T: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(320, (2, T + 1), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}


def gradients(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.fixture
def compile_counter(monkeypatch):
    """Let torch.compile accept only full graphs and run them without a compiler. `.frame_count` counts the graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, fullgraph=True, backend=counter))
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("layers", [*MIXERS, "2*gla+attention"])
def test_each_mixer_compiles_to_one_graph(layers, compile_counter):
    """The number of layers does not matter, and a validation of another shape compiles nothing more."""
    kinds = len(set(layers.replace("2*", "").split("+")))
    kinds += layers == "transnormer"  # Its first layer alone has positions.
    model, batch = tiny(layers, compile=True), tokens(16)
    gradients(model, batch)
    with torch.no_grad():
        model.eval()(**tokens(9))
    found = gradients(model.train(), batch)
    assert compile_counter.frame_count == kinds
    torch.testing.assert_close(found, gradients(tiny(layers), batch), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["gla", "mamba2", "gated_deltanet"])
def test_any_number_of_documents_and_segments_shares_a_graph(layers, compile_counter):
    model = tiny(layers, compile=True)
    ids = torch.zeros(2, 16, dtype=torch.int64)
    for starts in ([0], [0, 3, 9], [0, 1, 2, 3, 4]):
        at = torch.zeros(2, 16, dtype=torch.bool)
        at[:, starts] = True
        model(**model_inputs({"input_ids": ids, "labels": ids, "starts": at})).loss.backward()
    assert compile_counter.frame_count == 1
    state = None
    for _ in range(4):
        out = model(**tokens(8), cache=state, return_cache=True)
        out.loss.backward()
        state = detach_cache(out.cache)
    assert compile_counter.frame_count == 3  # from an empty state, and from a given one


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["elementwise", "selective", "full"])
@pytest.mark.parametrize("backend", [None, "aot_eager"])  # the latter differentiates the graph, as Inductor does
def test_recomputation_does_not_change_gradients(kept, backend, monkeypatch):
    if backend is not None:
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", partial(torch.compile, fullgraph=True, backend=backend))
    found = gradients(tiny("gla+attention", activation_checkpointing=kept, compile=backend is not None), tokens(16))
    torch.testing.assert_close(found, gradients(tiny("gla+attention"), tokens(16)), rtol=1e-5, atol=1e-6)


def test_blocks_train_again_after_a_validation(run_config, monkeypatch):
    """In training, the blocks run as the config says. In evaluation mode they run their own forward."""
    calls = []

    def counted(block, x, **mixing):
        calls.append(block)
        return Block.forward(block, x, **mixing)

    monkeypatch.setitem(compile.CHECKPOINTED_FORWARDS, run_config.train.activation_checkpointing, counted)
    assert train(run_config) == 0
    assert len(calls) == 6 * 2 * 2  # steps, micro-batches, layers


def test_selective_recomputes_neither_matrix_products_nor_kernels():
    """With `selective`, the backward pass runs all other operators of the forward pass a second time."""
    counts = {}
    for how in KEPT:
        model, batch = tiny("gla", activation_checkpointing=how), tokens(16)
        with OperatorCounter() as counter:
            model(**batch).loss.backward()
        counts[how] = counter.calls
    forward = torch.ops.glalm.chunk_gla.default
    mm = torch.ops.aten.mm.default
    assert counts["none"][forward] == counts["selective"][forward] == 3 and counts["full"][forward] == 6
    assert counts["none"][mm] == counts["selective"][mm] < counts["full"][mm]
    silu = torch.ops.aten.silu.default
    assert counts["selective"][silu] == counts["full"][silu] == 2 * counts["none"][silu]


def test_selective_recomputes_short_convolutions_and_gated_norms_of_all_kernels():
    """On CPUs they are elementwise operations, so only the choice can be tested there."""
    names = ("short_conv", "gated_rms_norm", "selective_scan", "chunk_ssd")
    choices = [compile._selective_policy(None, getattr(torch.ops.glalm, name).default) for name in names]
    assert choices == [CheckpointPolicy.PREFER_RECOMPUTE] * 2 + [CheckpointPolicy.MUST_SAVE] * 2


@pytest.mark.parametrize(("how", "saves_result"), [("none", True), ("elementwise", False)])
def test_compiled_blocks_recompute_gated_norms(how, saves_result):
    """The result of a gated norm is an operand of a matrix product, and the only tensor [5, 21]."""
    compile.choose_forward(TrainConfig(activation_checkpointing=how), compiled=True)
    torch._dynamo.reset()
    saved = []
    with FakeTensorMode(allow_non_fake_inputs=True), assume_gpu():
        norm, o_proj = GatedRMSNorm(3, eps=1e-5), torch.nn.Linear(21, 4, bias=False)
        forward = torch.compile(lambda x, gate: o_proj(norm(x, gate).flatten(-2)), backend="aot_eager_decomp_partition")
        x, gate = (torch.randn(5, 7, 3, requires_grad=True) for _ in range(2))
        with torch.autograd.graph.saved_tensors_hooks(saved.append, saved.index):
            forward(x, gate)
    shapes = [tuple(tensor.shape) for tensor in saved]
    assert shapes.count((5, 7, 3)) == 2  # x and the gate
    assert ((5, 21) in shapes) is saves_result


@pytest.mark.parametrize(("how", "recomputed"), [("none", 0), ("selective", 0), ("full", 3)])
def test_compiled_blocks_recompute_kernels_as_eager_ones(how, recomputed, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, fullgraph=True, backend="aot_eager"))
    model = tiny("gla", activation_checkpointing=how, compile=True)
    loss = model(**tokens(16)).loss
    with OperatorCounter() as counter:
        loss.backward()
    assert counter.calls[torch.ops.glalm.chunk_gla_backward.default] == 3
    assert counter.calls.get(torch.ops.glalm.chunk_gla.default, 0) == recomputed


class OperatorCounter(torch.utils._python_dispatch.TorchDispatchMode):
    """Count the calls of each operator."""

    def __enter__(self):
        self.calls = {}
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls[op] = self.calls.get(op, 0) + 1
        return op(*args, **(kwargs or {}))


def test_shapes_of_forward_passes_are_listed_and_limited(run_config):
    """Windows of 16 tokens in micro-batches of 2, or of 32 in micro-batches of 1."""
    stages = {
        "one": StageConfig(tokens=640, batch_schedule=[(0.0, 64), (0.5, 128)]),
        "two": StageConfig(tokens=640, seq_len=32, document_boundaries="reset_state"),
        "three": StageConfig(tokens=640),
    }
    config = dataclasses.replace(run_config, train=dataclasses.replace(run_config.train, steps=None, stages=stages))
    shapes = list_forward_shapes(config, plan_batches(config, 1))
    assert shapes == {(2, 16, False, False): 1, (1, 32, True, False): 9}
    check_compile_limit(config, plan_batches(config, 1), is_gpu=True)
    # The segments of longer windows have the shape of the first stage. All but the first of a window have a state.
    stages["two"] = StageConfig(tokens=640, seq_len=32, micro_batch_size=2, tbptt_length=16)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, stages=stages))
    shapes = list_forward_shapes(config, plan_batches(config, 1))
    assert shapes == {(2, 16, False, False): 1, (2, 16, False, True): 9}
    assert [*map(str, shapes)] == ["2 x 16", "2 x 16 from a state"]
    lengths = [(i / 40, i + 1) for i in range(40)]
    train = dataclasses.replace(config.train, stages={"all": StageConfig(tokens=10**6, seq_len_schedule=lengths)})
    many = dataclasses.replace(run_config, train=train)
    with pytest.raises(ConfigError, match=r"shapes of forward passes, .* Use fewer batches and lengths"):
        check_compile_limit(many, plan_batches(many, 1), is_gpu=True)
    check_compile_limit(many, plan_batches(many, 1), is_gpu=False)
