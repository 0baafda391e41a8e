from threading import Barrier

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glalm.evals.evaluator import EvalContext
from glalm.hf import GLALMConfig, GLALMForCausalLM


@pytest.fixture(scope="session")
def model() -> GLALMForCausalLM:
    """Random, with weights large enough that what came long ago matters."""
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 64}
    return GLALMForCausalLM(GLALMConfig(**shape, initializer_range=0.3)).eval()


@pytest.fixture(scope="session")
def true_losses(model):
    """Nats of every token of a sequence but the first, from the logits of one forward over all of it."""

    @torch.no_grad()
    def losses(tokens: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(tokens.astype(np.int64))
        logits = model(ids[None, :-1], use_cache=False).logits[0].double()
        return F.cross_entropy(logits, ids[1:], reduction="none").numpy()

    return losses


class Stream:
    """As much of a TokenSet as the evaluators read, in memory."""

    folder, split, is_complete = "memory", "test", True

    def __init__(self, documents: list[np.ndarray]):
        self.documents = documents
        self.stream = np.concatenate(documents)
        self.num_tokens = len(self.stream)
        self.source_tokens = {"memory": self.num_tokens}
        self.document_lengths = np.array([len(d) for d in documents])

    def read_tokens(self, start: int, stop: int) -> np.ndarray:
        return self.stream[start:stop]

    def read_document(self, i: int) -> np.ndarray:
        return self.documents[i]


@pytest.fixture(scope="session")
def stream():
    def make(*lengths: int) -> Stream:
        generator = np.random.default_rng(len(lengths))
        return Stream([generator.integers(0, 64, n).astype(np.uint16) for n in lengths])

    return make


class ThreadContext(EvalContext):
    """One of several ranks that are threads: they exchange results through a list."""

    def __init__(self, rank: int, board: list, barrier: Barrier):
        super().__init__()
        self.rank = rank
        self.world_size = len(board)
        self.board = board
        self.barrier = barrier

    def _gather_or_raise(self, action) -> list:
        self.board[self.rank] = action()
        self.barrier.wait(30)
        gathered = list(self.board)
        self.barrier.wait(30)
        return gathered


@pytest.fixture
def thread_contexts():
    """thread_contexts(n): the contexts of n ranks, each for a thread of its own."""

    def make(count: int) -> list[ThreadContext]:
        board = [None] * count
        barrier = Barrier(count)
        return [ThreadContext(rank, board, barrier) for rank in range(count)]

    return make
