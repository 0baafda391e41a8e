import pytest
import torch
import torch.nn.functional as F

from glalm.model.layers import ShortConv


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2**-8 + 1e-5), (torch.float16, 2**-11 + 1e-5)],
    ids=str,
)
def test_a_short_convolution_rounds_once(dtype, tolerance, bias):
    """Its output and its gradients are those of a float64 convolution, rounded once."""
    torch.manual_seed(0)
    conv = ShortConv(6, 4, bias).to(dtype if dtype == torch.float64 else torch.float32)
    for p in conv.parameters():
        torch.nn.init.normal_(p)
    weights = dict(conv.named_parameters())
    for T in (0, 1, 2, 3, 200):
        x = torch.randn(2, T, 6, dtype=torch.float64).to(dtype).requires_grad_()
        dy = torch.randn(2, T, 6, dtype=torch.float64).to(dtype)
        leaves = {name: p.detach().double().requires_grad_() for name, p in {"x": x, **weights}.items()}
        padded = F.pad(leaves["x"].mT, (4, 0))  # With one row more than needed, because conv1d refuses T = 0.
        expected = F.silu(F.conv1d(padded, leaves["weight"], leaves.get("bias"), groups=6).mT[:, 1:])
        found, _ = conv(x, None, None)
        results = [found, *torch.autograd.grad(found, [x, *weights.values()], dy)]
        truths = [expected, *torch.autograd.grad(expected, [*leaves.values()], dy.double())]
        for result, truth in zip(results, truths, strict=True):
            assert (result.double() - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("bias", [False, True])
def test_a_short_convolution_of_parts_is_that_of_the_whole(bias):
    conv = ShortConv(12, 4, bias=bias).double()
    with torch.no_grad():
        conv.init_parameters()
        if bias:
            conv.bias.normal_()
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 3, 12, dtype=torch.float64)
    cotangent = torch.randn(2, 9, 12, dtype=torch.float64)

    whole, final = conv(x, state, None)
    expected = torch.autograd.grad((whole * cotangent).sum(), [x, *conv.parameters()])
    parts, final_of_parts = conv(x.split([5, 1, 6], -1), state, None)
    got = torch.autograd.grad((torch.cat(parts, -1) * cotangent).sum(), [x, *conv.parameters()])

    torch.testing.assert_close(torch.cat(parts, -1), whole)
    torch.testing.assert_close(final_of_parts, final)
    torch.testing.assert_close(got, expected)
