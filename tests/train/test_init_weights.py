import shutil

import torch

from glalm.prepare.pipeline import prepare_data
from glalm.train.init_weights import build_initial_model, tokenizer_fingerprints
from glalm.train.trainer import train


def test_tokenizer_of_a_checkpoint_is_that_of_its_run(run_config, change, token_folder, tmp_path):
    first = change(run_config, name="first", **{"train.steps": 2})
    prepare_data([token_folder.parent / "words.jsonl"], tmp_path / "other", vocab_size=280, progress=False)
    second = change(first, name="second", **{"data.path": str(tmp_path / "other")})
    assert train(first) == train(second) == 0
    path = first.folder / "checkpoints" / "step_2"
    [own] = tokenizer_fingerprints(path)
    [others] = tokenizer_fingerprints(second.folder / "checkpoints" / "step_2")
    assert own != others
    copy = shutil.copytree(path, second.folder / "backup" / "step_2")
    assert tokenizer_fingerprints(copy) == set()  # Nothing beside this copy names its tokenizer.
    assert tokenizer_fingerprints(shutil.copytree(path, first.folder / "backup" / "step_2")) == {own}


def test_no_weights_are_drawn_where_a_checkpoint_overwrites_them(run_config):
    build_initial_model(run_config, from_scratch=False)
    random_state = torch.get_rng_state()
    torch.manual_seed(run_config.seed)
    assert torch.equal(random_state, torch.get_rng_state())
