import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm.evals.identity import ResultIdentity
from glalm.evals.result_files import (
    current_results,
    find_result,
    format_number,
    infer_tokens,
    load_results,
    read_json,
    save_result,
    select_result,
    select_scores,
    write_json,
)


def test_scores_are_what_was_measured():
    found = {"acc": 0.5, "acc_stderr": 0.1, "perplexity": None, "samples": 6, "num_fewshot": 0, "version": 1.0}
    assert select_scores(found) == {"acc": 0.5}


def test_tokens_after_the_batch_was_changed_are_each_rows_own():
    rows = [
        {"step": 0, "val_loss": 7.0},
        {"step": 5, "val_loss": 6.5},
        {"step": 10, "loss": 6.0, "tokens": 1_000},
        {"step": 15, "val_loss": 5.5},
        {"step": 20, "loss": 5.0, "tokens": 5_000},  # at four times the batch from step 10 on
        {"step": 30, "loss": 4.0, "tokens": 9_000},
        {"step": 35, "val_loss": 4.5},
        {"step": 50, "val_loss": 4.0},
    ]
    assert infer_tokens(rows) == [0, 500, 1_000, 3_000, 5_000, 9_000, 11_000, 17_000]


def test_tokens_are_inferred_from_one_row_or_none():
    assert infer_tokens([{"step": 0}, {"step": 4}]) == [0, 0]
    assert infer_tokens([{"step": 0}, {"step": 4, "tokens": 8}, {"step": 6}]) == [0, 8, 12]


def saved_record(seed: int, own: bool, checkpoint: str | None = None) -> dict:
    identity = ResultIdentity("perplexity", checkpoint, "c0ffee", {"data_path": f"data/{seed % 2}", "seed": seed})
    return {**identity.to_record(), "checkpoint": checkpoint, "own_text": own, "results": {"perplexity": float(seed)}}


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12))
@settings(deadline=None, max_examples=25)
def test_no_result_replaces_another(tmp_path_factory, saves):
    """Whatever is evaluated in whatever order: all are found, and NAME.json is the newest on the run's own text."""
    folder = tmp_path_factory.mktemp("run")
    own_text = {seed: own for seed, own in reversed(saves)}  # A text is the run's own, or it is not.
    saved = {}
    for seed, _ in saves:
        saved[seed] = saved_record(seed, own_text[seed])
        path = save_result(folder, saved[seed], "perplexity")
        assert read_json(path) == saved[seed]
        for record in saved.values():
            identity = ResultIdentity("perplexity", None, "c0ffee", record["settings"])
            assert find_result(folder, identity)["results"] == record["results"]
        assert len(list((folder / "eval").iterdir())) == len(saved)
    made = [seed for seed, _ in saves]
    newest = next((seed for seed in reversed(made) if own_text[seed]), made[-1])
    assert read_json(folder / "eval" / "perplexity.json")["results"] == {"perplexity": float(newest)}


def test_what_is_no_result_is_set_aside(tmp_path):
    (tmp_path / "eval").mkdir()
    main = tmp_path / "eval" / "perplexity.json"
    for content in ("{", "[1]", '{"notes": 1}'):
        main.write_text(content)
        assert load_results(tmp_path, skip_damaged=True) == {}
        assert save_result(tmp_path, saved_record(1, own=True), "perplexity") == main
        assert main.with_name("perplexity.json.replaced").read_text() == content
        assert read_json(main)["results"] == {"perplexity": 1.0}


def test_results_of_replaced_checkpoints_and_of_earlier_steps_are_not_current(tmp_path):
    for step, weights in (("step_2", "c0ffee"), ("step_4", "c0ffee"), ("step_4.superseded", "other")):
        folder = tmp_path / "checkpoints" / step
        folder.mkdir(parents=True)
        write_json(folder / "manifest.json", {"files": {"model.safetensors": {"sha256": weights, "bytes": 1}}})

    def save(file: str, step: str, weights: str, **settings) -> None:
        record = {"checkpoint": step, "checksum": weights, "settings": settings, "results": file}
        write_json(tmp_path / "eval" / f"{file}.json", {"evaluator": "perplexity", **record})

    save("replaced", "step_4", "other", text=1)
    save("earlier", "step_2", "c0ffee", text=1)
    assert [r["results"] for r in current_results(tmp_path)] == ["earlier"]
    save("perplexity", "step_4", "c0ffee", text=1)
    save("of-other-text", "step_2", "c0ffee", text=2)
    save("pruned", "step_1", "gone", text=3)
    save("set-aside", "step_4.superseded", "other", text=4)
    names = sorted(r["results"] for r in current_results(tmp_path))
    assert names == ["of-other-text", "perplexity", "pruned", "set-aside"]
    assert select_result(current_results(tmp_path), "perplexity")["results"] == "perplexity"
    assert select_result(current_results(tmp_path), "needle") is None


def test_results_of_the_average_are_kept_apart_and_come_second(tmp_path):
    files = {f"{kind}.safetensors": {"sha256": kind, "bytes": 1} for kind in ("model", "average")}
    (tmp_path / "checkpoints" / "step_4").mkdir(parents=True)
    write_json(tmp_path / "checkpoints" / "step_4" / "manifest.json", {"files": files})

    def save(name: str, checksum: str, **settings) -> None:
        record = {"evaluator": "perplexity", "checkpoint": "step_4", "checksum": checksum, "results": name}
        write_json(tmp_path / "eval" / f"{name}.json", record | {"settings": settings})

    save("perplexity", "average", weights="average")
    save("replaced", "model", weights="average")
    assert select_result(current_results(tmp_path), "perplexity")["results"] == "perplexity"
    save("perplexity-beside", "model")
    assert sorted(r["results"] for r in current_results(tmp_path)) == ["perplexity", "perplexity-beside"]
    assert select_result(current_results(tmp_path), "perplexity")["results"] == "perplexity-beside"


@pytest.mark.parametrize(
    "x, text", [(None, None), (math.nan, None), (17.12345, "17.123"), (32000.5, "32,000.500"), (1e304, "1e+304")]
)
def test_a_number_of_a_table_is_short(x, text):
    assert format_number(x, 3) == text
