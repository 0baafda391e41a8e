"""Run evaluators while a model trains, without any effect on the training.

The evaluators read a copy of the model, so that its weights, compiled blocks and gradients are untouched, and the
states of the random number generators are restored: a run with evaluators ends with the same weights as one without.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields

import torch
from torch.distributed.tensor import DTensor

from glalm.config.strict import ConfigError, RunError
from glalm.evals.eval_model import EvalModel
from glalm.evals.evaluator import EvalContext, missing_tasks
from glalm.evals.inputs import load_run_tokenizer
from glalm.evals.options import EvalConfig, EvalParallelConfig, TrainingRun
from glalm.evals.result_files import read_json
from glalm.evals.runner import build_evaluator
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.kernels.context_parallel import ContextShard
from glalm.model.decoder import CausalLM
from glalm.train.checkpoint import latest_checkpoint
from glalm.train.random_states import preserve_random_states
from glalm.train.state import TrainState
from glalm.train.trainer import Evaluate, LogText


def make_evaluator(config: TrainingRun) -> Evaluate:
    """Return the function by which the training loop runs `config.train_evals`.

    It evaluates every `train_evals.every` steps and after the last step, and returns metrics such as
    {"extrapolation/2x": 1.02}, or of the average of the weights, {"average/extrapolation/2x": 1.01}. An evaluator that
    fails before it has succeeded once raises, so that a wrong setting stops a run at its start. Later, or in a resumed
    run, hours of training are at stake: a failure is only a warning.
    """
    options = config.train_evals
    eval_config = build_eval_config(config)
    resumed = config.train.resume_from or latest_checkpoint(config.folder / "checkpoints")
    already_succeeded = set(options.evals if resumed else ())
    prefix = "average/" if options.weights == "average" else ""

    def evaluate(
        state: TrainState,
        precision: str,
        heartbeat: Callable[[float], object],
        log_text: LogText,
        shard: ContextShard | None = None,
    ) -> dict[str, float]:
        step = state.step
        if step % options.every != 0 and step != config.steps:
            return {}
        metrics = {}
        with preserve_random_states(next(state.model.parameters()).device):
            # TrainingRun has checked that the state has an average if it is evaluated.
            with state.average.swapped() if options.weights == "average" else nullcontext():
                eval_model = copy_for_evaluation(state.model, precision, config, eval_config)
            for name in options.evals:
                try:
                    values, text = run_evaluator(name, eval_model, eval_config, heartbeat, shard)
                except Exception as error:
                    if name not in already_succeeded:
                        if isinstance(error, ConfigError):  # The message has an eval's keys.
                            raise ConfigError(f"In train_evals: {error}") from error
                        raise
                    warnings.warn(f"evaluator {name}: {type(error).__name__}: {error}", stacklevel=2)
                    continue
                already_succeeded.add(name)
                log_text(prefix + name, text, step)
                metrics |= {f"{prefix}{name}/{key}": value for key, value in values.items() if value is not None}
        return metrics

    return evaluate


def build_eval_config(config: TrainingRun) -> EvalConfig:
    """Return the config by which `glalm eval` would run the evaluators of `config.train_evals` on the run."""
    options = config.train_evals
    shared = {field.name: getattr(options, field.name) for field in fields(options) if field.name != "every"}
    return EvalConfig(
        name=config.name,
        runs_dir=config.runs_dir,
        data_path=config.data.path,
        seed=config.seed,
        parallel=EvalParallelConfig(config.parallel.context),
        **shared,
    )


def run_evaluator(
    name: str,
    model: EvalModel,
    config: EvalConfig,
    heartbeat: Callable[[float], object],
    shard: ContextShard | None = None,
) -> tuple[dict[str, float | None], str]:
    """Return the metrics and the summary of one evaluator.

    All ranks call it; where it fails on one of them, it raises on all.
    """
    context = EvalContext(shard)
    context.advance = heartbeat
    with context.raise_on_all_ranks():
        evaluator = build_evaluator(name, model, config)
        if not evaluator.shares_texts:
            context.shard = None
        with model.autocast():
            results = evaluator.run(context)
        if missing := missing_tasks(results):
            raise RunError("; ".join(f"{task}: {reason}" for task, reason in missing.items()))
    return evaluator.metrics(results), "\n".join(evaluator.summarize(results))


def copy_for_evaluation(model: CausalLM, precision: str, config: TrainingRun, eval_config: EvalConfig) -> EvalModel:
    """Return a copy of the model as evaluators see it. All ranks call it where parameters are sharded."""
    return EvalModel(
        causal_lm=copy_model(model),
        weights=eval_config.weights,
        name=config.name,
        tokenizer=load_run_tokenizer(eval_config, config),
        train_length=config.data.seq_len,
        precision=precision,
        run_config=config,
        output_folder=config.folder,
        data_manifest=read_json(config.data_record),
    )


@torch.no_grad()
def copy_model(model: CausalLM) -> GLALMForCausalLM:
    """Return a copy for transformers in evaluation mode, on the same device.

    All ranks call it where parameters are sharded.
    """
    with next(model.parameters()).device:  # The initial weights, overwritten below, are drawn faster on a GPU.
        twin = GLALMForCausalLM(GLALMConfig.from_model_config(model.config))
    for target, source in zip(twin.parameters(), model.parameters(), strict=True):
        target.copy_(source.full_tensor() if isinstance(source, DTensor) else source)
    return twin.eval()
