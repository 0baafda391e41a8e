"""The stages of a run: parts of its tokens with their own data, batch and learning rate, and the phases they become."""

import dataclasses
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from glalm.config.strict import ConfigError, require, require_positive

if TYPE_CHECKING:
    from glalm.config.run import RunConfig, TrainConfig

# How the learning rate goes with the batch, by StageConfig.batch_rule.
BATCH_EXPONENTS = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}
SHARES_TOLERANCE = 1e-6  # Shares such as three times 0.333333 add up to 1.


@dataclass
class StageConfig:
    """A stage of a run. What it leaves null is as in the rest of the config."""

    tokens: float | None = None  # trained on in this stage; or, if at most 1, its share of train.tokens
    seq_len: int | None = None  # instead of data.seq_len
    weights: dict[str, float] | None = None  # instead of data.weights
    document_boundaries: Literal["ignore", "reset_state"] | None = None  # instead of data.document_boundaries
    batch_size: int | None = None  # instead of train.batch_size or train.batch_tokens
    batch_tokens: int | None = None  # instead of train.batch_size or train.batch_tokens
    # Instead of one batch or window length: [[tokens, value], ...]. Each value holds from that number of tokens of the
    # stage on, or, below 1, from that share of the stage. The first begins at 0. A batch is in tokens.
    batch_schedule: list[tuple[float, int]] | None = None
    seq_len_schedule: list[tuple[float, int]] | None = None
    # How the learning rate follows them: with the square root of the batch in tokens, with the batch, or not at all.
    # Where the batch is that of the stage without schedules, the factor is 1.
    batch_rule: Literal["sqrt", "linear", "none"] = "sqrt"
    # Instead of train.micro_batch_size. null: as many as have the tokens of train.micro_batch_size sequences of
    # data.seq_len.
    micro_batch_size: int | None = None
    tbptt_length: int | None = None  # instead of train.tbptt_length
    # How the learning rate goes from where the stage before left it, or from optim.lr after the warm-up, to `lr`, all
    # before batch_rule's factor. sqrt: as 1 - sqrt(x). null: the run follows optim.schedule over all of its stages, and
    # no stage has a schedule.
    schedule: Literal["constant", "linear", "cosine", "sqrt"] | None = None
    lr: float | None = None  # at the stage's last step, unless the schedule is constant


def describe_stage(stage: StageConfig) -> str:
    """Return the settings of a stage that differ from their defaults, as "tokens 3e+09, seq_len 8192"."""
    changed = []
    for field in dataclasses.fields(stage):
        value = getattr(stage, field.name)
        if value != field.default:
            changed.append(f"{field.name} {value:g}" if isinstance(value, float) else f"{field.name} {value}")
    return ", ".join(changed)


@dataclass(frozen=True)
class Phase:
    """Consecutive steps of a run with one batch and one window length.

    It is a stage, a part of one that has schedules of its batch or window length, or the whole of a run without stages.

    Its `config` is the run's, with the stage's values in place of the run's and the number of its steps as train.steps,
    so that whatever is computed of a run can be computed of a phase.
    """

    stage: str  # its name; "" in a run without stages
    start_step: int  # the steps of the run before the phase
    end_step: int  # the steps of the run up to its end
    start_tokens: int  # the tokens of the run before the phase
    config: "RunConfig"
    lr_factor: float = 1.0  # of the learning rate, where the schedules of a stage change the batch

    @property
    def steps(self) -> int:
        return self.end_step - self.start_step

    @property
    def tokens(self) -> int:
        return self.steps * self.config.tokens_per_step


class Milestone(NamedTuple):
    """A step of a run after which the batches change: its start, the border of two phases, or a resume."""

    step: int
    tokens: int  # of the run up to this step
    batch_size: int  # of each step from here to the next milestone
    seq_len: int

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len


def check_stages(train: "TrainConfig") -> None:
    """Raise ConfigError unless the values of train.stages fit together and give the run a length."""
    stages = train.stages or {}
    require(len(stages) > 0, "train.stages is empty. Name a stage, or write train.stages=null")
    for name, stage in stages.items():
        where = f"train.stages.{name}"
        require(
            re.fullmatch(r"[A-Za-z_][\w-]*", name) is not None,
            f"{where}: the name of a stage begins with a letter and has letters, digits, - and _",
        )
        require(stage.tokens is not None, f"{where} needs tokens: a number such as 8e9, or a share such as 0.8")
        require_positive(stage, where, "tokens", "seq_len", "batch_size", "batch_tokens", finite=True)
        require_positive(stage, where, "micro_batch_size", "tbptt_length")
        require(
            stage.batch_size is None or stage.batch_tokens is None,
            f"{where}.batch_size={stage.batch_size} and {where}.batch_tokens={stage.batch_tokens} are alternatives; "
            "remove one of them",
        )
        _check_schedule(where, stage)
        for key in ("batch_schedule", "seq_len_schedule"):
            _check_pieces(f"{where}.{key}", getattr(stage, key))
    _check_lengths(train, stages)
    without = [name for name, stage in stages.items() if stage.schedule is None]
    if 0 < len(without) < len(stages):
        raise ConfigError(
            f"train.stages.{without[0]} has no schedule, and other stages have one. Write schedule=constant, linear, "
            "cosine or sqrt for each stage, or for none to follow optim.schedule"
        )


def _check_schedule(where: str, stage: StageConfig) -> None:
    is_changing = stage.schedule not in (None, "constant")
    require(
        not is_changing or stage.lr is not None,
        f"{where}.schedule={stage.schedule} needs {where}.lr=RATE, the learning rate at the end of the stage",
    )
    require(
        is_changing or stage.lr is None,
        f"{where}.lr={stage.lr} is the learning rate at the end of the stage. Write {where}.schedule=linear, cosine or "
        f"sqrt to say how it gets there, or {where}.lr=null",
    )
    require(0 <= (stage.lr or 0) < math.inf, f"{where}.lr must be 0 or more, and finite, not {stage.lr}")


def _check_pieces(where: str, pieces: list[tuple[float, int]] | None) -> None:
    """Check a schedule [(tokens, value), ...] of batches or windows."""
    if pieces is None:
        return
    starts = [tokens for tokens, _ in pieces]
    require(
        len(pieces) > 0 and starts[0] == 0 and all(one < other < math.inf for one, other in pairwise(starts)),
        f"{where} must begin at 0 tokens and have ascending numbers of tokens: [[0,131072],[1e9,262144]]",
    )
    require(
        max(starts) < 1 or min([*starts[1:], 2]) >= 1,
        f"{where} has numbers of tokens and shares of the stage (below 1). Write one kind for all",
    )
    require(all(value > 0 for _, value in pieces), f"{where}: the batches and lengths must be positive")


def _check_lengths(train: "TrainConfig", stages: dict[str, StageConfig]) -> None:
    """Check that all stages state shares of train.tokens, or that all state numbers of tokens."""
    tokens = [float(stage.tokens or 0) for stage in stages.values()]
    require(
        train.steps is None,
        f"train.steps={train.steps}: the length of a run with train.stages is in tokens. Set train.steps=null",
    )
    if max(tokens) > 1:
        require(
            min(tokens) > 1,
            "Some of train.stages have numbers of tokens and some have shares of at most 1. Write one kind for all",
        )
        require(
            train.tokens is None,
            f"The numbers of tokens of train.stages add up to the run's, so train.tokens={train.tokens} must be null. "
            "Set train.tokens=null, or write shares of it",
        )
        return
    require(
        train.tokens is not None,
        "The tokens of train.stages are shares of train.tokens, which is null. Set train.tokens=N, or write the number "
        "of tokens of each stage",
    )
    total = sum(tokens)
    require(abs(total - 1) < SHARES_TOLERANCE, f"The shares of train.stages add up to {total:g}. Make them add up to 1")


def plan_phases(config: "RunConfig") -> list[Phase]:
    """Return the phases of a run with stages.

    A stage ends with the first step after which the run has trained on the tokens of all stages up to it. The pieces of
    a stage's schedules end likewise.

    Raises:
        ConfigError: A stage or a piece is shorter than a step, or its values do not fit together or with the rest of
            the config.
    """
    phases: list[Phase] = []
    step = 0
    tokens = 0
    stage_start = 0
    stages = config.train.stages or {}
    for name, end_tokens in _count_end_tokens(config.train).items():
        exponent = BATCH_EXPONENTS[stages[name].batch_rule]
        usual_tokens = _count_usual_tokens(config, stages[name])
        for piece in _list_pieces(config, name, stage_start, end_tokens):
            phase_config = _build_phase_config(config, name, piece)
            steps = -((tokens - piece.end_tokens) // phase_config.tokens_per_step)
            part = name if piece.is_whole_stage else f"{name}, from {piece.start_tokens - stage_start:,} tokens on,"
            require(
                steps > 0,
                f"train.stages.{part} has no step, because a step has {phase_config.tokens_per_step:,} tokens. Give it "
                "more tokens, or smaller batches to it and to what is before",
            )
            phase_config.train.steps = steps
            lr_factor = (phase_config.tokens_per_step / usual_tokens) ** exponent
            phases.append(Phase(name, step, step + steps, tokens, phase_config, lr_factor))
            tokens += phases[-1].tokens
            step += steps
        stage_start = end_tokens
    return phases


def _count_usual_tokens(config: "RunConfig", stage: StageConfig) -> int:
    """Return the tokens of a step that a stage would have without schedules."""
    batch = config.train if stage.batch_size is None and stage.batch_tokens is None else stage
    if batch.batch_tokens is not None:
        return batch.batch_tokens
    assert batch.batch_size is not None
    return batch.batch_size * (stage.seq_len or config.data.seq_len)


@dataclass(frozen=True)
class Piece:
    """A part of a stage between two changes of its batch or window length."""

    start_tokens: int  # of the run
    end_tokens: int
    batch_tokens: int | None  # None: as the stage has them without a schedule
    seq_len: int | None
    is_whole_stage: bool


def _list_pieces(config: "RunConfig", name: str, start_tokens: int, end_tokens: int) -> list[Piece]:
    """Return the pieces of a stage, which lies between two numbers of tokens of the run."""
    assert config.train.stages is not None
    stage = config.train.stages[name]
    batches = _count_starts(stage.batch_schedule, start_tokens, end_tokens)
    lengths = _count_starts(stage.seq_len_schedule, start_tokens, end_tokens)
    starts = sorted({start_tokens, *batches, *lengths})
    require(
        starts[-1] < end_tokens,
        f"A schedule of train.stages.{name} has a piece that begins after {starts[-1] - start_tokens:,} tokens, but "
        f"the stage ends after {end_tokens - start_tokens:,}. Remove the piece",
    )
    pieces = []
    batch_tokens = None
    seq_len = None
    for start, end in pairwise([*starts, end_tokens]):
        batch_tokens = batches.get(start, batch_tokens)
        seq_len = lengths.get(start, seq_len)
        window = seq_len or stage.seq_len or config.data.seq_len
        if batch_tokens is not None and batch_tokens % window != 0:
            fitting = window * max(1, round(batch_tokens / window))
            raise ConfigError(
                f"train.stages.{name}.batch_schedule has batches of {batch_tokens} tokens, which do not fit the "
                f"windows of {window} after {start - start_tokens:,} tokens; write {fitting}"
            )
        pieces.append(Piece(start, end, batch_tokens, seq_len, is_whole_stage=len(starts) == 1))
    return pieces


def _count_starts(pieces: list[tuple[float, int]] | None, start_tokens: int, end_tokens: int) -> dict[int, int]:
    """Return {tokens of the run from which on a piece of a schedule applies: its value}."""
    starts = {}
    for tokens, value in pieces or []:
        unit = 1 if tokens >= 1 else end_tokens - start_tokens
        starts[start_tokens + round(tokens * unit)] = value
    return starts


def _count_end_tokens(train: "TrainConfig") -> dict[str, int]:
    """Return {name: the tokens of the run up to the end of the stage}."""
    stages = train.stages or {}
    ends = {}
    so_far = 0.0
    for name, stage in stages.items():
        so_far += float(stage.tokens or 0)
        ends[name] = round(so_far * (train.tokens or 1))
    if train.tokens is not None:
        ends[[*stages][-1]] = train.tokens  # The shares add up to 1 but for their rounding.
    return ends


def _build_phase_config(config: "RunConfig", name: str, piece: Piece) -> "RunConfig":
    """Return the config of a piece of a stage. The number of its steps is not yet known."""
    assert config.train.stages is not None
    stage = config.train.stages[name]
    if piece.batch_tokens is not None:
        stage = dataclasses.replace(stage, batch_size=None, batch_tokens=piece.batch_tokens)
    if piece.seq_len is not None:
        stage = dataclasses.replace(stage, seq_len=piece.seq_len)
    data: dict[str, Any] = {"seq_len": stage.seq_len, "weights": stage.weights}
    data["document_boundaries"] = stage.document_boundaries
    data = {key: value for key, value in data.items() if value is not None}
    train: dict[str, Any] = {"stages": None, "steps": 1, "tokens": None}
    if stage.batch_size is not None or stage.batch_tokens is not None:
        train |= {"batch_size": stage.batch_size, "batch_tokens": stage.batch_tokens}
    if stage.tbptt_length is not None:
        train["tbptt_length"] = stage.tbptt_length
    train["micro_batch_size"] = stage.micro_batch_size
    if stage.micro_batch_size is None and config.train.micro_batch_size is not None:
        tokens = config.train.micro_batch_size * config.data.seq_len
        train["micro_batch_size"] = max(1, tokens // (stage.seq_len or config.data.seq_len))
    try:
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, **data),
            train=dataclasses.replace(config.train, **train),
            optim=dataclasses.replace(config.optim, warmup_steps=0, warmup_tokens=None),
        )
    except ConfigError as error:
        raise ConfigError(
            f"In train.stages.{name}, whose keys and schedules replace those of data and train: {error}"
        ) from error
