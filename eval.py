"""Evaluate a checkpoint of a run: `python eval.py [KEY=VALUE ...]`, see `python eval.py --help`."""

from glalm.cli import hydra_entry
from glalm.evals.options import EvalConfig


def main(config: EvalConfig) -> int:
    # Import torch, which takes seconds, only after the config has been checked.
    from glalm.evals.runner import evaluate

    return evaluate(config)


if __name__ == "__main__":
    hydra_entry(main, EvalConfig, "eval")
