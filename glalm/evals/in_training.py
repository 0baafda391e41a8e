"""Run evaluators while a model trains, without any effect on the training.

The evaluators read a copy of the model, so that its weights, compiled blocks and gradients are untouched, and the
states of the random number generators are restored: a run with evaluators ends with the same weights as one without.
"""

import warnings
from collections.abc import Callable

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from glalm.config.strict import RunError
from glalm.evals.eval_model import Subject, run_tokenizer
from glalm.evals.evaluator import Work, lacking
from glalm.evals.options import EvalConfig, TrainingRun
from glalm.evals.result_files import read_json
from glalm.evals.runner import make_job
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.model.decoder import CausalLM
from glalm.train.checkpoint import latest_checkpoint
from glalm.train.random_states import preserve_random_states
from glalm.train.trainer import Evaluate


def make_evaluator(config: TrainingRun) -> Evaluate:
    """Return the function by which the training loop runs `config.train_evals`.

    It evaluates every `train_evals.every` steps and after the last step, and returns metrics such as
    {"extrapolation/2x": 1.02}. An evaluator that fails before it has succeeded once raises, so that a wrong setting
    stops a run at its start. Later, or in a resumed run, hours of training are at stake: a failure is only a warning.
    """
    options = config.train_evals
    resumed = config.train.resume_from or latest_checkpoint(config.folder / "checkpoints")
    already_succeeded = set(options.evals if resumed else ())
    settings = EvalConfig(
        name=config.name,
        runs_dir=config.runs_dir,
        data_path=config.data.path,
        data_dir=options.data_dir,
        seed=config.seed,
        batch_size=options.batch_size,
        evals=options.evals,
        extrapolation=options.extrapolation,
        needle=options.needle,
        harness=options.harness,
    )

    def evaluate(model: CausalLM, step: int, precision: str, heartbeat: Callable[[int], object]) -> dict[str, float]:
        if step % options.every != 0 and step != config.steps:
            return {}
        metrics = {}
        with preserve_random_states(next(model.parameters()).device):
            subject = as_subject(model, precision, config, settings)
            for name in options.evals:
                try:
                    found = run_one(name, subject, settings, heartbeat)
                except Exception as error:
                    if name not in already_succeeded:
                        raise
                    warnings.warn(f"evaluator {name}: {type(error).__name__}: {error}", stacklevel=2)
                    continue
                already_succeeded.add(name)
                metrics |= {f"{name}/{key}": value for key, value in found.items() if value is not None}
        return metrics

    return evaluate


def run_one(name: str, subject: Subject, settings: EvalConfig, heartbeat: Callable[[int], object]) -> dict[str, float]:
    """Return the metrics of one evaluator. All ranks call it; when it fails on one of them, it raises on all."""
    here = distributed.is_initialized()
    work = Work(distributed.get_rank(), distributed.get_world_size()) if here else Work()
    work.advance = heartbeat
    try:
        job = make_job(name, subject, settings)
        with subject.autocast():
            results = job.run(work)
        if missing := lacking(results):
            raise RunError("; ".join(f"{what}: {why}" for what, why in missing.items()))
        work.agree()
    except Exception as error:
        work.fail(error)
        raise
    return job.metrics(results)


def as_subject(model: CausalLM, precision: str, config: TrainingRun, settings: EvalConfig) -> Subject:
    """Return a copy of `model` as evaluators see it."""
    return Subject(
        model=copy_of(model),
        name=config.name,
        tokenizer=run_tokenizer(settings, config),
        train_length=config.data.seq_len,
        precision=precision,
        run=config,
        folder=config.folder,
        data_manifest=read_json(config.data_record),
    )


@torch.no_grad()
def copy_of(model: CausalLM) -> GLALMForCausalLM:
    """Return a copy of the model as transformers has it, in evaluation mode, on its device.

    All ranks call it where parameters are sharded.
    """
    with next(model.parameters()).device:  # The initial weights, overwritten below, are drawn faster on a GPU.
        twin = GLALMForCausalLM(GLALMConfig.from_model_config(model.config))
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        mine.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)
    return twin.eval()
