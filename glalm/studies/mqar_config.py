"""The config of the recall experiment, `python scripts/mqar.py`."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from glalm.config.strict import require
from glalm.model.config import ModelConfig
from glalm.model.mixers import MIXERS

# No model depends on these.
SWEEP = ("folder", "workers", "cuda_graph", "mixers", "lengths", "pairs", "widths", "learning_rates")


@dataclass
class RecallModel(ModelConfig):
    """Two layers of a mixer alone, without SwiGLU, its two heads, and one matrix for embeddings and head."""

    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_heads: int = 2
    intermediate_size: int | None = 0
    tie_word_embeddings: bool = True


@dataclass
class MQARConfig:
    """Multi-query associative recall as in Zoology (arXiv 2312.04927, figure 2 and appendix E): every mixer is trained
    at every length, width and learning rate. The defaults are its settings, but for the mixers.
    """

    # One JSON a trained model, in eval/, and what is in training, in partial/: the same command again goes on.
    folder: str = "runs/mqar"
    # One for both layers, or one each: gla+attention.
    mixers: list[str] = field(default_factory=lambda: ["attention", "gla", "mamba", "retention", "deltanet"])
    lengths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    pairs: list[int] = field(default_factory=lambda: [4, 8, 16, 64])  # keys with a value, of each length
    widths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    # logspace(-4, -2, 4), the likeliest first: what one of them solves, to stop_at, is not trained at the others
    learning_rates: list[float] = field(default_factory=lambda: [2.15e-3, 4.64e-4, 1e-2, 1e-4])
    vocab_size: int = 8192  # keys are the lower half, values the upper
    power: float = 0.01  # of the gap between a key's two places: p(gap) ~ gap^(power - 1); 1: uniform
    filler: Literal["zero", "random"] = "zero"  # the tokens that are no key or value
    train_examples: int = 100_000
    test_examples: int = 3_000
    epochs: int = 64
    batch_size: int = 512  # sequences, at most
    batch_tokens: int = 65_536  # at most: longer sequences make smaller batches
    stop_at: float = 0.99  # test accuracy at which training ends
    weight_decay: float = 0.1
    seed: int = 1
    workers: int = 1  # models trained at once, over all GPUs: these models are far too small to fill one
    cuda_graph: bool = True  # on a GPU, a step is one CUDA graph; false for a mixer whose step waits for the GPU
    model: RecallModel = field(default_factory=RecallModel)  # its mixer, vocab_size and hidden_size are the sweep's

    def __post_init__(self):
        require(
            len(self.lengths) == len(self.pairs),
            f"lengths={self.lengths} and pairs={self.pairs} must be as many: each length has its number of pairs",
        )
        for length, pairs in zip(self.lengths, self.pairs, strict=True):
            require(
                pairs > 0 and length % 2 == 0 and 4 * pairs <= length,
                f"lengths, pairs: {length} tokens, an even number, must hold four for each of {pairs} pairs",
            )
        require(
            self.vocab_size >= 2 * max(self.pairs) + 2,
            f"vocab_size={self.vocab_size} has too few keys for {max(self.pairs)} pairs",
        )
        for mixer in self.mixers:
            require(
                all(layer in MIXERS for layer in mixer.split("+")),
                f"mixers: {mixer} is none of {', '.join(MIXERS)}, nor one for each layer, as gla+attention",
            )
        for name in ("mixers", "lengths", "widths", "learning_rates"):
            require(len(getattr(self, name)) > 0, f"{name} is empty")
        shapes, rates = list(zip(self.lengths, self.pairs, strict=True)), [f"{lr:g}" for lr in self.learning_rates]
        axes = {"mixers": self.mixers, "lengths, pairs": shapes, "widths": self.widths, "learning_rates": rates}
        for name, values in axes.items():  # which a model's files are called by
            require(len(set(values)) == len(values), f"{name}: {values} has one twice")
        for name in ("train_examples", "test_examples", "epochs", "batch_size", "batch_tokens", "power", "workers"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")

    def settings(self) -> dict:
        """What every model of the sweep depends on."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in SWEEP}
