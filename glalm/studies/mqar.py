"""Multi-query associative recall: the task, and a small model trained on it (Zoology, arXiv 2312.04927).

A sequence lists pairs of a key and its value; later each key comes once more, and there the model has to say its
value. How many pairs a model of some width recalls tells how much its state can hold apart.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from glalm.data.files import atomic_write
from glalm.generation.cuda_graph import GraphCapture
from glalm.model.decoder import CausalLM
from glalm.model.precision import has_bf16
from glalm.studies.mqar_config import MQARConfig
from glalm.train.random_states import seeded

ROWS_AT_ONCE = 1024  # of which a random number for every possible key is held
EAGER = 3  # steps before one is captured: libraries set themselves up on their first calls, which a capture forbids


@dataclass
class Examples:
    """inputs: token ids [n, length]; queries: the positions of the keys' second places [n, pairs]; values: the ids that
    a model should predict there [n, pairs]. All int64."""

    inputs: Tensor
    queries: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows) -> "Examples":
        return Examples(self.inputs[rows], self.queries[rows], self.values[rows])


def examples(
    count: int,
    length: int,
    pairs: int,
    generator: torch.Generator,
    vocab_size: int = 8192,
    power: float = 0.01,
    filler: str = "zero",
) -> Examples:
    """`count` sequences, drawn by `generator`, on its device.

    Ids 1 to vocab_size / 2 - 1 are keys, those from vocab_size / 2 on values; in a sequence none comes twice among its
    pairs, which are its first 2 * pairs tokens. What follows has (length - 2 * pairs) / 2 slots of two tokens. The keys
    come at the beginning of different slots, drawn one after the other with p(slot i) ~ i^(power - 1), i from 1. All
    else is the id 0, or with filler "random" any ids.
    """
    half, context = vocab_size // 2, 2 * pairs
    weights = torch.arange(1, (length - context) // 2 + 1, device=generator.device).double() ** (power - 1)
    keys = 1 + distinct(torch.ones(half - 1, device=generator.device), count, pairs, generator)
    values = half + distinct(torch.ones(vocab_size - half, device=generator.device), count, pairs, generator)
    queries = context + 2 * distinct(weights, count, pairs, generator)
    inputs = torch.zeros(count, length, dtype=torch.int64, device=generator.device)
    if filler == "random":
        inputs = torch.randint(vocab_size, inputs.shape, generator=generator, device=generator.device)
    inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values
    inputs.scatter_(1, queries, keys)
    return Examples(inputs, queries, values)


def distinct(weights: Tensor, count: int, picks: int, generator: torch.Generator) -> Tensor:
    """int64 [count, picks]: in each row different indices of `weights`, drawn one after the other in proportion to it.

    The largest of independent log weights plus Gumbel noise, in their order, are such a draw (Efraimidis and Spirakis).
    """
    rows = []
    for start in range(0, count, ROWS_AT_ONCE):
        shape = (min(ROWS_AT_ONCE, count - start), len(weights))
        noise = torch.empty(shape, device=weights.device).exponential_(generator=generator)
        rows.append((weights.log() - noise.log()).topk(picks).indices)
    return torch.cat(rows)


def train(
    config: MQARConfig,
    mixer: str,
    length: int,
    pairs: int,
    width: int,
    lr: float,
    device: torch.device,
    partial: Path | None = None,
) -> dict:
    """Trains one model and returns its `accuracy` on the test examples, of all queries, after its last epoch, the
    `epochs` that it took, `seconds`, `parameters`, and the accuracy after each epoch as `history`.

    AdamW, the learning rate falling to 0 by a cosine over all epochs; training ends early at config.stop_at. The same
    arguments give the same result on the same device. After every epoch all that it needs to go on is saved to the file
    `partial`; from what is there of the same arguments it goes on.
    """
    begun = time.perf_counter()
    generator = torch.Generator(device).manual_seed(config.seed)
    task = {"vocab_size": config.vocab_size, "power": config.power, "filler": config.filler}
    training = examples(config.train_examples, length, pairs, generator, **task)
    test = examples(config.test_examples, length, pairs, generator, **task)
    model = build(config, mixer, width, device)
    captures = config.cuda_graph and device.type == "cuda"
    rate = torch.tensor(lr, device=device) if captures else lr
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, weight_decay=config.weight_decay, fused=True, capturable=captures
    )
    batch_size = min(config.batch_size, max(1, config.batch_tokens // length))
    steps = config.epochs * math.ceil(len(training) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)

    def step(batch: Examples) -> None:
        loss = F.cross_entropy(answers(model, batch).flatten(0, 1), batch.values.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step = captured(step, batch_size, device) if captures else step
    job = config.settings() | {"job": [mixer, length, pairs, width, lr], "device": device.type, "captures": captures}
    state = Progress(job, generator, {"model": model, "optimizer": optimizer, "schedule": schedule})
    history, before = state.load(partial, device)
    begun -= before
    while len(history) < config.epochs and not (history and history[-1] >= config.stop_at):
        order = torch.randperm(len(training), generator=generator, device=device)
        for rows in order.split(batch_size):
            step(training[rows])
            schedule.step()
        history.append(accuracy(model, test, batch_size))
        state.save(partial, history, time.perf_counter() - begun)
    return {
        "accuracy": history[-1],
        "epochs": len(history),
        "seconds": time.perf_counter() - begun,
        "parameters": sum(p.numel() for p in model.parameters()),
        "history": history,
    }


@dataclass
class Progress:
    """A training's whole state, in a file: a model of many epochs that is interrupted need not begin anew."""

    job: dict  # all that it depends on
    generator: torch.Generator
    parts: dict  # by name, each with state_dict

    def save(self, path: Path | None, history: list[float], seconds: float) -> None:
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"job": self.job, "generator": self.generator.get_state()}
        with atomic_write(path) as file:
            torch.save(state | {"history": history, "seconds": seconds}, file)

    def load(self, path: Path | None, device: torch.device) -> tuple[list[float], float]:
        """The accuracies after the epochs that were trained, and their seconds: none where there is no such file, or
        one of another job. ValueError, naming it, when it is damaged."""
        if path is None or not path.exists():
            return [], 0.0
        try:
            saved = torch.load(path, map_location=device)
        except Exception as error:  # torch raises many kinds
            raise ValueError(f"{path} is damaged; remove it ({type(error).__name__}: {error})") from error
        if saved.get("job") != self.job:
            return [], 0.0
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.generator.set_state(saved["generator"].cpu())
        return saved["history"], saved["seconds"]


def captured(step: Callable[[Examples], None], size: int, device: torch.device) -> Callable[[Examples], None]:
    """`step`, as one CUDA graph from its fourth batch of `size` sequences on: kernels of such a model are shorter than
    their launches."""
    capture, static, graph, eager = GraphCapture(device), None, None, 0

    def call(batch: Examples) -> None:
        nonlocal static, graph, eager
        if len(batch) != size or eager < EAGER:
            eager += len(batch) == size
            capture.warm_up(lambda: step(batch))
            return
        if graph is None:
            static = Examples(*(torch.empty_like(x) for x in vars(batch).values()))
            graph, _ = capture.capture(lambda: step(static))
        for mine, given in zip(vars(static).values(), vars(batch).values(), strict=True):
            mine.copy_(given)
        graph.replay()

    return call


def build(config: MQARConfig, mixer: str, width: int, device: torch.device) -> CausalLM:
    shape = dataclasses.replace(config.model, layers=mixer, hidden_size=width, vocab_size=config.vocab_size)
    with seeded(config.seed, device):
        return CausalLM(shape).to(device)


def answers(model: CausalLM, batch: Examples) -> Tensor:
    """Logits at the queries alone, [n, pairs, vocabulary] float32: the head is most of such a model's work."""
    device = batch.inputs.device
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
        hidden, _ = model.model(batch.inputs)
        at = batch.queries[..., None].expand(-1, -1, hidden.shape[-1])
        return model.lm_head(hidden.gather(1, at)).float()


@torch.no_grad()
def accuracy(model: CausalLM, test: Examples, batch_size: int) -> float:
    """The part of all queries whose value is the likeliest token."""
    model.eval()
    right = [
        (answers(model, test[i : i + batch_size]).argmax(-1) == test.values[i : i + batch_size]).double().sum()
        for i in range(0, len(test), batch_size)
    ]
    model.train()
    return (torch.stack(right).sum() / test.values.numel()).item()
