"""The linear transformer of "Linear attention is (maybe) all you need" (Ahn et al., arXiv 2310.01082) and its task.

A task is a regression of y = x . w with N examples. Its tokens are the rows of Z [N + 1, d + 1]: [x_i, y_i] for each
example, and [x, 0] for the query. A layer has matrices P and Q [d, d] and adds attention without a softmax,

    Z <- Z + 1/N Z Q' Z^T A Z P',   Q' = diag(Q, 0),   P' = diag(P, 1),

in which A removes the query from the keys. The last number of the query is the negative prediction after the last
layer. With P = 0 and Q = -eta I, a layer is one step of gradient descent on the examples, from w = 0 and of size eta.

Every function computes many models at once, with an axis for the models in front.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Tasks:
    """Regression tasks as linear attention stores them: the sums over the examples that Z^T A Z / N consists of."""

    xx: Tensor  # [models, tasks, d, d], the mean of x_i^T x_i
    xy: Tensor  # [models, tasks, d, 1], the mean of x_i^T y_i
    query: Tensor  # [models, tasks, 1, d], its x
    label: Tensor  # [models, tasks], its y

    def expand(self, models: int) -> "Tasks":
        """Return the tasks for `models` models, which share those of one."""
        return Tasks(*(y.expand(models, *y.shape[1:]) for y in (self.xx, self.xy, self.query, self.label)))


def draw_tasks(
    models: int, tasks: int, random: np.random.Generator, examples: int = 20, d: int = 5, heavy_tails: bool = False
) -> Tasks:
    """Draw tasks with w from N(0, I), and x from N(0, I) or, with heavy tails, of squared length Gamma(0.1, 10)."""
    w = random.standard_normal((models, tasks, d, 1), np.float32)
    x = random.standard_normal((models, tasks, examples + 1, d), np.float32)
    if heavy_tails:
        squared_length = random.gamma(0.1, 10, (models, tasks, examples + 1, 1)).astype(np.float32)
        x *= np.sqrt(squared_length) / np.linalg.norm(x, axis=-1, keepdims=True)
    x, y = torch.from_numpy(x), torch.from_numpy(x @ w)
    keys = x[:, :, :-1]
    return Tasks(keys.mT @ keys / examples, keys.mT @ y[:, :, :-1] / examples, x[:, :, -1:], y[:, :, -1, 0])


def predict(weights: Tensor, tasks: Tasks) -> Tensor:
    """Return the predictions [models, tasks] of models with weights [models, layers, 2, d, d]: each layer's P and Q.

    A layer multiplies all x by A = I + Q xx P and adds x b to each y, with b = Q xy. So instead of Z, only its last row
    and the sums over the examples are computed: this is the recurrent form of linear attention.
    """
    xx = tasks.xx
    xy = tasks.xy
    x = tasks.query
    y = torch.zeros_like(x[..., :1])
    identity = torch.eye(weights.shape[-1], dtype=weights.dtype)
    for layer in weights.unbind(1):
        P, Q = layer[:, None].unbind(2)
        b = Q @ xy
        A = identity + Q @ xx @ P
        y = y + x @ b
        x = x @ A
        xy = A.mT @ (xy + xx @ b)
        xx = A.mT @ xx @ A
    return -y[:, :, 0, 0]


def mean_squared_error(weights: Tensor, tasks: Tasks) -> Tensor:
    """Return the loss of each model, [models]."""
    return (predict(weights, tasks) - tasks.label).square().mean(1)


def gradient_descent_weights(eta: float, layers: int, d: int) -> Tensor:
    """Return weights [1, layers, 2, d, d] with which every layer is a step of gradient descent of size eta."""
    return torch.stack([torch.zeros(d, d), -eta * torch.eye(d)]).expand(1, layers, 2, d, d)
