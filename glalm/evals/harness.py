"""Tasks of lm-evaluation-harness (Gao et al., zenodo.org/records/12608602), scored in our own batches."""

import dataclasses
import importlib.metadata
import logging
import math
import os
from functools import lru_cache, partial
from itertools import chain
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

from glalm.config.strict import ConfigError, RunError, require
from glalm.evals import local_tasks
from glalm.evals.centered import score_answers, summarize_tasks
from glalm.evals.eval_model import EvalModel
from glalm.evals.evaluator import EvalContext, Evaluator
from glalm.evals.likelihood import Answer, Choices, make_batches, pad_rows, score_choices, score_documents
from glalm.evals.options import EvalConfig, HarnessConfig
from glalm.evals.published import PAPER, RECALL, paper_table
from glalm.evals.result_files import select_scores
from glalm.train.random_states import seeded

# Standard errors must be bootstrapped in this process. lm-eval would fork workers and end them by SIGTERM; forked from
# training, they would inherit its signal handler, ignore the signal, and wait forever, as would lm-eval.
os.environ["DISABLE_MULTIPROC"] = "1"

# The tasks of the GLA paper's table, and four more that are often reported.
PAPER_TASKS = [*dict.fromkeys(task for task, _ in PAPER.values()), "copa", "openbookqa", "sciq", "boolq"]
RECALL_TASKS = [task for task, _ in RECALL.values()]
BOOTSTRAP_ITERATIONS = 1000  # for the standard error of a metric that is not a mean
SAMPLING_OPTIONS = ("temperature", "top_p", "top_k")  # transformers warns of them where nothing is sampled
DEFAULT_MAX_LENGTH = 2048  # tokens; the harness's default


class HarnessEvaluator(Evaluator):
    """Scores of a list of the harness's tasks, groups and tags."""

    name = "zero_shot"
    fixed_tasks: list[str] | None = None  # None: those of harness.tasks
    unit = "tasks"

    def __init__(self, model: EvalModel, config: EvalConfig):
        super().__init__(model, config)
        options = config.harness
        data_dir = config.data_dir
        tokenizer = model.require_tokenizer(self.name)
        max_length = options.max_length or model.train_length or DEFAULT_MAX_LENGTH
        model.require_length(max_length, "harness.max_length")
        require(
            tokenizer.vocab_size <= model.vocab_size,
            f"evals=[{self.name}]: the tokenizer has {tokenizer.vocab_size} tokens, {model.name} only "
            f"{model.vocab_size}",
        )
        require(
            not options.stateful or (model.accepts_state and model.max_length is None),
            f"harness.stateful: {model.name} cannot read a text of any length in parts; write harness.stateful=false",
        )
        require(data_dir is None or Path(data_dir).is_dir(), f"data_dir={data_dir}: there is no such folder")
        self.max_length = max_length
        self.tasks = self.fixed_tasks or options.tasks
        self.total_units = len(self.tasks)
        self.settings = dataclasses.asdict(options) | {
            "tasks": self.tasks,
            "max_length": max_length,
            "lm_eval": importlib.metadata.version("lm-eval"),
            "data": {task: local_tasks.checksum_files(data_dir, task) for task in self.tasks},
        }
        del self.settings["batch_tokens"]  # It does not change the results.

    def run(self, context: EvalContext) -> dict:
        """Return {"tasks": {name: its metrics}, "missing": {name: reason}}, and what sums them up if they are complete.

        That is `summary`, the means of glalm.evals.centered over the tasks that have these scores, and `table`, the row
        of the paper's table.
        """
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        lm = HarnessLM(self.model, self.config.harness, self.max_length, context)
        found, missing = {}, {}
        with TemporaryDirectory() as folder:
            manager = local_tasks.build_task_manager(self.config.data_dir, Path(folder))
            for name in self.tasks:
                try:
                    with context.raise_on_all_ranks():
                        found |= context.load_or_compute(
                            name, partial(run_task, name, lm, manager, self.config.data_dir)
                        )
                except (ConfigError, RunError) as error:
                    missing[name] = str(error)
                except Exception as error:  # The harness, the task and the model raise their own.
                    missing[name] = f"{type(error).__name__}: {error}"
        results = {"tasks": found, "missing": missing}
        if all(task in found for task, _ in PAPER.values()):
            results["table"] = paper_table(found)
        # A mean over other tasks would be another score.
        if not missing and (summary := summarize_tasks(found)):
            results["summary"] = summary
        return results

    def summarize(self, results: dict) -> list[str]:
        lines = []
        for task, metrics in results["tasks"].items():
            scores = []
            for name, value in select_scores(metrics).items():
                error = metrics.get(f"{name}_stderr")
                scores.append(f"{name} {value:.4g}" + (f" ± {error:.2g}" if error is not None else ""))
            lines.append(f"{task}: {', '.join(scores)}")
        lines += [f"{task}: not evaluated: {reason}" for task, reason in results["missing"].items()]
        if "summary" in results:
            summary = results["summary"]
            lines.append(
                f"all tasks: centered accuracy {summary['centered_acc']:.4f} (0 is chance, 1 is perfect), "
                f"{summary['answer_bits_per_byte']:.4f} bits per byte of the right answers"
            )
        if "table" in results:
            row = ", ".join(f"{name} {x:.2f}" for name, x in results["table"].items() if x is not None)
            lines.append(f"the paper's table: {row}")
        return lines

    def metrics(self, results: dict) -> dict[str, float]:
        """Return {"centered_acc": ..., "piqa/acc": ...}: the means and every metric of every task, without errors."""
        values = dict(results.get("summary", {}))
        for task, metrics in results["tasks"].items():
            values |= {f"{task}/{name}": value for name, value in select_scores(metrics).items()}
        return values


class PaperZeroShotEvaluator(HarnessEvaluator):
    """The zero-shot tasks of the GLA paper."""

    name = "paper_zero_shot"
    fixed_tasks = PAPER_TASKS


class RecallEvaluator(HarnessEvaluator):
    """The recall-intensive tasks of the GLA paper."""

    name = "recall"
    fixed_tasks = RECALL_TASKS


def run_task(name: str, lm: "HarnessLM", manager: TaskManager, data_dir: str | None) -> dict:
    """Return {task: its metrics} of a task, or of all tasks of a group or a tag.

    Raises:
        ConfigError: On all ranks, where the task is unknown or one rank cannot read its data.
    """
    local_tasks.check_task(manager, name, data_dir)
    loaded = None
    problem = None
    try:
        loaded = manager.load([name])
    except Exception as error:  # The hub, the data set's reader and the task's own code raise their own.
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if any(problems := lm.context.gather([problem])):
        where = f"in data_dir={data_dir}" if data_dir else "from the hub (with data_dir=FOLDER it is read from there)"
        raise ConfigError(f"its data cannot be read {where}: {next(filter(None, problems))}")
    for task in loaded["tasks"].values():
        set_fewshot(task, lm.options.num_fewshot)
    # lm-eval runs on every rank as if it were alone: HarnessLM shares out the model's work. The seed is set for each
    # task, because a resumed evaluation skips the tasks before it.
    with seeded(DEFAULT_OTHER_SEED + lm.context.rank, lm.model.device):
        output = evaluator.evaluate(
            lm, loaded, limit=lm.options.limit, bootstrap_iters=BOOTSTRAP_ITERATIONS, log_samples=False
        )
    metrics = {task: collect_metrics(task, output) for task in output["results"]}
    for task, entry in loaded["tasks"].items():
        metrics[task] |= score_answers(entry, metrics[task].get("acc"))
    return metrics


def set_fewshot(task: Task, num_fewshot: int | None) -> None:
    """Set the number of examples as lm-eval's command line does: a task that sets 0 itself keeps 0."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def collect_metrics(task: str, output: dict) -> dict:
    """Return {"acc": ..., "acc_stderr": ..., "samples", "num_fewshot", "version"} of a task in lm-eval's output."""
    metrics = {}
    for key, value in output["results"][task].items():
        name, _, filter_name = key.partition(",")
        if isinstance(value, (int, float)) and filter_name:
            metric, suffix, _ = name.partition("_stderr")
            label = metric if filter_name == "none" else f"{metric} ({filter_name})"
            metrics[label + suffix] = float(value) if math.isfinite(value) else None
    return metrics | {
        "samples": output.get("n-samples", {}).get(task, {}).get("effective"),
        "num_fewshot": output.get("n-shot", {}).get(task),
        "version": output.get("versions", {}).get(task),
    }


# ---------------------------------------------------------------------------------------------- lm-eval's interface


class HarnessLM(TemplateLM):
    """An EvalModel in lm-eval's interface. lm-eval sees one process; each call's requests are shared by all ranks.

    A text begins with the model's document prefix. A prefix is never scored.
    """

    def __init__(self, model: EvalModel, options: HarnessConfig, max_length: int, context: EvalContext):
        super().__init__()
        self.model = model
        self.options = options
        self.max_length = max_length
        self.context = context
        self.batch_tokens = options.batch_tokens or (65536 if model.device.type == "cuda" else 2048)
        # The choices of a question share their text.
        self._encode = lru_cache(maxsize=256)(lambda text: tuple(model.tokenizer.encode(text)))

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.model.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        prefix = () if add_special_tokens is False else self.model.document_prefix
        return [*prefix, *self._encode(string)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Return an answer for each request (context, continuation). Requests of one context go to one rank."""
        by_context: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_context.setdefault(request.args[0], []).append(i)
        groups = sorted(by_context.values(), key=lambda indices: -len(requests[indices[0]].args[0]))
        share = self.context.share(groups)
        pairs = [requests[i].args for i in chain.from_iterable(share)]
        answers = iter(self._loglikelihood_tokens([(pair, *self._encode_request(*pair)) for pair in pairs]))
        share_answers = [[next(answers) for _ in indices] for indices in share]
        ordered: list = [None] * len(requests)
        for indices, group_answers in zip(groups, self.context.gather(share_answers), strict=True):
            for i, answer in zip(indices, group_answers, strict=True):
                ordered[i] = answer
        return ordered

    def _encode_request(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a context, which are never none, and of its continuation, by lm-eval's rules.

        A context's last blanks belong to the continuation. What has no context is scored after `prefix_token_id`.
        """
        if context:
            context_ids, ids = self._encode_pair(context, continuation)
            # The context's last token may contain the continuation's text where the two are encoded as one.
            ids = ids or self.tok_encode(continuation, add_special_tokens=False)
        else:
            context_ids, ids = [], self.tok_encode(continuation, add_special_tokens=False)
            if ids[:1] == [self.prefix_token_id]:
                return ids[:1], ids[1:]
        return context_ids or [self.prefix_token_id], ids

    def _loglikelihood_tokens(self, requests: list, **_) -> list[Answer]:
        """Score the requests (texts, context ids, continuation ids) of this rank. An empty continuation is certain."""
        # The longest of all ranks counts: if only one rank raised, the others would wait for it.
        longest = max(self.context.gather([max((len(tokens) for _, _, tokens in requests), default=0)]))
        require(
            longest <= self.max_length,
            f"harness.max_length={self.max_length} is less than the {longest} tokens of an answer to score; "
            f"write harness.max_length={longest} or more",
        )
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if continuation:
                by_context.setdefault(tuple(context), []).append(i)
        groups = [Choices(list(context), [requests[i][2] for i in ids]) for context, ids in by_context.items()]
        answers = [Answer(0.0, True)] * len(requests)
        for indices, group_answers in zip(by_context.values(), self._score(groups), strict=True):
            for i, answer in zip(indices, group_answers, strict=True):
                answers[i] = answer
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of each text: in lm-eval's windows, or with options.stateful in full."""
        documents = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        if self.options.stateful:
            share = self.context.share(documents)
            return self.context.gather(
                score_documents(self.model, share, self.prefix_token_id, self.max_length, self.batch_tokens)
            )
        windows, owners = [], []
        for i, document in enumerate(documents):
            # Each token is predicted once, and all windows but the first start one token early.
            for window in utils.get_rolling_token_windows(document, self.prefix_token_id, self.max_length, 1):
                context, tokens = utils.make_disjoint_window(window)
                windows.append(Choices(context, [tokens]))
                owners.append(i)
        answers = self._score(self.context.share(windows))
        totals = [0.0] * len(documents)
        for i, nats in zip(owners, self.context.gather([answer.log_likelihood for [answer] in answers]), strict=True):
            totals[i] += nats
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each text up to a stop string, the end of the document or max_gen_toks tokens, as lm-eval asks."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].args[0]))
        share = self.context.share(order)
        options_by_kind = {repr(r.args[1]): normalize_gen_kwargs(r.args[1], 256) for r in requests}
        # The most of all requests counts: if only one rank raised, the others would wait for it.
        max_new = max((options["max_gen_toks"] for options in options_by_kind.values()), default=0)
        require(
            max_new < self.max_length,
            f"harness.max_length={self.max_length} leaves no room before the {max_new} tokens that a task generates; "
            f"write harness.max_length={2 * max_new} or more",
        )
        texts = {}
        for kind, options in options_by_kind.items():
            new = options["max_gen_toks"]
            indices = [i for i in share if repr(requests[i].args[1]) == kind]
            encoded = {i: self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in indices}
            contexts = {i: ids[new - self.max_length :] for i, ids in encoded.items()}
            for batch in make_batches(indices, [len(contexts[i]) + new for i in indices], self.batch_tokens):
                texts |= zip(batch, self._generate([contexts[i] for i in batch], **options), strict=True)
                self.context.advance(len(batch) / (len(share) * self.context.world_size))
        all_texts = dict(zip(order, self.context.gather([texts[i] for i in share]), strict=True))
        return [all_texts[i] for i in range(len(requests))]

    def _generate(
        self, contexts: list[list[int]], max_gen_toks: int, until: list[str], do_sample: bool, **options
    ) -> list[str]:
        """Return one continuation of each context. Raise RunError where logits are NaN, which would choose a token."""
        stop_texts = [text for text in until if text]
        device = self.model.device
        has_nan = torch.zeros((), dtype=torch.bool, device=device)
        input_ids = pad_rows(contexts, device, left=True)
        length = input_ids.shape[1]

        def has_stop_text(rows: torch.Tensor, scores, **_) -> torch.Tensor:
            texts = [self._decode_new(row, length) for row in rows]
            return torch.tensor([any(stop in text for stop in stop_texts) for text in texts], device=device)

        def look_for_nan(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            has_nan.logical_or_(scores.isnan().any())
            return scores

        if not do_sample:
            options = {name: value for name, value in options.items() if name not in SAMPLING_OPTIONS}
        output = self.model.causal_lm.generate(
            input_ids,
            attention_mask=pad_rows([[1] * len(ids) for ids in contexts], device, left=True),
            max_new_tokens=max_gen_toks,
            do_sample=do_sample,
            eos_token_id=self.eot_token_id,
            pad_token_id=self.eot_token_id,
            logits_processor=[look_for_nan],
            stopping_criteria=[has_stop_text],
            suppress_tokens=self.model.unused_ids or None,
            **options,
        )
        if has_nan:
            raise RunError("the logits of the next token are NaN: the model's state or logits overflow")
        texts = [self._decode_new(row, length) for row in output]
        return [postprocess_generated_text(text, stop_texts, think_end_token=None) for text in texts]

    def _decode_new(self, ids: torch.Tensor, length: int) -> str:
        """Return the text of ids [T] from position `length` to the end of the document."""
        new = ids[length:].tolist()
        if self.eot_token_id in new:
            new = new[: new.index(self.eot_token_id)]
        # A few tokens before are decoded with it, because a tokenizer may drop a text's first space.
        before = ids[max(0, length - 4) : length].tolist()
        return self.model.tokenizer.decode(before + new)[len(self.model.tokenizer.decode(before)) :]

    def _score(self, groups: list[Choices]) -> list[list[Answer]]:
        total = sum(len(group.continuations) for group in groups) * self.context.world_size
        # A task is one unit of progress.
        return score_choices(
            self.model, groups, self.max_length, self.batch_tokens, lambda scored: self.context.advance(scored / total)
        )
