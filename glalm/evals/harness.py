"""Tasks of lm-evaluation-harness (Gao et al., zenodo.org/records/12608602), scored in batches of our own."""

import dataclasses
import importlib.metadata
import logging
import math
import os
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import torch
from lm_eval import evaluator, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from transformers import StoppingCriteria

from glalm.config.strict import ConfigError, require
from glalm.data.tokenizer import Tokenizer
from glalm.evals import local_tasks
from glalm.evals.eval_model import Subject
from glalm.evals.evaluator import Job, Work
from glalm.evals.likelihood import Answer, batches, carried, log_likelihoods, padded
from glalm.evals.options import EvalConfig, HarnessConfig
from glalm.evals.published import PAPER, RECALL, paper_table
from glalm.evals.result_files import scores
from glalm.train.random_states import seeded

# Standard errors are resampled here, not in processes that the harness forks: these would inherit train.py's handler of
# SIGTERM, by which the harness ends them, and go on waiting, and it for them.
os.environ["DISABLE_MULTIPROC"] = "1"

# Those of the GLA paper's table, and four more that are often reported.
PAPER_TASKS = [*dict.fromkeys(task for task, _ in PAPER.values()), "copa", "openbookqa", "sciq", "boolq"]
RECALL_TASKS = [task for task, _ in RECALL.values()]
BOOTSTRAPS = 1000  # resamplings for the standard error of a metric that is no mean
SAMPLING = ("temperature", "top_p", "top_k")  # where nothing is drawn, transformers warns of them
DEFAULT_LENGTH = 2048  # where a model does not say, as in the harness


def paper_zero_shot(subject: Subject, config: EvalConfig) -> Job:
    return job("paper_zero_shot", PAPER_TASKS, subject, config)


def zero_shot(subject: Subject, config: EvalConfig) -> Job:
    return job("zero_shot", config.harness.tasks, subject, config)


def recall(subject: Subject, config: EvalConfig) -> Job:
    return job("recall", RECALL_TASKS, subject, config)


def job(name: str, tasks: list[str], subject: Subject, config: EvalConfig) -> Job:
    options, data_dir = config.harness, config.data_dir
    tokenizer = subject.need_tokenizer(name)
    length = options.max_length or subject.train_length or DEFAULT_LENGTH
    subject.need_length(length, "harness.max_length")
    require(
        tokenizer.vocab_size <= subject.vocab_size,
        f"evals=[{name}]: the tokenizer has {tokenizer.vocab_size} tokens, {subject.name} only {subject.vocab_size}",
    )
    require(
        not options.stateful or (subject.can_resume and subject.max_length is None),
        f"harness.stateful: {subject.name} cannot read on from a state without end; write harness.stateful=false",
    )
    require(data_dir is None or Path(data_dir).is_dir(), f"data_dir={data_dir}: there is no such folder")
    settings = dataclasses.asdict(options) | {
        "tasks": tasks,
        "max_length": length,
        "lm_eval": importlib.metadata.version("lm-eval"),
        "data": {task: local_tasks.checksums(Path(data_dir), task) if data_dir else "hub" for task in tasks},
    }
    del settings["batch_tokens"]  # which changes no result
    return Job(
        settings=settings,
        run=lambda work: run_tasks(tasks, HarnessLM(subject, tokenizer, options, length, work), data_dir),
        total=len(tasks),
        unit="tasks",
        summary=summary,
        metrics=numbers,
    )


def run_tasks(tasks: list[str], lm: "HarnessLM", data_dir: str | None) -> dict:
    """{"tasks": {name: its metrics}, "missing": {name: why}}, and where all of it is there, the paper's table."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    found, missing = {}, {}
    with TemporaryDirectory() as folder:
        manager = local_tasks.task_manager(data_dir, Path(folder))
        for name in tasks:
            try:
                found |= lm.work.part(name, lambda name=name: run_task(name, lm, manager, data_dir))
            except ConfigError as error:
                missing[name] = str(error)
    results = {"tasks": found, "missing": missing}
    if all(task in found for task, _ in PAPER.values()):
        results["table"] = paper_table(found)
    return results


def run_task(name: str, lm: "HarnessLM", manager: TaskManager, data_dir: str | None) -> dict:
    """{task: its metrics} of a task, a group or a tag. Raises ConfigError, on all processes, if it cannot be had."""
    local_tasks.check(manager, name, data_dir)
    loaded, problem = None, None
    try:
        loaded = manager.load([name])
    except Exception as error:  # of the hub, of the data set's reader, of the task's own code
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if any(problems := lm.work.gather([problem])):
        where = f"in data_dir={data_dir}" if data_dir else "from the hub (with data_dir=FOLDER it is read from there)"
        raise ConfigError(f"its data cannot be read {where}: {next(filter(None, problems))}")
    for task in loaded["tasks"].values():
        set_fewshot(task, lm.options.num_fewshot)
    # Every process builds all requests and shares out only the model's work, so that there is one harness to the eye.
    limit = lm.options.limit
    # What a task samples does not depend on those before it, which a killed evaluator does not run again.
    with seeded(DEFAULT_OTHER_SEED + lm.work.rank, lm.subject.device):
        found = evaluator.evaluate(lm, loaded, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    return {task: metrics(task, found) for task in found["results"]}


def set_fewshot(task: Task, wanted: int | None) -> None:
    """As the harness's command line does: a task that has none by its own config keeps none."""
    own = task.get_config("num_fewshot")
    if wanted is not None and own != 0:
        task.set_config(key="num_fewshot", value=wanted)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def metrics(task: str, found: dict) -> dict:
    """What the harness found on a task: {"acc": ..., "acc_stderr": ..., "samples": ..., "num_fewshot", "version"}."""
    values = {}
    for key, value in found["results"][task].items():
        name, _, kind = key.partition(",")
        if isinstance(value, (int, float)) and kind:
            metric, error, _ = name.partition("_stderr")
            label = metric if kind == "none" else f"{metric} ({kind})"
            values[label + error] = float(value) if math.isfinite(value) else None
    return values | {
        "samples": found.get("n-samples", {}).get(task, {}).get("effective"),
        "num_fewshot": found.get("n-shot", {}).get(task),
        "version": found.get("versions", {}).get(task),
    }


def numbers(results: dict) -> dict[str, float]:
    """{"piqa/acc": ...}: every metric of every task, without its error."""
    return {f"{task}/{name}": x for task, found in results["tasks"].items() for name, x in scores(found).items()}


def summary(results: dict) -> list[str]:
    lines = []
    for task, found in results["tasks"].items():
        shown = [
            f"{name} {value:.4g}" + (f" ± {found[error]:.2g}" if (error := f"{name}_stderr") in found else "")
            for name, value in scores(found).items()
        ]
        lines.append(f"{task}: {', '.join(shown)}")
    lines += [f"{task}: not evaluated: {why}" for task, why in results["missing"].items()]
    if "table" in results:
        lines.append(
            "the paper's table: " + ", ".join(f"{k} {v:.2f}" for k, v in results["table"].items() if v is not None)
        )
    return lines


# ---------------------------------------------------------------------------------------------- the harness's model


class HarnessLM(TemplateLM):
    """A Subject as the harness sees it: one process, whatever their number; they share each call's requests.

    A text begins with the ids that the model's documents begin with. Those before a text are never scored.
    """

    def __init__(self, subject: Subject, tokenizer: Tokenizer, options: HarnessConfig, max_length: int, work: Work):
        super().__init__()
        self.subject, self.codec, self.options = subject, tokenizer, options
        self.max_length, self.work = max_length, work
        self.batch_tokens = options.batch_tokens or (65536 if subject.device.type == "cuda" else 2048)
        self._ids = lru_cache(maxsize=256)(lambda text: tuple(tokenizer.encode(text)))  # a question's choices share it

    @property
    def eot_token_id(self) -> int:
        return self.codec.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.codec.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        start = () if add_special_tokens is False else self.subject.start
        return [*start, *self._ids(string)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        together: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            together.setdefault(request.args[0], []).append(i)
        order = sorted(together.values(), key=lambda ids: -len(requests[ids[0]].args[0]))
        mine = self.work.mine(order)
        found = iter(super().loglikelihood([requests[i] for ids in mine for i in ids], disable_tqdm=True))
        return _in_order(order, self.work.gather([[next(found) for _ in ids] for ids in mine]))

    def _loglikelihood_tokens(self, requests: list, **_) -> list[Answer]:
        # Of any process: every one has to raise, or the others would wait for it.
        longest = max(self.work.gather([max((len(c) for _, _, c in requests), default=0)]))
        require(
            longest <= self.max_length,
            f"harness.max_length={self.max_length} is less than the {longest} tokens of an answer to score; "
            f"write harness.max_length={longest} or more",
        )
        contexts: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, _) in enumerate(requests):
            contexts.setdefault(tuple(context), []).append(i)
        groups = [(list(context), [requests[i][2] for i in ids]) for context, ids in contexts.items()]
        return _in_order(contexts.values(), self._score(groups))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        documents = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        if self.options.stateful:
            mine = self.work.mine(documents)
            return self.work.gather(
                carried(self.subject, mine, self.prefix_token_id, self.max_length, self.batch_tokens)
            )
        windows = [(i, window) for i, document in enumerate(documents) for window in self._windows(document)]
        mine = self.work.mine(windows)
        found = self.work.gather([answers[0][0] for answers in self._score([(c, [k]) for _, (c, k) in mine])])
        totals = [0.0] * len(documents)
        for (i, _), value in zip(windows, found, strict=True):
            totals[i] += value
        return totals

    def _windows(self, document: list[int]):
        """The harness's own: each token predicted once, each window after the first given one token before it."""
        windows = utils.get_rolling_token_windows(document, self.prefix_token_id, self.max_length, context_len=1)
        return map(utils.make_disjoint_window, windows)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As the harness asks: up to a stop string, the end of the document or max_gen_toks tokens."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].args[0]))
        mine = self.work.mine(order)
        alike = {repr(r.args[1]): normalize_gen_kwargs(r.args[1], 256) for r in requests}
        most = max((options["max_gen_toks"] for options in alike.values()), default=0)
        require(  # of all requests: every process has to raise, or the others would wait for it
            most < self.max_length,
            f"harness.max_length={self.max_length} leaves no room before the {most} tokens that a task generates; "
            f"write harness.max_length={2 * most} or more",
        )
        texts = {}
        for kind, options in alike.items():
            ids, new = [i for i in mine if repr(requests[i].args[1]) == kind], options["max_gen_toks"]
            contexts = {i: self.tok_encode(requests[i].args[0])[new - self.max_length :] for i in ids}
            for batch in batches(ids, [len(contexts[i]) + new for i in ids], self.batch_tokens):
                texts |= zip(batch, self._generate([contexts[i] for i in batch], **options), strict=True)
                self.work.advance(len(batch) / (len(mine) * self.work.world))
        found = dict(zip(order, self.work.gather([texts[i] for i in mine]), strict=True))
        return [found[i] for i in range(len(requests))]

    def _generate(
        self, contexts: list[list[int]], max_gen_toks: int, until: list[str], do_sample: bool, **options
    ) -> list[str]:
        until = [text for text in until if text]
        input_ids = padded(contexts, self.subject.device, left=True)
        output = self.subject.model.generate(
            input_ids,
            attention_mask=padded([[1] * len(ids) for ids in contexts], self.subject.device, left=True),
            max_new_tokens=max_gen_toks,
            do_sample=do_sample,
            eos_token_id=self.eot_token_id,
            pad_token_id=self.eot_token_id,
            stopping_criteria=[UntilText(lambda ids: self._text(ids, input_ids.shape[1]), until)],
            **(options if do_sample else {k: v for k, v in options.items() if k not in SAMPLING}),
        )
        texts = (self._text(row, input_ids.shape[1]) for row in output)
        return [postprocess_generated_text(text, until, think_end_token=None) for text in texts]

    def _text(self, ids: torch.Tensor, start: int) -> str:
        """What ids [T] from `start` on add to the few before: a tokenizer may drop a text's first space."""
        before = ids[max(0, start - 4) : start].tolist()
        after = ids[start:].tolist()
        if self.eot_token_id in after:
            after = after[: after.index(self.eot_token_id)]
        return self.codec.decode(before + after)[len(self.codec.decode(before)) :]

    def _score(self, groups: list) -> list[list[Answer]]:
        total = sum(len(continuations) for _, continuations in groups) * self.work.world

        def advance(scored: int) -> None:  # a task is one unit
            self.work.advance(scored / total)

        return log_likelihoods(self.subject, groups, self.max_length, self.batch_tokens, advance)


class UntilText(StoppingCriteria):
    """Ends each row whose continuation holds one of the texts."""

    def __init__(self, text_of, until: list[str]):
        self.text_of, self.until = text_of, until

    def __call__(self, input_ids: torch.Tensor, scores, **_) -> torch.Tensor:
        ended = [any(stop in self.text_of(row) for stop in self.until) for row in input_ids]
        return torch.tensor(ended, device=input_ids.device)


def _in_order(places, found: list[list]) -> list:
    """found: for each of the groups `places` of positions its results. All results, by position."""
    results: list = [None] * sum(map(len, found))
    for ids, values in zip(places, found, strict=True):
        for i, value in zip(ids, values, strict=True):
            results[i] = value
    return results
