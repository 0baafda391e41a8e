"""The config of an evaluation: which checkpoint, which evaluators, their settings."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from glalm.config.run import RunConfig
from glalm.config.strict import require

# The evaluators by name, and the function(subject, config) that makes the Job of each: imported only when asked for.
EVALUATORS = {
    "perplexity": "glalm.evals.perplexity:job",
    "extrapolation": "glalm.evals.extrapolation:job",
    "generate": "glalm.evals.generate:job",
    "needle": "glalm.evals.needle:job",
    "decode_speed": "glalm.evals.decode_speed:job",
    "paper_zero_shot": "glalm.evals.harness:paper_zero_shot",
    "zero_shot": "glalm.evals.harness:zero_shot",
    "recall": "glalm.evals.harness:recall",
}

# How much of the text before it a token sees: all of it, because the state is handed from segment to segment; a sliding
# window of the training length; or the text since the last multiple of the training length.
Context = Literal["stateful", "sliding_window", "reset"]


@dataclass
class ExtrapolationConfig:
    """Perplexity by position. `extrapolation=paper` chooses the GLA paper's settings."""

    max_length: int = 4096  # tokens read of each text
    bucket: int | None = None  # positions a bucket; null: half the training length
    text: Literal["documents", "stream"] = "documents"  # from documents' starts; or blocks of the text end to end
    documents: int | None = 32  # documents (those that fill most buckets), or blocks, at most; null: all
    split: Literal["train", "validation", "test"] = "test"
    contexts: list[Context] = field(default_factory=lambda: ["stateful", "reset"])  # one curve each, the first solid

    def __post_init__(self):
        for name in ("max_length", "bucket", "documents"):
            value = getattr(self, name)
            require(value is None or value > 0, f"extrapolation.{name} must be positive, not {value}")
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

    tokens: int = 120  # new tokens a continuation
    temperature: float = 0.8
    top_p: float = 0.95
    prompts: list[str] = field(default_factory=lambda: ["def ", "class "])

    def __post_init__(self):
        require(self.temperature > 0, "generate.temperature must be positive")
        require(0 < self.top_p <= 1, "generate.top_p must lie in (0, 1]")
        require(self.tokens > 0, "generate.tokens must be positive")


@dataclass
class NeedleConfig:
    """A number told once in a long text and asked for at its end, by length and depth."""

    lengths: list[int] | None = None  # tokens up to the end of the question; null: 1, 2, 4 and 8 training lengths
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])  # parts of the text before it
    samples: int = 20  # texts a length and depth
    candidates: int = 10  # numbers among which the right one is ranked by likelihood
    split: Literal["train", "validation", "test"] = "test"  # of which the text is

    def __post_init__(self):
        require(self.samples > 0, f"needle.samples must be positive, not {self.samples}")
        require(2 <= self.candidates <= 1000, f"needle.candidates must lie between 2 and 1000, not {self.candidates}")
        require(len(self.depths) > 0 and all(0 <= d <= 1 for d in self.depths), "needle.depths must lie in [0, 1]")
        require(
            self.lengths is None or (len(self.lengths) > 0 and min(self.lengths) > 0),
            "needle.lengths must be positive; write for example [2048,4096]",
        )


@dataclass
class DecodeSpeedConfig:
    """Tokens a second when decoding, and the bytes of the state, by the number of tokens behind."""

    lengths: list[int] | None = None  # tokens; null: 1, 2, 4, 8 and 16 training lengths
    steps: int = 32  # tokens decoded for a timing
    repeats: int = 5  # timings, of which the median counts

    def __post_init__(self):
        require(self.steps > 0, f"decode_speed.steps must be positive, not {self.steps}")
        require(self.repeats > 0, f"decode_speed.repeats must be positive, not {self.repeats}")
        require(
            self.lengths is None or (len(self.lengths) > 0 and min(self.lengths) > 0),
            "decode_speed.lengths must be positive; write for example [2048,4096]",
        )


@dataclass
class HarnessConfig:
    """lm-evaluation-harness: evals=[paper_zero_shot], [recall], or [zero_shot] with its own list of tasks."""

    tasks: list[str] = field(default_factory=list)  # of zero_shot: the harness's names of tasks, groups and tags
    num_fewshot: int | None = None  # examples before each question; null: as each task has it, which is mostly 0
    limit: int | None = None  # the first so many questions of each task; null: all
    max_length: int | None = None  # tokens read at once, the earliest dropped; null: the training length, or 2048
    stateful: bool = False  # wikitext and its like: a document's state goes on from one max_length to the next
    batch_tokens: int | None = None  # tokens read at once, padding included; null: 65536 on a GPU, 2048 elsewhere

    def __post_init__(self):
        for name in ("limit", "max_length", "batch_tokens"):
            value = getattr(self, name)
            require(value is None or value > 0, f"harness.{name} must be positive, not {value}")
        require(self.num_fewshot is None or self.num_fewshot >= 0, "harness.num_fewshot must not be negative")


def check_evaluators(key: str, names: list[str]) -> None:
    for name in names:
        near = difflib.get_close_matches(name, EVALUATORS, n=1)
        require(
            name in EVALUATORS,
            f"{key}: no evaluator is called {name}"
            + (f"; did you mean {near[0]}? " if near else "; ")
            + f"There are {', '.join(EVALUATORS)}",
        )


@dataclass
class TrainEvalsConfig:
    """Evaluators that train.py runs before the first step, every `every` steps and after the last one.

    Their results are logged as metrics of the run. They read the text of data.path.
    """

    evals: list[str] = field(default_factory=list)  # as of eval.py: cheap ones, or made cheap by the keys below
    every: int = 1000  # steps
    batch_size: int = 16  # sequences at once
    data_dir: str | None = None  # zero-shot tasks' own data, as of eval.py
    extrapolation: ExtrapolationConfig = field(default_factory=ExtrapolationConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)

    def __post_init__(self):
        check_evaluators("train_evals.evals", self.evals)
        require(self.every > 0, f"train_evals.every must be positive, not {self.every}")
        require(self.batch_size > 0, f"train_evals.batch_size must be positive, not {self.batch_size}")


@dataclass
class TrainingRun(RunConfig):
    """Everything `python train.py` does: the training run, and the evaluators that run as it trains."""

    train_evals: TrainEvalsConfig = field(default_factory=TrainEvalsConfig)


@dataclass
class EvalConfig:
    """Everything `python eval.py` does: which checkpoint, which evaluators, their settings."""

    name: str = "demo"  # the run to evaluate
    runs_dir: str = "runs"
    # latest or step_N of that run; or else the folder of a checkpoint, of an exported model, of any transformers causal
    # language model, or such a model's name on the Hugging Face hub.
    checkpoint: str = "latest"
    out: str | None = None  # the folder of eval/*.json and plots/; null: the run's, else runs_dir/MODEL
    data_path: str | None = None  # a prepared folder; null: the one that the run was trained on
    data_dir: str | None = None  # zero-shot tasks' own data, TASK/SPLIT.jsonl or .parquet; null: from the hub
    train_length: int | None = None  # tokens; null: the run's, or the model's max_position_embeddings
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the GPU has it, else fp32
    force: bool = False  # run evaluators again that are finished
    seed: int = 1
    batch_size: int = 16  # sequences at once
    evals: list[str] = field(default_factory=lambda: ["perplexity", "extrapolation", "generate"])
    extrapolation: ExtrapolationConfig = field(default_factory=ExtrapolationConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    decode_speed: DecodeSpeedConfig = field(default_factory=DecodeSpeedConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)

    def __post_init__(self):
        require(self.batch_size > 0, f"batch_size must be positive, not {self.batch_size}")
        require(
            self.train_length is None or self.train_length > 0,
            f"train_length must be positive, not {self.train_length}",
        )
        require(len(self.evals) > 0, f"evals is empty; write evals=[perplexity], or any of {', '.join(EVALUATORS)}")
        check_evaluators("evals", self.evals)
        require(
            "zero_shot" not in self.evals or len(self.harness.tasks) > 0,
            "evals=[zero_shot] wants harness.tasks=[...], the harness's names; evals=[paper_zero_shot] has its own",
        )

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) / self.name
