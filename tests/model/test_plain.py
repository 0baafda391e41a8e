"""Whatever is done to a module, the fast paths compute what calling it does, or leave it to the call."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from glalm import IGNORE_INDEX
from glalm.evals.eval_model import EvalModel
from glalm.generation import fused_decode
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.model.plain import is_called_plainly, is_plain_linear
from glalm.train.float8 import is_large_linear


class Tripled(nn.Module):
    def forward(self, x):
        return 3 * x


class Adapted(nn.Module):
    """A base layer with an adapter, and a weight that is only the base layer's, as peft's."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.delta = nn.Linear(base.in_features, base.out_features)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.delta(x)


class Halved(torch.Tensor):
    """A weight that is in memory at twice its value, as a quantized one is at another."""

    @staticmethod
    def __new__(cls, doubled):
        return torch.Tensor._make_wrapper_subclass(cls, doubled.shape, dtype=doubled.dtype)

    def __init__(self, doubled):
        self.doubled = doubled

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Halved(args[0].doubled)
        args = torch.utils._pytree.tree_map(lambda x: x.doubled / 2 if isinstance(x, Halved) else x, args)
        return func(*args, **(kwargs or {}))


def triple_output(module, args, output):
    return 3 * output


def triple_input(module, args):
    return (3 * args[0],)


def triple_gradient(module, grad_input, grad_output):
    return tuple(3 * grad for grad in grad_input)


def triple_output_gradient(module, grad_output):
    return tuple(3 * grad for grad in grad_output)


def replace_forward(head, patch):
    forward = head.forward
    patch.setattr(head, "forward", lambda x: 3 * forward(x), raising=False)


def replace_class_forward(head, patch):
    forward = nn.Linear.forward
    patch.setattr(nn.Linear, "forward", lambda self, x: (3 if self is head else 1) * forward(self, x))


def replace_call(head, patch):
    call = nn.Module.__call__
    patch.setattr(
        nn.Module, "__call__", lambda self, *x, **y: 3 * call(self, *x) if self is head else call(self, *x, **y)
    )


def replace_class_call(head, patch):
    call = nn.Linear.__call__
    patch.setattr(
        nn.Linear,
        "__call__",
        lambda self, *x, **y: 3 * call(self, *x) if self is head else call(self, *x, **y),
        raising=False,
    )


def replace_own_call(head, patch):
    call = head._call_impl
    patch.setattr(head, "_call_impl", lambda *args: 3 * call(*args), raising=False)


def replace_function(head, patch):
    linear = F.linear
    patch.setattr(F, "linear", lambda x, w, b=None: (3 if w is head.weight else 1) * linear(x, w, b))


def hook_all_modules(head, patch):
    hooks = dict(torch_module._global_forward_hooks)
    hooks[-1] = lambda module, args, output: 3 * output if module is head else None
    patch.setattr(torch_module, "_global_forward_hooks", hooks)


def set_weight(head, weight):
    head.weight = nn.Parameter(weight, requires_grad=False)


# What is done in place, and changes what calling the head computes, or the gradients that go through it.
CHANGES = {
    "forward hook": lambda head, patch: head.register_forward_hook(triple_output),
    "forward pre-hook": lambda head, patch: head.register_forward_pre_hook(triple_input),
    "backward hook": lambda head, patch: head.register_full_backward_hook(triple_gradient),
    "backward pre-hook": lambda head, patch: head.register_full_backward_pre_hook(triple_output_gradient),
    "hook on all modules": hook_all_modules,
    "forward of the module": replace_forward,
    "forward of the class": replace_class_forward,
    "call of all modules": replace_call,
    "call of the class": replace_class_call,
    "call of the module": replace_own_call,
    "F.linear": replace_function,
    "sparse weight": lambda head, patch: set_weight(head, head.weight.detach().to_sparse_csr()),
    "prune": lambda head, patch: prune.l1_unstructured(head, "weight", amount=0.3),
    "weight_norm": lambda head, patch: weight_norm(head),
    "spectral_norm": lambda head, patch: spectral_norm(head),
    "parametrizations.weight_norm": lambda head, patch: parametrizations.weight_norm(head),
    "parametrization": lambda head, patch: parametrize.register_parametrization(head, "weight", Tripled()),
    "weight of a tensor subclass": lambda head, patch: set_weight(head, Halved(2 * head.weight.detach())),
    "bias": lambda head, patch: setattr(head, "bias", nn.Parameter(torch.linspace(-3, 3, head.out_features))),
}
# What replaces the module.
REPLACEMENTS = {
    "subclass": lambda head: type("Other", (nn.Linear,), {"forward": lambda self, x: 3 * F.linear(x, self.weight)}),
    "adapter": Adapted,
    "sequence": lambda head: nn.Sequential(head, Tripled()),
}
every_change = pytest.mark.parametrize("change", [*CHANGES, *REPLACEMENTS])


def build_model() -> GLALMForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "intermediate_size": 48}
    return GLALMForCausalLM(GLALMConfig(**shape, initializer_range=0.3)).eval()


def apply_change(name: str, owner: nn.Module, attribute: str, patch) -> None:
    """Do to a linear layer what CHANGES or REPLACEMENTS has under `name`."""
    layer = getattr(owner, attribute)
    torch.manual_seed(1)
    if name in CHANGES:
        CHANGES[name](layer, patch)
    elif name == "subclass":
        layer.__class__ = REPLACEMENTS[name](layer)
    else:
        setattr(owner, attribute, REPLACEMENTS[name](layer))


def draw_batch(seed: int, B: int = 2, T: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and targets [B, T], some of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (B, T), generator=generator)
    targets = torch.randint(50, (B, T), generator=generator)
    return ids, targets.masked_fill(torch.rand(B, T, generator=generator) < 0.2, IGNORE_INDEX)


def loss_of_logits(logits, targets, z_loss):
    logits = logits.flatten(0, 1)
    scored = targets.flatten() != IGNORE_INDEX
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    squares = logits.logsumexp(-1)[scored].square().sum()
    return (loss + z_loss * squares) / scored.sum().clamp(min=1)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_losses(model: GLALMForCausalLM, seed: int = 1, z_loss: float = 0.0) -> None:
    """Compare loss, gradients and scores with those of the logits that the model gives."""
    ids, targets = draw_batch(seed)
    expected = loss_of_logits(model(ids).logits, targets, z_loss)
    expected_gradients = gradients(model, expected)
    for _ in range(2):  # A weight that is computed once would be stale the second time.
        loss = model(ids, shift_labels=targets, z_loss=z_loss).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients(model, loss), expected_gradients, rtol=1e-3, atol=1e-5)
    logits = model(ids).logits.detach()
    each = F.cross_entropy(logits.mT, targets, ignore_index=IGNORE_INDEX, reduction="none")
    eval_model = EvalModel(model)
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[:, 0] = True  # Each row is a document, so its losses are those of a row that is read alone.
    for losses in (
        model.score(ids, targets)[0],
        eval_model.score_tokens(ids, targets)[0],
        eval_model.score_tokens(ids, targets, starts=starts)[0],
    ):
        torch.testing.assert_close(losses, each, rtol=1e-4, atol=1e-4)


def test_a_new_linear_layer_is_plain():
    head = build_model().lm_head
    assert is_plain_linear(head)
    head.requires_grad_(False)
    head.train(False)
    assert is_plain_linear(head.double())
    with_bias = nn.Linear(512, 512)
    assert is_plain_linear(with_bias, bias=True) and not is_plain_linear(with_bias)


def test_a_call_that_a_class_defines_is_plain_until_it_is_replaced(monkeypatch):
    """Layers with gradient checkpointing of transformers 5.17 define one."""

    class Layer(nn.Module):
        def __call__(self, *args):
            return super().__call__(*args)

    class Block(Layer):
        pass

    assert is_called_plainly(Block())
    with monkeypatch.context() as patch:
        replace_call(None, patch)
        assert not is_called_plainly(Block())
    monkeypatch.setattr(Layer, "__call__", nn.Module._slow_forward)
    assert not is_called_plainly(Block())


@every_change
def test_a_changed_layer_is_not_plain(change, monkeypatch):
    model = build_model()
    apply_change(change, model, "lm_head", monkeypatch)
    assert not is_plain_linear(model.lm_head)
    assert is_plain_linear(model.lm_head, bias=True) == (change == "bias")


@every_change
def test_the_loss_of_a_changed_head_is_that_of_its_logits(change, monkeypatch):
    model = build_model()
    apply_change(change, model, "lm_head", monkeypatch)
    check_losses(model, z_loss=0.1)


@settings(max_examples=10)
@given(
    changes=st.lists(st.sampled_from([*CHANGES, *REPLACEMENTS]), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 99),
    z_loss=st.sampled_from([0.0, 0.5]),
)
def test_any_changes_together(changes, seed, z_loss):
    """Those that torch itself cannot do one after the other are passed over."""
    with pytest.MonkeyPatch.context() as patch:
        model = build_model()
        done = []
        for change in changes:
            try:
                apply_change(change, model, "lm_head", patch)
                model(torch.zeros(1, 2, dtype=torch.int64)).logits.sum().backward()
            except Exception:
                break
            done.append(change)
        if len(done) == len(changes):
            check_losses(model, seed, z_loss)


LAYERS = {
    "q_proj": lambda model: model.model.layers[0].attn,
    "o_proj": lambda model: model.model.layers[0].attn,
    "down_proj": lambda model: model.model.layers[0].mlp,
    "lm_head": lambda model: model,
}


@pytest.mark.parametrize("layer", LAYERS)
@every_change
def test_a_changed_layer_is_left_to_the_model_in_decoding(change, layer, monkeypatch):
    model = build_model()
    assert fused_decode.is_supported(model)
    apply_change(change, LAYERS[layer](model), layer, monkeypatch)
    assert not fused_decode.is_supported(model)


def change_norm(model):
    model.model.layers[0].attn_norm.eps = 0.1


def set_method(model):
    model.model.layers[0].attn.gate_arguments = lambda x: {"g": torch.zeros(1)}


def set_feature_map(model):
    model.model.layers[0].attn.feature_map = "relu"


def transpose_weight(model):
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = nn.Parameter(weight.t().contiguous().t())


def widen_gate(model):
    model.model.layers[0].attn.gk_proj = nn.Sequential(nn.Linear(32, 8, bias=False), nn.Linear(8, 16))


def append_module(model):
    model.model.layers[0].attn.gk_proj.append(Tripled())


def drop_bias(model):
    model.model.layers[0].attn.gk_proj[1].bias = None


def replace_norm(model):
    model.model.norm = nn.LayerNorm(32)


def hook_block(model):
    model.model.layers[0].register_forward_hook(lambda module, args, output: (3 * output[0], *output[1:]))


@pytest.mark.parametrize(
    "change",
    [
        change_norm,
        set_method,
        set_feature_map,
        transpose_weight,
        widen_gate,
        append_module,
        drop_bias,
        replace_norm,
        hook_block,
    ],
)
def test_any_other_module_is_left_to_the_model_in_decoding(change):
    model = build_model()
    change(model)
    assert not fused_decode.is_supported(model)


@pytest.mark.parametrize("change", ["weight_norm", "prune", "weight of a tensor subclass"])
def test_float8_leaves_out_a_changed_layer(change, monkeypatch):
    owner = nn.Module()
    owner.layer = nn.Linear(512, 512)
    assert is_large_linear(owner.layer)
    apply_change(change, owner, "layer", monkeypatch)
    assert not is_large_linear(owner.layer)
