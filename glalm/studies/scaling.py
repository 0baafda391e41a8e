"""Fit how the loss falls with a model's size and its training tokens, and predict the loss of other runs."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from glalm.config.dial import Dial
from glalm.config.saved_run import describe_missing_run
from glalm.config.strict import ConfigError, build_dataclass, require
from glalm.data import files
from glalm.evals.options import TrainingRun
from glalm.evals.result_files import describe_validation, infer_tokens, read_json, write_json
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.train.metrics import read_metrics

# The exponents that are tried first, and the number of grids: each further one is finer, around the best exponents.
EXPONENTS = np.geomspace(0.02, 2.0, 60)
GRIDS = 4


@dataclass(frozen=True)
class Measurement:
    """What a run reached."""

    name: str
    parameters: int  # as count_without_embeddings returns them
    tokens: int
    lr: float
    loss: float  # of the last validation, nats per token
    vocab_size: int
    conditions: dict  # of `describe_conditions`, in which losses of one law must agree


# What a file of `write_points` has.
POINTS_SHAPE = {
    "measurements": [
        {
            **dict.fromkeys(("parameters", "tokens", "vocab_size"), int),
            **dict.fromkeys(("lr", "loss"), (int, float)),
            "name": str,
            "conditions": dict,
        }
    ]
}


@dataclass(frozen=True)
class LossLaw:
    """L(N, D) = E + A N^-a + B D^-b for N parameters and D tokens (Hoffmann et al., arXiv 2203.15556, section 3.3)."""

    E: float
    A: float
    a: float
    B: float = 0.0
    b: float = 0.0

    def predict(self, parameters: float, tokens: float) -> float:
        """Return the loss in nats per token."""
        return self.E + self.A * parameters**-self.a + self.B * tokens**-self.b


def fit_loss_law(measurements: Sequence[Measurement]) -> LossLaw:
    """Return the law that minimizes the sum of the squared errors of the losses.

    If no size was trained on several numbers of tokens, sizes and tokens cannot be told apart. B is then 0, and the law
    holds for the rule by which the runs' tokens follow from their sizes.

    Raises:
        ConfigError: There are too few sizes or measurements, or the loss does not fall as a power law does.
    """
    has_tokens = have_several_tokens(measurements)
    sizes = np.array([m.parameters for m in measurements], dtype=float)
    tokens = np.array([m.tokens for m in measurements], dtype=float)
    losses = np.array([m.loss for m in measurements])
    # For given exponents the law is linear in its other numbers.
    grids = [EXPONENTS, EXPONENTS if has_tokens else np.zeros(1)]
    best: tuple[float, LossLaw] | None = None
    for _ in range(GRIDS):
        for a, b in itertools.product(*grids):
            columns = [np.ones_like(sizes), sizes**-a, *([tokens**-b] if has_tokens else [])]
            numbers, *_ = np.linalg.lstsq(np.stack(columns, 1), losses, rcond=None)
            law = LossLaw(numbers[0], numbers[1], a, *([numbers[2], b] if has_tokens else []))
            error = float(np.square(law.predict(sizes, tokens) - losses).sum())
            if min(numbers) > 0 and (best is None or error < best[0]):
                best = error, law
        if best is None:
            problem = "The losses do not fall with size and tokens as a power law does"
            raise ConfigError(f"{problem}. Leave out runs that diverged, or add runs of other sizes")
        ratio = (grids[0][1] / grids[0][0]) ** 1.5
        found = [best[1].a, best[1].b]
        grids = [np.geomspace(x / ratio, x * ratio, 25) if x else np.zeros(1) for x in found]
    assert best is not None
    return LossLaw(*(float(number) for number in dataclasses.astuple(best[1])))


def have_several_tokens(measurements: Sequence[Measurement]) -> bool:
    """Return whether some size was trained on several numbers of tokens, so that the law has a term of tokens.

    Raises:
        ConfigError: There are too few sizes, numbers of tokens, or runs for the numbers of the law.
    """
    runs = {(m.parameters, m.tokens) for m in measurements}
    sizes = {m.parameters for m in measurements}
    token_counts = {m.tokens for m in measurements}
    has_tokens = len(runs) > len(sizes)
    required = 5 if has_tokens else 3
    at_least = "3 sizes and 3 numbers of tokens" if has_tokens else "3 sizes"
    require(
        len(sizes) >= 3 and (len(token_counts) >= 3 or not has_tokens) and len(runs) >= required,
        f"The law has {required} numbers to fit, and these runs have {len(sizes)} sizes, {len(token_counts)} "
        f"numbers of tokens and {len(runs)} losses. Name runs of at least {at_least}, and at least {required} that "
        "differ in size or tokens",
    )
    return has_tokens


def select_best(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Return the run with the lowest loss for each size and number of tokens: that of the best learning rate."""
    best: dict[tuple[int, int], Measurement] = {}
    for measurement in sorted(measurements, key=lambda m: m.loss):
        best.setdefault((measurement.parameters, measurement.tokens), measurement)
    return sorted(best.values(), key=lambda m: (m.parameters, m.tokens))


def count_without_embeddings(config: ModelConfig) -> int:
    """Return the number of parameters that enter a matrix product: all but embeddings that are not the head."""
    with torch.device("meta"):
        model = CausalLM(config)
    embeddings = 0 if config.tie_word_embeddings else model.model.embeddings.weight.numel()
    return sum(parameter.numel() for parameter in model.parameters()) - embeddings


def measure_run(folder: Path) -> Measurement:
    """Return what the run in `folder` reached.

    Raises:
        ConfigError: It is no run, it has not trained to its end, or its loss is not finite there.
    """
    record = read_json(folder / "run.json")
    require(record is not None, describe_missing_run(folder))
    assert record is not None
    config = build_dataclass(TrainingRun, record["config"])
    rows, _ = read_metrics(folder / "metrics.jsonl")
    tokens = max(infer_tokens(rows), default=0)
    # The batches, by which tokens take so many steps, may have been others before the run was resumed.
    goal = config.train.tokens
    is_complete = tokens >= goal if goal is not None else bool(rows) and rows[-1]["step"] == config.steps
    require(is_complete, f"{folder} has not trained to its end. To resume it: glalm train resume={folder}")
    loss = rows[-1].get("val_loss")
    require(loss is not None, f"{folder} has diverged: its last validation loss is not finite. Leave it out")
    return Measurement(
        name=folder.name,
        parameters=count_without_embeddings(config.model),
        tokens=tokens,
        lr=config.optim.lr,
        loss=loss,
        vocab_size=config.model.vocab_size,
        conditions=describe_conditions(folder, config.model),
    )


def describe_conditions(folder: Path, model: ModelConfig) -> dict:
    """Return the mixers of the run in `folder` and what it is validated on, whatever path that has."""
    settings = describe_validation(folder)["settings"] | {"mixers": sorted({*model.layer_mixers()})}
    settings.pop("data_path", None)
    return json.loads(json.dumps(settings))


def require_comparable(measurements: Sequence[Measurement]) -> None:
    """Raise ConfigError where losses are of other text, other windows, or other mixers than the first one."""
    first = measurements[0]
    for other in measurements[1:]:
        keys = sorted(first.conditions.keys() | other.conditions.keys())
        changed = [key for key in keys if first.conditions.get(key) != other.conditions.get(key)]
        require(
            not changed,
            f"{other.name} and {first.name} are not points of one law: they differ in {', '.join(changed)}. Name runs "
            "that agree in that",
        )


def is_by_rule(fitted: Sequence[Measurement], parameters: int, tokens: int) -> bool:
    """Return whether tokens follow from the size as they do in the fitted runs, within a factor of two.

    A law without a term of tokens holds for such runs only. The rule is D = c N^k.
    """
    exponent, log_factor = np.polyfit(np.log([m.parameters for m in fitted]), np.log([m.tokens for m in fitted]), 1)
    return bool(abs(np.log(tokens) - exponent * np.log(parameters) - log_factor) < np.log(2))


def shared_vocabulary(measurements: Sequence[Measurement]) -> int:
    """Return the size of the vocabulary of all measurements. Raise ConfigError where they have several."""
    sizes = sorted({m.vocab_size for m in measurements})
    require(len(sizes) == 1, f"the runs have vocabularies of {sizes}; choose that of --depth by --vocab-size N")
    return sizes[0]


def read_points(path: Path) -> list[Measurement]:
    """Return the measurements of a file that `write_points` wrote. Raise ConfigError if there is no such file."""
    try:
        record = files.read_json(path, POINTS_SHAPE)
    except (OSError, ValueError) as error:
        advice = "Write one by glalm scaling RUN ... --out FILE"
        raise ConfigError(f"--points {path} is no file of glalm scaling --out ({error}). {advice}") from error
    names = [field.name for field in dataclasses.fields(Measurement)]
    return [Measurement(**{name: measurement[name] for name in names}) for measurement in record["measurements"]]


def write_points(path: Path, law: LossLaw, measurements: Sequence[Measurement]) -> None:
    """Write the law and its measurements as JSON. Raise ConfigError if that is impossible; an older file remains."""
    record = {"law": asdict(law), "measurements": [asdict(measurement) for measurement in measurements]}
    try:
        write_json(path, record)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written ({error}); choose another file") from error


def describe_dial(depth: int, vocab_size: int) -> tuple[Dial, int]:
    """Return the sizes of experiment=gla_dial at a depth, and its exact number of parameters without embeddings."""
    dial = Dial(depth, vocab_size)
    shape = {"num_hidden_layers": depth, "hidden_size": dial.hidden_size, "num_heads": dial.num_heads}
    return dial, count_without_embeddings(ModelConfig(vocab_size=vocab_size, **shape))
