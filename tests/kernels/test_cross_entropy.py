"""The fused cross-entropy against float64, compiled on a GPU or interpreted on a CPU, in a process of its own."""

import pytest
import torch
import torch.nn.functional as F
from interpreter import INTERPRETED, run_interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="this process is the interpreter's or has a GPU")
def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="run by test_in_the_interpreter")
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("vocabulary", [5, 4096, 10000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients(vocabulary, dtype, z_loss):
    from glalm.kernels.triton.cross_entropy import cross_entropy_

    torch.manual_seed(0)
    logits = (5 * torch.randn(6, vocabulary)).to(dtype)
    logits[4] -= 1000  # far from 0
    targets = torch.tensor([0, vocabulary - 1, -100, 3, 2, 1])
    x = logits.double().requires_grad_()
    expected = F.cross_entropy(x, targets, reduction="none")
    expected = expected + z_loss * x.logsumexp(-1).square() * (targets != -100)
    expected.sum().backward()

    logits, targets = logits.to(DEVICE), targets.to(DEVICE)
    original = logits.clone()
    for gradient in (False, True):
        losses = cross_entropy_(logits, targets, z_loss, gradient)
        torch.testing.assert_close(losses.cpu(), expected.float(), rtol=1e-5, atol=1e-4)
        assert gradient or torch.equal(logits, original)
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-4  # The interpreter truncates to bfloat16; the GPU rounds.
    torch.testing.assert_close(logits.cpu().double(), x.grad, rtol=rounding, atol=1e-4)
    assert logits[2].abs().max() == 0


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="run by test_in_the_interpreter")
def test_a_scaled_gradient_keeps_small_probabilities_in_float16():
    from glalm.kernels import cross_entropy as portable
    from glalm.kernels.triton import cross_entropy as fused

    logits = torch.tensor([[0.0, 0, -18]], dtype=torch.float16)  # The last token's probability is 7.6e-9.
    x = logits.double().requires_grad_()
    F.cross_entropy(x, torch.tensor([1])).backward()
    for module, device in ((portable, "cpu"), (fused, DEVICE)):
        gradient = logits.clone().to(device)
        module.cross_entropy_(gradient, torch.tensor([1], device=device), 0.0, True, 4096.0)
        torch.testing.assert_close(gradient.cpu().double() / 4096, x.grad, rtol=2e-3, atol=0)


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="run by test_in_the_interpreter")
def test_a_logit_that_is_not_finite_makes_the_loss_not_finite():
    from glalm.kernels.triton.cross_entropy import cross_entropy_

    logits = torch.zeros(2, 50, device=DEVICE)
    logits[0, 7], logits[1, 7] = torch.nan, torch.inf
    assert not cross_entropy_(logits, torch.ones(2, device=DEVICE, dtype=torch.long), 0.0, True).isfinite().any()


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="run by test_in_the_interpreter")
def test_a_target_outside_the_vocabulary_gives_nan():
    from glalm.kernels.triton.cross_entropy import cross_entropy_

    logits = torch.zeros(4, 50, device=DEVICE)
    losses = cross_entropy_(logits, torch.tensor([-1, 50, 3, -100], device=DEVICE), 0.0, True)
    assert losses.isnan().tolist() == [True, True, False, False]
    assert logits.isnan().all(1).tolist() == logits.isnan().any(1).tolist() == losses.isnan().tolist()


@pytest.mark.parametrize("target", [-1, 50])
def test_a_target_outside_the_vocabulary_is_an_error_on_the_cpu(target):
    from glalm.kernels.cross_entropy import cross_entropy_

    with pytest.raises(IndexError, match=rf"a label is {target}\. Expected tokens of the vocabulary, 0 to 49,"):
        cross_entropy_(torch.zeros(2, 50), torch.tensor([1, target]), 0.0, False)


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="run by test_in_the_interpreter")
def test_targets_may_be_strided():
    from glalm.kernels.triton.cross_entropy import cross_entropy_

    logits, targets = torch.randn(5, 50, device=DEVICE), torch.arange(10, device=DEVICE)[::2]
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(cross_entropy_(logits, targets, 0.0, False), expected)
