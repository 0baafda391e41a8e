"""The options of evaluations: which checkpoint, which evaluators, and their settings."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from glalm.config.run import RunConfig, Weights
from glalm.config.strict import require

# The class of each evaluator, "module:class". A module is imported when its evaluator is asked for.
EVALUATORS = {
    "perplexity": "glalm.evals.perplexity:PerplexityEvaluator",
    "extrapolation": "glalm.evals.extrapolation:ExtrapolationEvaluator",
    "generate": "glalm.evals.generate:GenerateEvaluator",
    "needle": "glalm.evals.needle:NeedleEvaluator",
    "decode_speed": "glalm.evals.decode_speed:DecodeSpeedEvaluator",
    "paper_zero_shot": "glalm.evals.harness:PaperZeroShotEvaluator",
    "zero_shot": "glalm.evals.harness:HarnessEvaluator",
    "recall": "glalm.evals.harness:RecallEvaluator",
}

# How much of the text before it a token sees: all of it, because the state is handed from segment to segment; a sliding
# window of the training length; or the text since the last multiple of the training length.
Context = Literal["stateful", "sliding_window", "reset"]
Split = Literal["train", "validation", "test"]


@dataclass
class ExtrapolationConfig:
    """Perplexity by position. `extrapolation=paper` chooses the GLA paper's settings."""

    max_length: int = 4096  # tokens read of each text
    bucket: int | None = None  # positions in a bucket; null: half the training length
    # documents: each text is a document from its start. stream: a block of the documents end to end.
    text: Literal["documents", "stream"] = "documents"
    documents: int | None = 32  # the documents that fill most buckets, or blocks, at most; null: all
    split: Split = "test"  # the text's
    contexts: list[Context] = field(default_factory=lambda: ["stateful", "reset"])  # one curve each, the first solid

    def __post_init__(self):
        require_positive(self, "extrapolation", "max_length", "bucket", "documents")
        require(
            len(self.contexts) > 0 and len(self.contexts) == len(set(self.contexts)),
            f"extrapolation.contexts={self.contexts} must name one context or more, each once; write [stateful,reset]",
        )
        require(
            self.bucket is None or self.bucket <= self.max_length,
            f"extrapolation.bucket={self.bucket} is longer than extrapolation.max_length={self.max_length}",
        )


@dataclass
class GenerateConfig:
    """Sampled continuations of prompts."""

    tokens: int = 120  # new tokens in a continuation
    temperature: float = 0.8  # by which logits are divided before sampling
    top_p: float = 0.95  # sample from the likeliest tokens with this probability together
    prompts: list[str] | None = None  # null: the beginnings of two documents of the test split, or of text=FILE

    def __post_init__(self):
        require_positive(self, "generate", "tokens", "temperature")
        require(0 < self.top_p <= 1, "generate.top_p must lie in (0, 1]")


@dataclass
class NeedleConfig:
    """A number, stated once in a long text and asked for at its end, by the text's length and the number's depth."""

    lengths: list[int] | None = None  # tokens up to the question's end; null: 1, 2, 4 and 8 training lengths
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])  # part of the text before it
    samples: int = 20  # texts for each length and depth
    candidates: int = 10  # numbers among which the right one is ranked by likelihood
    split: Split = "test"  # the text's

    def __post_init__(self):
        require_positive(self, "needle", "samples")
        require(2 <= self.candidates <= 1000, f"needle.candidates must lie between 2 and 1000, not {self.candidates}")
        require(len(self.depths) > 0 and all(0 <= d <= 1 for d in self.depths), "needle.depths must lie in [0, 1]")
        require_lengths("needle", self.lengths)


@dataclass
class DecodeSpeedConfig:
    """Tokens a second when decoding, and the bytes of the state, by the number of tokens already read."""

    lengths: list[int] | None = None  # tokens; null: 1, 2, 4, 8 and 16 training lengths
    steps: int = 32  # tokens decoded in a timing
    repeats: int = 5  # timings, whose median counts

    def __post_init__(self):
        require_positive(self, "decode_speed", "steps", "repeats")
        require_lengths("decode_speed", self.lengths)


@dataclass
class HarnessConfig:
    """lm-evaluation-harness: evals=[paper_zero_shot], [recall], or [zero_shot] with its own list of tasks."""

    tasks: list[str] = field(default_factory=list)  # for zero_shot: the harness's names of tasks, groups and tags
    num_fewshot: int | None = None  # examples before each question; null: each task's own number, which is mostly 0
    limit: int | None = None  # evaluate the first questions of each task only; null: all
    max_length: int | None = None  # tokens read at once, the earliest dropped; null: the training length, or 2048
    stateful: bool = False  # wikitext and its like: read a document max_length at a time, from state to state
    batch_tokens: int | None = None  # tokens of a batch, padding included; null: 65536 on a GPU, 2048 elsewhere

    def __post_init__(self):
        require_positive(self, "harness", "limit", "max_length", "batch_tokens")
        require(self.num_fewshot is None or self.num_fewshot >= 0, "harness.num_fewshot must not be negative")


@dataclass
class EvalParallelConfig:
    """How the processes of torchrun divide an evaluation."""

    context: int = 1  # processes that share the tokens of each text, in perplexity and extrapolation

    def __post_init__(self):
        require_positive(self, "parallel", "context")


@dataclass
class TrainEvalsConfig:
    """Evaluators that training runs before the first step, every `every` steps and after the last one.

    Their results are logged as metrics of the run. They read the text of data.path. Processes share it as those of the
    run share sequences (parallel.context).
    """

    evals: list[str] = field(default_factory=list)  # names as for `glalm eval`; choose cheap settings below
    every: int = 1000  # steps
    weights: Weights = "current"  # average: the moving average that train.ema_decay keeps
    batch_size: int = 16  # sequences at once
    data_dir: str | None = None  # zero-shot tasks' own data, as for `glalm eval`
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    extrapolation: ExtrapolationConfig = field(default_factory=ExtrapolationConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)

    def __post_init__(self):
        require_evaluators("train_evals.evals", self.evals)
        require_positive(self, "train_evals", "every", "batch_size")


@dataclass
class TrainingRun(RunConfig):
    """Everything `glalm train` does: the training run, and the evaluators that run as it trains."""

    resume: str | None = None  # the folder of a run to continue, in place of name and runs_dir: runs/NAME
    train_evals: TrainEvalsConfig = field(default_factory=TrainEvalsConfig)

    def __post_init__(self):
        super().__post_init__()
        require(
            self.train_evals.weights == "current" or self.train.ema_decay is not None,
            "train_evals.weights=average evaluates the moving average of the weights, which the run does not have; "
            "write train.ema_decay=0.999, or train_evals.weights=current",
        )


@dataclass
class EvalConfig:
    """Everything `glalm eval` does: which checkpoint, which evaluators, their settings."""

    name: str = "demo"  # the run to evaluate
    runs_dir: str = "runs"  # the folder of all runs
    # latest or step_N of that run; or the folder of a checkpoint, of an exported model or of any transformers causal
    # language model; or such a model's name on the Hugging Face hub.
    checkpoint: str = "latest"
    weights: Weights = "current"  # average: the checkpoint's moving average of the weights (train.ema_decay)
    out: str | None = None  # the folder of eval/*.json and plots/; null: the run's, or else runs_dir/MODEL
    data_path: str | None = None  # a prepared folder; null: the one that the run was trained on
    text: str | None = None  # a file to read as it lies, in place of prepared data: .txt, .jsonl, .parquet, ...
    text_field: str | None = None  # the field of its rows that holds the text; null: that of the run's data, or "text"
    data_dir: str | None = None  # zero-shot tasks' own data, TASK/SPLIT.jsonl or .parquet; null: from the hub
    train_length: int | None = None  # tokens; null: the run's, or the model's max_position_embeddings
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 if the GPU supports it, else fp32
    mixers: list[str] = field(default_factory=list)  # mixers of your own code that the model has: package.module:Class
    force: bool = False  # run evaluators again that are up to date
    seed: int = 1  # of samples
    batch_size: int = 16  # sequences at once
    parallel: EvalParallelConfig = field(default_factory=EvalParallelConfig)
    evals: list[str] = field(default_factory=lambda: ["perplexity", "extrapolation", "generate"])  # in order
    extrapolation: ExtrapolationConfig = field(default_factory=ExtrapolationConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    decode_speed: DecodeSpeedConfig = field(default_factory=DecodeSpeedConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)

    def __post_init__(self):
        require_positive(self, "", "batch_size", "train_length")
        require(
            self.text is None or self.data_path is None,
            f"text={self.text} and data_path={self.data_path} are alternatives; remove one of them",
        )
        require(len(self.evals) > 0, f"evals is empty; write 'evals=[perplexity]', or any of {', '.join(EVALUATORS)}")
        require_evaluators("evals", self.evals)
        require(
            "zero_shot" not in self.evals or len(self.harness.tasks) > 0,
            "evals=[zero_shot] needs harness.tasks=[...], the harness's names; evals=[paper_zero_shot] has its own",
        )

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) / self.name


def require_positive(options: object, group: str, *names: str) -> None:
    """Raise ConfigError where an option is neither None nor positive."""
    for name in names:
        value = getattr(options, name)
        key = f"{group}.{name}" if group else name
        require(value is None or value > 0, f"{key} must be positive, not {value}")


def require_lengths(group: str, lengths: list[int] | None) -> None:
    """Raise ConfigError where a list of lengths is empty or one is not positive."""
    is_valid = lengths is None or (len(lengths) > 0 and min(lengths) > 0)
    require(is_valid, f"{group}.lengths must be positive; write for example [2048,4096]")


def require_evaluators(key: str, names: list[str]) -> None:
    """Raise ConfigError, with the nearest name, where no evaluator has one of the names."""
    for name in names:
        near = difflib.get_close_matches(name, EVALUATORS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        require(
            name in EVALUATORS,
            f"{key}: no evaluator is called {name}; {hint}There are {', '.join(EVALUATORS)}",
        )
