from glalm.evals.result_files import infer_tokens, select_scores


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
