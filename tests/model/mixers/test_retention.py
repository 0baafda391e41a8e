import pytest
import torch
from torch.nn.functional import silu


def retention(w, x, config):
    """The paper's parallel form, with complex rotations: (Q Theta)(K conj Theta)^T * D, D_ts = gamma^(t - s)."""
    H, T, heads = config.num_heads, len(x), []
    gate = silu(x @ w["g_proj.weight"].T).chunk(H, 1)
    for h in range(H):
        q, k, v = (m.chunk(H, 1)[h] for m in (x @ w[f"{n}_proj.weight"].T for n in "qkv"))
        half, K = q.shape[1] // 2, q.shape[1]
        angle = torch.arange(T).double()[:, None] * 10000 ** -(torch.arange(half).double() / half)
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (torch.complex(m[:, :half], m[:, half:]) * turn for m in (q, k))
        distance = torch.arange(T)[:, None] - torch.arange(T)
        decay = torch.where(distance >= 0, (1 - 2.0 ** (-5 - h)) ** distance.double(), 0)
        o = ((q @ k.mH).real * decay) @ v / K**0.5
        o = o / (o.square().mean(1, keepdim=True) + 1e-6).sqrt() * w["g_norm_swish_gate.weight"]
        heads.append(o * gate[h])
    return torch.cat(heads, 1) @ w["o_proj.weight"].T


@pytest.mark.parametrize("heads", [1, 4])
def test_is_the_papers_parallel_form(heads, assert_is):
    assert_is(retention, T=70, mixer="retention", num_heads=heads, expand_k=1.0, expand_v=2.0)
