"""Evaluate a checkpoint of a run: `glalm eval [KEY=VALUE ...]`, see `glalm eval --help`."""

import atexit

from glalm.cli import hydra_entry
from glalm.evals.options import EvalConfig


def main() -> None:
    hydra_entry(run_evaluation, EvalConfig, "eval")


def run_evaluation(config: EvalConfig) -> int:
    # Import torch, which takes seconds, only after the config has been checked.
    from glalm.evals.runner import evaluate
    from glalm.train.parallel import leave_process_group

    status = evaluate(config)
    atexit.register(leave_process_group)
    return status
