from hypothesis import given, settings
from hypothesis import strategies as st

from glalm.evals.identity import (
    ResultIdentity,
    describe_conditions,
    describe_differences,
    group_comparable,
    require_comparable,
)

VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4), st.lists(st.integers(), max_size=3))
SETTINGS = st.dictionaries(st.text(max_size=6).filter(lambda name: name != "data_path"), VALUES, max_size=4)


def record(evaluator: str = "extrapolation", **settings) -> dict:
    return {"evaluator": evaluator, "settings": settings}


@given(SETTINGS, st.text(max_size=6).filter(lambda name: name != "data_path"), VALUES, st.text(), st.text())
@settings(deadline=None, max_examples=50)
def test_whatever_a_result_depends_on_changes_its_digest(found, name, value, path, other):
    identity = ResultIdentity("perplexity", "step_4", "c0ffee", found | {"data_path": path})
    backwards = dict(reversed({**found, "data_path": other}.items()))
    assert identity.digest == ResultIdentity("perplexity", "step_4", "c0ffee", backwards).digest
    others = {
        ResultIdentity("needle", "step_4", "c0ffee", found).digest,
        ResultIdentity("perplexity", "step_2", "c0ffee", found).digest,
        ResultIdentity("perplexity", None, "c0ffee", found).digest,
        ResultIdentity("perplexity", "step_4", "decade", found).digest,
        ResultIdentity("perplexity", "step_4", "c0ffee", found | {name: [value, "another"]}).digest,
    }
    assert len(others) == 5 and identity.digest not in others


DRAWN = st.fixed_dictionaries(
    {
        "data_sha256": st.sampled_from(["aa", "bb"]),
        "data_path": st.sampled_from(["x/mine", "mine", "other"]),
        "split": st.sampled_from(["test", "validation"]),
        "text": st.sampled_from(["documents", "stream"]),
        "contexts": st.sampled_from([["reset"], ["stateful", "reset"], ["stateful"]]),
        "max_length": st.sampled_from([64, 128]),
        "precision": st.sampled_from(["bf16", "fp32"]),
    }
)


@given(st.lists(DRAWN, min_size=1, max_size=6))
@settings(deadline=None, max_examples=50)
def test_records_are_drawn_together_where_nothing_differs(drawn):
    groups = group_comparable([record(**settings) for settings in drawn])
    assert sum(map(len, groups)) == len(drawn)
    for group in groups:
        assert describe_differences(group) == []
        require_comparable(group)
    firsts = [group[0] for group in groups]
    for i, first in enumerate(firsts):
        for other in firsts[:i]:
            names = {difference.partition(":")[0] for difference in describe_differences([first, other])}
            pairs = ("split", "text", "data_sha256")
            unlike = {name for name in pairs if first["settings"][name] != other["settings"][name]}
            if first["settings"]["contexts"][0] != other["settings"]["contexts"][0]:
                unlike.add("contexts")
            assert names == {"data" if name == "data_sha256" else name for name in unlike} and names


def test_sets_of_one_name_are_told_apart_by_their_content():
    grown = [
        record(data_path="data/mine", data_sha256="aaaaaaaaaa"),
        record(data_path="mine", data_sha256="bbbbbbbbbb"),
    ]
    assert describe_differences(grown) == ["data: mine (aaaaaaaa) / mine (bbbbbbbb)"]
    moved = [record(data_path="data/mine", data_sha256="aa"), record(data_path="copy", data_sha256="aa")]
    assert describe_differences(moved) == []
    other = [record(data_path="mine", data_sha256="aa"), record(data_path="foreign", data_sha256="bb", limit=3)]
    assert describe_differences(other) == ["data: mine / foreign", "limit: None / 3"]


def test_what_a_number_was_measured_on():
    perplexity = {"data_path": "data/mine", "data_sha256": "aa", "split": "validation", "seq_len": 2048}
    assert (
        describe_conditions(record("perplexity", **perplexity)) == "validation split of mine, windows of 2,048 tokens"
    )
    curves = {"contexts": ["stateful"], "text": "documents", "documents": 32}
    assert describe_conditions(record("extrapolation", **curves)) == "at most 32 documents"
    curves |= {"text": "stream", "documents": None}
    assert describe_conditions(record("extrapolation", **curves)) == "all blocks of the stream"
    harness = {"limit": 100, "num_fewshot": 5, "stateful": True, "tasks": ["piqa"]}
    text = "only the first 100 questions of each task, 5 examples before each question, harness.stateful=true"
    assert describe_conditions(record("zero_shot", **harness)) == text
    assert describe_conditions(record("zero_shot", limit=None, num_fewshot=None, stateful=False)) == ""
