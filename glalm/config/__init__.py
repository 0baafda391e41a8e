"""What a run is made of: the dataclasses behind configs/, their checks, and what makes two runs the same.

Hydra composes the YAML files under configs/ into one tree; `build` (glalm/strict.py) turns that into these dataclasses.
An impossible combination is a ConfigError that says what to write instead. Nothing here imports torch, so a wrong
config fails within a second.
"""

from glalm.config.evals import (
    EVALUATORS,
    DecodeSpeedConfig,
    DuringConfig,
    EvalConfig,
    ExtrapolationConfig,
    GenerateConfig,
    HarnessConfig,
    NeedleConfig,
)
from glalm.config.identity import MAY_CHANGE, compare, flatten, identity
from glalm.config.model import MIXERS, ModelConfig
from glalm.config.parallel import ParallelConfig
from glalm.config.reliability import CheckpointConfig, GuardConfig
from glalm.config.run import DATA_RECORD, DataConfig, OptimConfig, RunConfig, TrackConfig, TrainConfig

__all__ = [
    "DATA_RECORD",
    "EVALUATORS",
    "MAY_CHANGE",
    "MIXERS",
    "CheckpointConfig",
    "DataConfig",
    "DecodeSpeedConfig",
    "DuringConfig",
    "EvalConfig",
    "ExtrapolationConfig",
    "GenerateConfig",
    "GuardConfig",
    "HarnessConfig",
    "ModelConfig",
    "NeedleConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "TrackConfig",
    "TrainConfig",
    "compare",
    "flatten",
    "identity",
]
