"""Evaluators that run while a model is trained: what they find are metrics, and training goes on as if nothing was.

They read a copy of the model, whole on every process whatever the training shards, so that nothing that training has
(its weights, compiled blocks, gradients) is touched; and what they draw at random is drawn from states of their own.
"""

import copy
import warnings
from collections.abc import Callable

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from glalm.config.run import RunConfig
from glalm.config.strict import RunError
from glalm.evals.eval_model import Subject, run_tokenizer
from glalm.evals.evaluator import Work, lacking
from glalm.evals.options import EvalConfig
from glalm.evals.randomness import undisturbed
from glalm.evals.result_files import read_json
from glalm.evals.runner import make_job
from glalm.model.decoder import GLALMForCausalLM
from glalm.train import checkpoint

Evaluate = Callable[[GLALMForCausalLM, str, Callable[[int], object]], dict[str, float]]


def during(config: RunConfig) -> Evaluate:
    """evaluate(model, precision, alive) -> {"extrapolation/2x": 1.02, ...}: config.during.evals on the model as it is.

    All processes of a run call it, and share the work. `alive` is called again and again meanwhile. Raises what an
    evaluator raises the first time; later, or where a checkpoint is gone on from, so that a run has hours behind it, a
    failure is a warning.
    """
    c = config.during
    resumed = config.train.resume_from or checkpoint.latest(config.folder / "checkpoints")
    proven = set(c.evals if resumed else ())
    settings = EvalConfig(
        name=config.name,
        runs_dir=config.runs_dir,
        data_path=config.data.path,
        data_dir=c.data_dir,
        seed=config.seed,
        batch_size=c.batch_size,
        evals=c.evals,
        extrapolation=c.extrapolation,
        needle=c.needle,
        harness=c.harness,
    )

    def evaluate(model: GLALMForCausalLM, precision: str, alive: Callable[[int], object]) -> dict[str, float]:
        found = {}
        with undisturbed(model.device):
            subject = as_subject(model, precision, config, settings)
            for name in c.evals:
                try:
                    numbers = run_one(name, subject, settings, alive)
                except Exception as error:
                    if name not in proven:
                        raise
                    warnings.warn(f"evaluator {name}: {type(error).__name__}: {error}", stacklevel=2)
                    continue
                proven.add(name)
                found |= {f"{name}/{key}": value for key, value in numbers.items() if value is not None}
        return found

    return evaluate


def run_one(name: str, subject: Subject, settings: EvalConfig, alive: Callable[[int], object]) -> dict[str, float]:
    here = distributed.is_initialized()
    work = Work(distributed.get_rank(), distributed.get_world_size()) if here else Work()
    work.advance = alive
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


def as_subject(model: GLALMForCausalLM, precision: str, config: RunConfig, settings: EvalConfig) -> Subject:
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
def copy_of(model: GLALMForCausalLM) -> GLALMForCausalLM:
    """The model with its parameters whole, on its device, in evaluation mode. Sharded, all processes must call it."""
    with model.device:  # where drawing its initial weights takes no time
        twin = GLALMForCausalLM(copy.deepcopy(model.config))
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        mine.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)
    return twin.eval()
