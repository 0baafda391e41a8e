"""Maps of queries and keys that stand in for the softmax's exponential: [..., H, K] to [..., H, features]."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1, positive (Katharopoulos et al., arXiv 2006.16236)."""
    return F.elu(x) + 1


def identity(x: Tensor) -> Tensor:
    return x


class Hedgehog(nn.Module):
    """softmax([W x; -W x]) of each head, W starting as the identity (Zhang et al., arXiv 2402.04347): 2 K features."""

    def __init__(self, heads: int, K: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, K, K))

    def initialise(self) -> None:
        nn.init.zeros_(self.weight)
        for head in self.weight:
            nn.init.eye_(head)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("...hk,hjk->...hj", x, self.weight.to(x.dtype))
        return torch.cat([x, -x], -1).softmax(-1)


FUNCTIONS = {"elu1": elu1, "relu": F.relu, "identity": identity}


def feature_map(name: str, heads: int, K: int) -> Callable[[Tensor], Tensor]:
    """The map of that name for heads of K channels; hedgehog, which alone is learned, is an nn.Module."""
    return Hedgehog(heads, K) if name == "hedgehog" else FUNCTIONS[name]


def beside_ones(v: Tensor) -> Tensor:
    """[..., V] to [..., V + 1]: values whose last column sums the weights. Not in float16, whose range that sum leaves
    after a few hundred tokens."""
    v = v.float() if v.dtype == torch.float16 else v
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def over_sum(o: Tensor) -> Tensor:
    """What attention to `beside_ones` gave, over the sum of the weights: [..., V + 1] to [..., V]."""
    return o[..., :-1] / o[..., -1:].clamp(min=1e-6)


def features(name: str, K: int) -> int:
    """The number of features of K channels."""
    return 2 * K if name == "hedgehog" else K
