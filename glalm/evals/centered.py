"""Scores of tasks of lm-evaluation-harness that compare over tasks: 0 is chance and 1 is perfect.

For a task of multiple choice, chance is the number of right answers over that of choices, averaged over the questions;
for a continuation of a text, such as LAMBADA's last word, it is 0. Small models are near chance, where the likelihood
of the right answers says more than the number of questions that they decide.
"""

import math
from collections import defaultdict
from statistics import fmean

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask, Task

SUMMARY = ("centered_acc", "answer_bits_per_byte")


def score_answers(task: Task, acc: float | None) -> dict[str, float]:
    """Return the scores of a task whose answers have been scored by their likelihood; {} for any other task, or where
    guessing is always right.

    Args:
        task: Its instances have the model's responses.
        acc: The accuracy. None: the task has none.

    Returns:
        `chance`, the expected accuracy of guessing; `centered_acc`, (acc - chance) / (1 - chance); and
        `answer_bits_per_byte`, the bits of each question's right answer (of several, the likeliest) after its context
        over its bytes of UTF-8, with the space before it.
    """
    if acc is None or not isinstance(task, ConfigurableTask) or not task.instances:
        return {}
    if task.config.process_results is not None:
        return {}  # Its accuracy is of its own kind, such as the share of the likelihood that all true answers have.
    by_question: dict[int, list[Instance]] = defaultdict(list)
    for instance in sorted(task.instances, key=lambda instance: instance.idx):
        by_question[instance.doc_id].append(instance)
    if task.OUTPUT_TYPE == "multiple_choice":
        questions = [find_right_answers(task, instances) for instances in by_question.values()]
    elif task.OUTPUT_TYPE == "loglikelihood":
        questions = [(0.0, instances) for instances in by_question.values()]
    else:
        return {}
    chance = fmean(chance for chance, _ in questions)
    answers = [max(right, key=log_likelihood) for _, right in questions if right]
    text_bytes = sum(len(answer.args[1].encode()) for answer in answers)
    if chance == 1 or text_bytes == 0:
        return {}
    bits = -sum(map(log_likelihood, answers)) / math.log(2)
    return {
        "chance": chance,
        "centered_acc": (acc - chance) / (1 - chance),
        "answer_bits_per_byte": bits / text_bytes,
    }


def find_right_answers(task: ConfigurableTask, instances: list[Instance]) -> tuple[float, list[Instance]]:
    """Return the chance of guessing a question right, and the instances of its right answers, as the harness has them.

    Args:
        instances: One for each choice, in order, and perhaps others after them.
    """
    question = instances[0].doc
    choices = task.doc_to_choice(question)
    # Where the choices are in the contexts, the harness keeps the index of the right one as the text.
    gold = task.doc_to_text(question) if task.multiple_input else task.doc_to_target(question)
    indices = {
        choices.index(each) if each in choices else each for each in (gold if isinstance(gold, list) else [gold])
    }
    right = [instances[i] for i in indices if isinstance(i, int) and 0 <= i < len(choices)]
    return len(right) / len(choices), right


def log_likelihood(instance: Instance) -> float:
    """Return the log-likelihood in nats that the model gave an instance."""
    return instance.resps[0][0]


def summarize_tasks(tasks: dict[str, dict]) -> dict[str, float]:
    """Return the means of `centered_acc` and `answer_bits_per_byte` over the tasks that have them; {} if none has."""
    scored = [metrics for metrics in tasks.values() if "centered_acc" in metrics]
    return {name: fmean(metrics[name] for metrics in scored) for name in SUMMARY} if scored else {}
