"""Evaluate models, and train a run that evaluates on the way, in every process that torchrun starts.

sharing_runs.py TREES.json. TREES.json: {"eval": trees of EvalConfigs, "train": trees of TrainingRuns}.
"""

import json
import sys
from pathlib import Path

from glalm.config.strict import build_dataclass
from glalm.evals.in_training import make_evaluator
from glalm.evals.options import EvalConfig, TrainingRun
from glalm.evals.runner import evaluate
from glalm.train.parallel import leave_process_group
from glalm.train.trainer import train

if __name__ == "__main__":
    trees = json.loads(Path(sys.argv[1]).read_text())
    for tree in trees["eval"]:
        evaluate(build_dataclass(EvalConfig, tree))
    for tree in trees["train"]:
        config = build_dataclass(TrainingRun, tree)
        train(config, make_evaluator(config))
    leave_process_group()
