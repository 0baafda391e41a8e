"""The initial time steps of state-space models (Gu and Dao, arXiv 2312.00752, section 3.6)."""

import math

import torch
from torch import Tensor
from transformers import initialization as init

SHORTEST, LONGEST = 1e-3, 1e-1


@torch.no_grad()
def initialise_time_step(bias: Tensor) -> None:
    """Sets a bias so that softplus(bias) is log-uniform between SHORTEST and LONGEST."""
    step = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(SHORTEST), math.log(LONGEST)).exp()
    init.copy_(bias, step + torch.log(-torch.expm1(-step)))
