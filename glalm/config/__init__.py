"""What a run is made of: the dataclasses behind configs/, their checks, and what makes two runs the same.

Hydra composes the YAML files under configs/ into one tree; `build` (glalm/strict.py) turns that into these dataclasses.
An impossible combination is a ConfigError that says what to write instead. Nothing here imports torch, so a wrong
config fails within a second.
"""

from glalm.config.evals import EvalConfig, ExtrapolationConfig, SampleConfig
from glalm.config.identity import MAY_CHANGE, compare, flatten, identity
from glalm.config.model import MIXERS, ModelConfig
from glalm.config.run import DataConfig, OptimConfig, RunConfig, TrackConfig, TrainConfig

__all__ = [
    "MAY_CHANGE",
    "MIXERS",
    "DataConfig",
    "EvalConfig",
    "ExtrapolationConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "SampleConfig",
    "TrackConfig",
    "TrainConfig",
    "compare",
    "flatten",
    "identity",
]
