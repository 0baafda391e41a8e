"""Two tasks of associative recall, and the training of one small model on them.

Multi-query associative recall (Zoology, arXiv 2312.04927): a sequence lists keys with their values. Later each key
appears once more, and the model must predict its value there. The number of pairs that a model of some width recalls
shows how much its state can hold.

Associative recall (Hyena, arXiv 2302.10866, section 4.1): a long sequence repeats the entries of a small dictionary. At
its end the model must predict the value of one key. This shows which mixers can learn recall at such lengths.
"""

import dataclasses
import inspect
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from glalm.config.strict import require
from glalm.data.files import atomic_write, file_sha256
from glalm.kernels.common import has_bf16
from glalm.kernels.graph_capture import GraphCapture
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.model.mixers import MIXERS, check_mixer_name
from glalm.train.random_states import seeded

# Drawing keys needs a random number for every possible key, so sequences are drawn this many at a time.
SEQUENCES_PER_DRAW = 1024
# Libraries initialize themselves in their first calls, which a graph capture forbids.
EAGER_STEPS_BEFORE_CAPTURE = 3
SECONDS_BETWEEN_MESSAGES = 60


@dataclass
class RecallModel(ModelConfig):
    """Two layers of a mixer with two heads, without SwiGLU, and with tied embeddings."""

    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_heads: int = 2
    intermediate_size: int | None = 0
    tie_word_embeddings: bool = True


# The keys of MQARConfig that choose which models are trained, and where and how, but change none of them.
SWEEP_KEYS = ("folder", "cuda_graph", "mixers", "lengths", "pairs", "widths", "learning_rates")


@dataclass
class MQARConfig:
    """The config of `glalm mqar`. Except for the mixers, the defaults are the published settings.

    A model is trained for every mixer, length, width and learning rate (arXiv 2312.04927, figure 2 and appendix E).
    """

    folder: str = "runs/mqar"  # eval/*.json has the results, partial/* the models in training
    task: Literal["mqar", "associative_recall"] = "mqar"  # multi-query, or one query at the end of a long sequence
    # A mixer for both layers, or one for each, as in gla+attention.
    mixers: list[str] = field(default_factory=lambda: ["attention", "gla", "mamba", "retention", "deltanet"])
    lengths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])  # tokens
    # Keys with a value, for each length. In associative_recall, how many a sequence's dictionary has.
    pairs: list[int] = field(default_factory=lambda: [4, 8, 16, 64])
    widths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    # logspace(-4, -2, 4), most promising first. Once one rate reaches stop_at, the others are skipped.
    learning_rates: list[float] = field(default_factory=lambda: [2.15e-3, 4.64e-4, 1e-2, 1e-4])
    vocab_size: int = 8192  # the lower half are keys, the upper half values
    # Only of mqar: a key is asked in the i-th slot of two tokens after the pairs with p(i) ~ i^(power - 1); 1: uniform.
    power: float = 0.01
    # Only of mqar: the tokens that are neither key nor value.
    filler: Literal["zero", "random"] = "zero"
    train_examples: int = 100_000
    test_examples: int = 3_000
    epochs: int = 64
    batch_size: int = 512  # sequences, at most
    batch_tokens: int = 65_536  # at most, so that longer sequences make smaller batches
    stop_at: float = 0.99  # test accuracy at which training ends
    weight_decay: float = 0.1
    seed: int = 1
    cuda_graph: bool = True  # run a step on a GPU as one CUDA graph; false for mixers whose step waits for the GPU
    # Overwritten: mixer, vocab_size, hidden_size, and hyena.filter_length by the number of tokens.
    model: RecallModel = field(default_factory=RecallModel)

    def __post_init__(self):
        self._check_axes()
        require(
            len(self.lengths) == len(self.pairs),
            f"lengths={self.lengths} and pairs={self.pairs} must have the same number of entries",
        )
        for length, pairs in zip(self.lengths, self.pairs, strict=True):
            require(
                pairs > 0 and length % 2 == 0 and 4 * pairs <= length,
                f"lengths, pairs: {length} tokens must be an even number, at least four for each of {pairs} pairs",
            )
        require(
            self.vocab_size >= 2 * max(self.pairs) + 2,
            f"vocab_size={self.vocab_size} has too few keys for {max(self.pairs)} pairs; write "
            f"vocab_size={2 * max(self.pairs) + 2} or more",
        )
        require(
            self.task == "mqar" or (self.power, self.filler) == (MQARConfig.power, MQARConfig.filler),
            f"power and filler describe task=mqar; remove them from task={self.task}",
        )
        for mixer in self.mixers:
            for layer in mixer.split("+"):
                check_mixer_name("mixers", layer)
        for name in ("train_examples", "test_examples", "epochs", "batch_size", "batch_tokens", "power", "stop_at"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        require(self.weight_decay >= 0, f"weight_decay must not be negative, as {self.weight_decay} is")
        for rate in self.learning_rates:
            require(0 < rate < math.inf, f"learning_rates must be positive and finite, not {rate}")

    def _check_axes(self) -> None:
        """Refuse an empty axis of the sweep, and values that would give two models the same file name."""
        axes = {
            "mixers": self.mixers,
            "lengths, pairs": list(zip(self.lengths, self.pairs, strict=False)),
            "widths": self.widths,
            "learning_rates": [f"{rate:g}" for rate in self.learning_rates],
        }
        for name, values in axes.items():
            require(len(values) > 0, f"{name} is empty")
            require(len(set(values)) == len(values), f"{name}: {values} has a value twice")

    def settings(self) -> dict:
        """Return the keys that every model of the sweep depends on."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in SWEEP_KEYS}


@dataclass(frozen=True)
class Job:
    """One model of the sweep."""

    mixer: str
    length: int
    pairs: int
    width: int
    lr: float

    @property
    def name(self) -> str:
        return f"{self.mixer}_{self.length}x{self.pairs}_d{self.width}_lr{self.lr:g}"


# ------------------------------------------------------------------------------------------------------------- task


@dataclass
class Examples:
    """Sequences with their questions and answers, all int64."""

    inputs: Tensor  # [n, length], token ids
    queries: Tensor  # [n, queries], the positions of the keys whose values are to be predicted
    values: Tensor  # [n, queries], the token ids to predict there

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows) -> "Examples":
        return Examples(self.inputs[rows], self.queries[rows], self.values[rows])


def draw_sets(config: MQARConfig, job: Job, generator: torch.Generator) -> tuple[Examples, Examples]:
    """Draw the training and the test examples of a job.

    In associative recall the test asks at the last key alone. Training asks at every key, because the authors' code
    trains on all tokens.
    """
    counts = (config.train_examples, config.test_examples)
    task = (job.length, job.pairs, generator, config.vocab_size)
    if config.task == "mqar":
        training, test = (draw_examples(count, *task, config.power, config.filler) for count in counts)
        return training, test
    training, test = (draw_associative_recall(count, *task) for count in counts)
    return training, Examples(test.inputs, test.queries[:, -1:], test.values[:, -1:])


def draw_associative_recall(
    count: int, length: int, pairs: int, generator: torch.Generator, vocab_size: int
) -> Examples:
    """Draw `count` sequences of associative recall on the generator's device.

    Each has a dictionary of its own: `pairs` different keys (ids 1 to vocab_size / 2 - 1), and for each a random value
    (ids from vocab_size / 2 on), which keys may share. The first length - 2 tokens are random entries of it, each a key
    and its value. A 0 follows, and last the key of one of these entries. The queries are all keys, in order.
    """
    device = generator.device
    half = vocab_size // 2
    keys = 1 + draw_distinct(torch.ones(half - 1, device=device), count, pairs, generator)
    values = torch.randint(half, vocab_size, (count, pairs), generator=generator, device=device)
    entries = torch.randint(pairs, (count, length // 2 - 1), generator=generator, device=device)
    asked = torch.randint(length // 2 - 1, (count, 1), generator=generator, device=device)
    entries = torch.cat([entries, entries.gather(1, asked)], 1)
    queries = torch.arange(0, length, 2, device=device)
    queries[-1] = length - 1
    inputs = torch.zeros(count, length, dtype=torch.int64, device=device)
    inputs[:, queries] = keys.gather(1, entries)
    answers = values.gather(1, entries)
    inputs[:, 1:-2:2] = answers[:, :-1]
    return Examples(inputs, queries.expand(count, -1), answers)


def draw_examples(
    count: int,
    length: int,
    pairs: int,
    generator: torch.Generator,
    vocab_size: int = 8192,
    power: float = 0.01,
    filler: str = "zero",
) -> Examples:
    """Draw `count` sequences of multi-query associative recall on the generator's device.

    The first 2 * pairs tokens are keys (ids 1 to vocab_size / 2 - 1) and their values (ids from vocab_size / 2 on),
    with no key and no value twice. The rest of the sequence consists of slots of two tokens. The keys appear again at
    the starts of different slots, drawn one after the other with p(slot i) ~ i^(power - 1) for i from 1. All other
    tokens are 0, or random ids with filler "random".
    """
    device = generator.device
    half = vocab_size // 2
    context = 2 * pairs
    slot_weights = torch.arange(1, (length - context) // 2 + 1, device=device).double() ** (power - 1)
    keys = 1 + draw_distinct(torch.ones(half - 1, device=device), count, pairs, generator)
    values = half + draw_distinct(torch.ones(vocab_size - half, device=device), count, pairs, generator)
    queries = context + 2 * draw_distinct(slot_weights, count, pairs, generator)
    inputs = torch.zeros(count, length, dtype=torch.int64, device=device)
    if filler == "random":
        inputs = torch.randint(vocab_size, inputs.shape, generator=generator, device=device)
    inputs[:, 0:context:2] = keys
    inputs[:, 1:context:2] = values
    inputs.scatter_(1, queries, keys)
    return Examples(inputs, queries, values)


def draw_distinct(weights: Tensor, count: int, picks: int, generator: torch.Generator) -> Tensor:
    """Return int64 [count, picks]: in each row, distinct indices drawn one after the other in proportion to `weights`.

    The order of the largest log weights plus independent Gumbel noise is such a draw (Efraimidis and Spirakis, 2006).
    """
    rows = []
    for start in range(0, count, SEQUENCES_PER_DRAW):
        shape = (min(SEQUENCES_PER_DRAW, count - start), len(weights))
        noise = torch.empty(shape, device=weights.device).exponential_(generator=generator)
        rows.append((weights.log() - noise.log()).topk(picks).indices)
    return torch.cat(rows)


# --------------------------------------------------------------------------------------------------------- training


def train(config: MQARConfig, job: Job, device: torch.device, partial: Path | None = None) -> dict:
    """Train one model until it reaches config.stop_at, or for config.epochs. Resume from `partial` if it exists.

    Uses AdamW with a learning rate that decays to 0 by a cosine over all epochs. After every epoch everything needed to
    resume is saved to `partial`. The same arguments give the same result on the same device. Every minute or epoch,
    whichever is longer, the accuracy so far is printed.

    Returns:
        accuracy (of all queries of the test examples, after the last epoch), history (the accuracy after each epoch),
        epochs, seconds and parameters.
    """
    start_time = time.perf_counter()
    generator = torch.Generator(device).manual_seed(config.seed)
    training, test = draw_sets(config, job, generator)
    model = build_model(config, job, device)
    capture = config.cuda_graph and device.type == "cuda"
    batch_size = min(config.batch_size, max(1, config.batch_tokens // job.length))
    steps = config.epochs * math.ceil(len(training) / batch_size)
    optimizer, schedule = build_optimizer(model, job.lr, config.weight_decay, steps, capture)

    def step(batch: Examples) -> None:
        loss = F.cross_entropy(answer_logits(model, batch).flatten(0, 1), batch.values.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step = capture_step(step, batch_size, device) if capture else step
    identity = config.settings() | {"job": dataclasses.astuple(job), "device": device.type, "capture": capture}
    identity |= hash_user_code(job.mixer)
    history, seconds_before = load_partial(partial, identity, generator, model, optimizer, schedule)
    start_time -= seconds_before
    last_message = time.perf_counter()
    while len(history) < config.epochs and not (history and history[-1] >= config.stop_at):
        order = torch.randperm(len(training), generator=generator, device=device)
        for rows in order.split(batch_size):
            step(training[rows])
            schedule.step()
        history.append(measure_accuracy(model, test, batch_size))
        seconds = time.perf_counter() - start_time
        save_partial(partial, identity, generator, model, optimizer, schedule, history, seconds)
        if time.perf_counter() - last_message >= SECONDS_BETWEEN_MESSAGES:
            last_message = time.perf_counter()
            epochs = f"{len(history)} of at most {config.epochs} epochs"
            print(f"{job.name}: accuracy {history[-1]:.3f} after {epochs}, {seconds:.0f} s", flush=True)
    return {
        "accuracy": history[-1],
        "epochs": len(history),
        "seconds": time.perf_counter() - start_time,
        "parameters": sum(p.numel() for p in model.parameters()),
        "history": history,
    }


def save_partial(path: Path | None, identity: dict, generator, model, optimizer, schedule, history, seconds) -> None:
    """Save everything needed to resume a training as one safetensors file."""
    if path is None:
        return
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    tensors["generator"] = generator.get_state()
    record = {"identity": identity, "step": schedule.last_epoch, "history": history, "seconds": seconds}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Tied weights are stored twice, because safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    with atomic_write(path) as file:
        file.write(to_safetensors(copies, {"record": json.dumps(record)}))


def load_partial(path: Path | None, identity: dict, generator, model, optimizer, schedule) -> tuple[list[float], float]:
    """Restore what save_partial saved, if it is of the same training.

    Returns the accuracy after each epoch and the seconds these took: [] and 0.0 without such a file. Raises ValueError
    if the file is damaged.
    """
    if path is None or not path.exists():
        return [], 0.0
    record, tensors = read_partial(path)
    if record["identity"] != json.loads(json.dumps(identity)):
        return [], 0.0
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    saved = optimizer.state_dict()
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            saved["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(saved)
    schedule.last_epoch = record["step"]
    [group] = optimizer.param_groups
    lr = schedule.base_lrs[0] * schedule.lr_lambdas[0](schedule.last_epoch)
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(lr)
    else:
        group["lr"] = lr
    generator.set_state(tensors["generator"])
    return record["history"], record["seconds"]


def read_partial(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Return the record and the tensors of a file that save_partial wrote. Raise ValueError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            record = json.loads(file.metadata()["record"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged; remove it ({type(error).__name__}: {error})") from error
    return record, tensors


def capture_step(step: Callable[[Examples], None], batch_size: int, device: torch.device) -> Callable[[Examples], None]:
    """Return a function that runs `step` as one CUDA graph, after a few eager steps.

    The kernels of such a small model are shorter than their launches. Batches of another size run eagerly.
    """
    capture = GraphCapture(device)
    graph: torch.cuda.CUDAGraph | None = None
    static: Examples | None = None
    eager_steps = 0

    def run(batch: Examples) -> None:
        nonlocal graph, static, eager_steps
        if len(batch) != batch_size or eager_steps < EAGER_STEPS_BEFORE_CAPTURE:
            eager_steps += len(batch) == batch_size
            capture.warm_up(lambda: step(batch))
            return
        if graph is None:
            static = Examples(*(torch.empty_like(x) for x in vars(batch).values()))
            graph, _ = capture.capture(lambda: step(static))
        for buffer, value in zip(vars(static).values(), vars(batch).values(), strict=True):
            buffer.copy_(value)
        graph.replay()

    return run


def hash_user_code(mixer: str) -> dict[str, dict[str, str]]:
    """Return {"code": {mixer: SHA-256 of its file}} of the mixers of the user's own code, and {} without any."""
    own = [name for name in mixer.split("+") if ":" in name]
    return {"code": {name: hash_class(MIXERS[name]) for name in own}} if own else {}


@cache  # The file may be edited after it was imported.
def hash_class(mixer: type) -> str:
    return file_sha256(Path(inspect.getfile(mixer)))


def build_model(config: MQARConfig, job: Job, device: torch.device) -> CausalLM:
    """Return the model of a job."""
    with seeded(config.seed, device):
        return CausalLM(describe_model(config, job)).to(device)


def describe_model(config: MQARConfig, job: Job) -> RecallModel:
    """Return the shape of a job's model. Hyena's filter is as long as its sequences, as in Hyena's paper.

    Raises:
        ConfigError: The mixer cannot have this width.
    """
    hyena = dataclasses.replace(config.model.hyena, filter_length=job.length)  # type: ignore[attr-defined]  # The registry adds the field.
    sizes = {"hidden_size": job.width, "vocab_size": config.vocab_size}
    return dataclasses.replace(config.model, layers=job.mixer, hyena=hyena, **sizes)


def build_optimizer(
    model: CausalLM, lr: float, weight_decay: float, steps: int, capture: bool
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """Return AdamW, and the schedule by which its learning rate decays to 0 by a cosine over all steps.

    Args:
        capture: Whether its steps are captured. Such a step reads the learning rate from the GPU.
    """
    parameters = list(model.parameters())
    rate = torch.tensor(lr, device=parameters[0].device) if capture else lr
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=weight_decay, fused=True, capturable=capture)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    return optimizer, schedule


def answer_logits(model: CausalLM, batch: Examples) -> Tensor:
    """Return the logits at the queries only, float32 [n, queries, vocabulary].

    The head is most of the work of such a model.
    """
    device = batch.inputs.device
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
        hidden, _ = model.model(batch.inputs)
        positions = batch.queries[..., None].expand(-1, -1, hidden.shape[-1])
        return model.lm_head(hidden.gather(1, positions)).float()


@torch.no_grad()
def measure_accuracy(model: CausalLM, test: Examples, batch_size: int) -> float:
    """Return the share of all queries whose value is the most likely token."""
    model.eval()
    correct = torch.zeros((), dtype=torch.float64, device=test.inputs.device)
    for start in range(0, len(test), batch_size):
        batch = test[start : start + batch_size]
        correct += (answer_logits(model, batch).argmax(-1) == batch.values).sum()
    model.train()
    return (correct / test.values.numel()).item()
