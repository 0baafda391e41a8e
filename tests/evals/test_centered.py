import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("lm_eval")

from lm_eval.api.task import ConfigurableTask

from glalm.evals.centered import score_answers, summarize_tasks


class Choices(ConfigurableTask):
    """A task whose questions are {"choices": [...], "gold": index}, with one response for each choice."""

    OUTPUT_TYPE = "multiple_choice"
    multiple_input = 0

    def __init__(self, questions: list[dict], nats: list[list[float]], extra: int = 0, process_results=None):
        self._config = SimpleNamespace(process_results=process_results)
        self._instances = [
            SimpleNamespace(doc_id=n, doc=question, idx=i, args=("context", " " + choice), resps=[(value, False)])
            for n, (question, values) in enumerate(zip(questions, nats, strict=True))
            for i, (choice, value) in enumerate(zip([*question["choices"], *["x"] * extra], values, strict=True))
        ]

    def doc_to_choice(self, doc):
        return doc["choices"]

    def doc_to_target(self, doc):
        return doc["gold"]

    def doc_to_text(self, doc):
        return doc["gold"]


class Continuations(Choices):
    OUTPUT_TYPE = "loglikelihood"


class Generations(Choices):
    OUTPUT_TYPE = "generate_until"


@given(st.lists(st.integers(2, 5), min_size=1, max_size=8), st.floats(0, 1))
@settings(max_examples=25)
def test_chance_is_0_and_perfect_is_1(sizes, acc):
    questions = [{"choices": [f"answer {i}" for i in range(size)], "gold": size - 1} for size in sizes]
    task = Choices(questions, [[-2.0 - i for i in range(size)] for size in sizes])
    chance = sum(1 / size for size in sizes) / len(sizes)
    found = score_answers(task, acc)
    assert found["chance"] == pytest.approx(chance)
    assert found["centered_acc"] == pytest.approx(1 - (1 - acc) / (1 - chance))
    assert score_answers(task, chance)["centered_acc"] == pytest.approx(0, abs=1e-9)
    assert score_answers(task, 1.0)["centered_acc"] == 1
    nats = sum(2 + size - 1 for size in sizes)
    assert found["answer_bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(" answer 0") * len(sizes)))


def test_right_answers_are_those_of_the_harness():
    text = score_answers(Choices([{"choices": ["é", "no"], "gold": "no"}], [[-1.0, -2.0]]), 0.0)
    assert text["answer_bits_per_byte"] == pytest.approx(2 / math.log(2) / 3)
    several = score_answers(Choices([{"choices": ["é", "no", "b"], "gold": [0, 2]}], [[-1.0, -2.0, -3.0]]), 0.0)
    assert several["chance"] == pytest.approx(2 / 3)
    assert several["answer_bits_per_byte"] == pytest.approx(1 / math.log(2) / 3)  # of the likelier one
    unconditional = score_answers(Choices([{"choices": ["a", "b"], "gold": 1}], [[-1, -2, -7, -8]], extra=2), 0.5)
    assert unconditional["answer_bits_per_byte"] == pytest.approx(2 / math.log(2) / 2)
    unknown = Choices([{"choices": ["a", "b"], "gold": 5}, {"choices": ["a", "b"], "gold": 0}], [[-1, -2]] * 2)
    assert score_answers(unknown, 0.5)["answer_bits_per_byte"] == pytest.approx(1 / math.log(2) / 2)
    choices_in_contexts = Choices([{"choices": ["a", "b"], "gold": 1}], [[-1, -2]])
    choices_in_contexts.multiple_input = 2
    assert score_answers(choices_in_contexts, 0.5)["answer_bits_per_byte"] == pytest.approx(2 / math.log(2) / 2)


def test_tasks_without_such_answers_have_no_such_scores():
    question = {"choices": ["a"], "gold": 0}
    assert score_answers(Continuations([question], [[-1.0]]), 0.25)["centered_acc"] == 0.25
    for task in (Generations([question], [[-1.0]]), Choices([question], [[-1.0]]), Choices([], [])):
        assert score_answers(task, 1.0) == {}
    assert score_answers(Continuations([question], [[-1.0]]), None) == {}
    own_accuracy = Choices(
        [{"choices": ["a", "b"], "gold": 0}], [[-1.0, -2.0]], process_results=lambda doc, results: {}
    )
    assert score_answers(own_accuracy, 0.5) == {}


def test_the_summary_is_a_mean_over_tasks():
    tasks = {"a": {"centered_acc": 0.5, "answer_bits_per_byte": 1.0}, "b": {"word_perplexity": 9.0}}
    tasks["c"] = {"centered_acc": -0.1, "answer_bits_per_byte": 2.0}
    assert summarize_tasks(tasks) == pytest.approx({"centered_acc": 0.2, "answer_bits_per_byte": 1.5})
    assert summarize_tasks({"b": tasks["b"]}) == {}
