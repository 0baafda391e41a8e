"""Evaluates a checkpoint of a run: `python eval.py [KEY=VALUE ...]`, see `python eval.py --help`."""

from glalm.cli import hydra_entry
from glalm.evals.options import EvalConfig


def main(config: EvalConfig) -> int:
    from glalm.evals.runner import evaluate  # after the config is checked: torch takes seconds to import

    return evaluate(config)


if __name__ == "__main__":
    hydra_entry(main, EvalConfig, "eval")
