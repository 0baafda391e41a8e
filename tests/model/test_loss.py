"""The chunked cross-entropy against the one of all logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies

from glalm.kernels import cross_entropy
from glalm.model import loss as loss_module
from glalm.model.loss import linear_cross_entropy, token_losses


@pytest.fixture
def problem():
    """Return hidden states, the weight of a head, and targets of which five are ignored, in float64."""
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(40, (3, 7))
    targets[0, :4] = targets[2, 6] = -100
    return hidden, weight, targets


def dense_cross_entropy(hidden, weight, targets, **kwargs):
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), **kwargs)


def dense_z_loss(hidden, weight, targets):
    return (hidden @ weight.T).logsumexp(-1)[targets != -100].square().mean()


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunk_elements", [40, 200, 2**20])
def test_value_and_gradients(problem, chunk_elements, z_loss, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk_elements)
    hidden, weight, _ = problem
    expected = dense_cross_entropy(*problem) + z_loss * dense_z_loss(*problem)
    grads = torch.autograd.grad(3 * expected, (hidden, weight))
    got = linear_cross_entropy(*problem, z_loss=z_loss)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=0)
    for a, b in zip(torch.autograd.grad(3 * got, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    each = token_losses(*problem)
    torch.testing.assert_close(each.flatten(), dense_cross_entropy(*problem, reduction="none").float())


def test_gradients_are_computed_only_where_needed(problem):
    hidden, weight, targets = problem
    linear_cross_entropy(hidden, weight.detach(), targets).backward()
    assert hidden.grad is not None and weight.grad is None


def test_the_loss_of_no_targets_is_zero(problem):
    hidden, weight, targets = problem
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0 and hidden.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-7), (torch.float32, 1e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
    ids=str,
)
@pytest.mark.parametrize("tokens", range(4))
def test_few_tokens_in_every_dtype(tokens, dtype, tolerance):
    """The gradients are those in float64, but for the rounding of the logits and their gradient to `dtype`."""
    torch.manual_seed(0)
    inputs = [torch.randn(n, 16, dtype=torch.float64).to(dtype).requires_grad_() for n in (tokens, 40)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    targets = torch.randint(40, (tokens,))
    loss = linear_cross_entropy(*inputs, targets)
    each = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="none")
    expected = each.sum() / max(tokens, 1)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(token_losses(*inputs, targets).double(), each, rtol=tolerance, atol=0)
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, exact), strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_autocast_keeps_float32_sums():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(100, 32, requires_grad=True)
    targets = torch.randint(100, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets), rtol=1e-2, atol=0)
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32


@settings(max_examples=10, deadline=None)
@given(
    seed=strategies.integers(0, 2**31),
    log_probability=strategies.floats(-18, -2),
    loss_scale=strategies.sampled_from([1.0, 2.0**10, 2.0**16]),
    z_loss=strategies.sampled_from([0.0, 1e-3]),
    chunk_elements=strategies.sampled_from([400, 2**20]),
)
def test_float16_keeps_the_gradients_of_rare_tokens(seed, log_probability, loss_scale, z_loss, chunk_elements):
    """Half of the vocabulary has a probability near exp(log_probability), down to 1.5e-8, at every position."""
    torch.manual_seed(seed)
    hidden = 0.1 * torch.randn(1, 16, 32)
    weight = 0.1 * torch.randn(200, 32)
    hidden[..., 0] = 1.0
    weight[:, 0] = 0.0
    weight[100:, 0] = log_probability
    hidden, weight = hidden.half().float().requires_grad_(), weight.half().float().requires_grad_()
    targets = torch.randint(100, (1, 16))
    expected = dense_cross_entropy(hidden, weight, targets) + z_loss * dense_z_loss(hidden, weight, targets)
    expected = torch.autograd.grad(expected, (hidden, weight))
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.float16):
        patch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk_elements)
        loss = linear_cross_entropy(hidden, weight, targets, z_loss)
    dhidden, dweight = (grad / loss_scale for grad in torch.autograd.grad(loss * loss_scale, (hidden, weight)))
    torch.testing.assert_close(dhidden, expected[0], rtol=0.02, atol=0.02 * expected[0].abs().max().item())
    error = (dweight - expected[1]).norm(dim=1) / expected[1].norm(dim=1)
    assert error[100:].max() < 0.05 and error.median() < 0.02


def test_float16_does_not_overflow():
    """Neither where thousands of tokens push one row of the head, nor where the head's weights are large."""
    hidden = torch.full((3000, 4), 30.0, requires_grad=True)
    weight = torch.zeros(5, 4)
    weight[:, 0] = torch.arange(5) * 100
    weight.requires_grad_()
    targets = torch.zeros(3000, dtype=torch.long)
    expected = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), (hidden, weight))
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(hidden, weight, targets)
    for found, wanted in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)


def test_autocast_leaves_float64_alone(problem):
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(*problem)
    assert torch.equal(loss, linear_cross_entropy(*problem))


@pytest.mark.parametrize("power", [1, 2])
def test_double_backward_is_refused(problem, power):
    """Also of the loss itself, whose own gradient is a constant."""
    (dhidden,) = torch.autograd.grad(linear_cross_entropy(*problem) ** power, problem[0], create_graph=True)
    for x in problem[:2]:  # autograd.grad runs only the part of the graph that leads to x.
        with pytest.raises(NotImplementedError, match="linear_cross_entropy does not support double backward"):
            torch.autograd.grad(dhidden.sum(), x, retain_graph=True)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy does not support double backward"):
        dhidden.sum().backward()


def test_gradients_of_the_loss_may_be_batched(problem):
    hidden = problem[0]
    loss = linear_cross_entropy(*problem)
    weights = torch.tensor([1.0, -2.0])
    (found,) = torch.autograd.grad(loss, hidden, weights, is_grads_batched=True, retain_graph=True)
    (expected,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(found, torch.stack([expected, -2 * expected]))


def test_transforms_of_token_losses_are_refused(problem):
    """Their kernel on a GPU would lose the tangent."""
    hidden, weight, targets = (x.detach() for x in problem)
    for transform in (torch.func.vmap, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))):
        with pytest.raises(NotImplementedError, match=r"token_losses does not support torch.func"):
            transform(lambda x: token_losses(x, weight, targets[0]))(hidden)


def test_all_logits_are_never_in_memory(problem, monkeypatch):
    """No tensor is as large as the logits of all tokens."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 400)
    # Else RecordSizes would see the registered operator, and not what it computes with.
    monkeypatch.setattr(loss_module, "token_losses_operator", cross_entropy.compute_token_losses)
    sizes = []

    class RecordSizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    with RecordSizes():
        linear_cross_entropy(*problem).backward()
    assert max(sizes) == 40 * 16  # The weight: larger than a chunk's 10 x 40 logits, smaller than all 21 x 40.


@pytest.mark.gpu
def test_the_weights_gradient_is_summed_in_float32_on_a_gpu():
    torch.manual_seed(0)
    hidden = torch.randn(9001, 256, device="cuda", requires_grad=True)  # The last chunk is shorter than the others.
    weight = (torch.randn(32000, 256, device="cuda") / 8).requires_grad_()
    targets = torch.randint(32000, (9001,), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, z_loss=1e-3)
    found = torch.autograd.grad(loss, (hidden, weight))
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight)]
    logits = rounded[0] @ rounded[1].T
    expected = F.cross_entropy(logits, targets) + 1e-3 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    for a, b in zip(found, torch.autograd.grad(expected, rounded), strict=True):
        assert (a - b).norm() < 5e-3 * b.norm() and a.dtype == torch.float32
