"""Train and evaluate a language model: `glalm train` and `glalm eval`, with [GROUP=CHOICE ...] [KEY=VALUE ...].

What imports transformers, which takes seconds, is imported only once the config has been checked.
"""

import atexit
import math

from glalm.cli import hydra_entry, job_overrides
from glalm.config.saved_run import RUN_KEYS, complete_from_run, name_sweep_run, refuse_unknown_name
from glalm.config.strict import ConfigError, build_dataclass
from glalm.evals.options import EvalConfig, TrainingRun


def train() -> None:
    """Run `glalm train`; see `glalm train --help`."""
    hydra_entry(run_training, TrainingRun, "train", find_run, final_validation_loss)


def find_run(tree: dict, overrides: list[str], swept: list[str]) -> dict:
    """Return the composed config with the name of a sweep's run, and with what the run's run.json has."""
    build_dataclass(TrainingRun, {key: tree[key] for key in RUN_KEYS})  # This refuses values of a wrong type.
    refuse_unknown_name(tree, overrides)
    return complete_from_run(name_sweep_run(tree, overrides, swept), overrides)


def final_validation_loss(config: TrainingRun) -> float | None:
    """Return the validation loss after the last step, infinity if it was not finite, or None for a dry run."""
    from glalm.train.metrics import read_metrics

    rows, _ = read_metrics(config.folder / "metrics.jsonl")
    return rows[-1].get("val_loss", math.inf) if rows and not config.train.dry_run else None


def run_training(config: TrainingRun) -> int:
    """Train, and return 0 or the number of the signal that stopped the run."""
    from glalm.train import trainer
    from glalm.train.estimate import dry_run
    from glalm.train.parallel import leave_process_group

    if config.train.dry_run:
        # A path that the user typed is meant. The default of a preset may be planned with before there is any data.
        names_data = any(override.lstrip("+").startswith("data.path=") for override in job_overrides())
        return dry_run(config, requires_data=names_data)
    evaluator = None
    if config.train_evals.evals:
        from glalm.evals.in_training import make_evaluator

        evaluator = make_evaluator(config)
    try:
        signum = trainer.train(config, evaluator)
    except ConfigError:
        # All processes raise it, before the first collective of their GPUs, so none can block the others here.
        leave_process_group()
        raise
    # Not before the exit, because the next run of --multirun uses the same processes.
    atexit.register(leave_process_group)
    return signum


def evaluate() -> None:
    """Run `glalm eval`; see `glalm eval --help`."""
    hydra_entry(run_evaluation, EvalConfig, "eval")


def run_evaluation(config: EvalConfig) -> int:
    """Evaluate, and return 0."""
    from glalm.evals import runner
    from glalm.train.parallel import leave_process_group

    runner.evaluate(config)
    atexit.register(leave_process_group)
    return 0
