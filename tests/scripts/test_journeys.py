"""The commands of the pages that lead a new user, as typed, with the wheel installed, in an empty folder."""

import asyncio
import json
import random
import re
import shlex
from itertools import product
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

DOCS = Path(__file__).parents[2] / "docs"


def page_commands(name: str) -> list[list[str]]:
    """Return the commands of a page's shell blocks as words."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def write_articles(path: Path, count: int, seed: int) -> list[str]:
    words = random.Random(seed)
    texts = []
    for _ in range(count):
        start = words.randrange(50)
        texts.append(" ".join(f"word{(start + i * i) % 50}" for i in range(words.randrange(60, 400))))
    path.write_text("".join(json.dumps({"title": "a title", "body": text}) + "\n" for text in texts))
    return texts


@pytest.mark.slow
def test_own_text(installed, tmp_path):
    texts = write_articles(tmp_path / "articles.jsonl", 120, seed=0)
    write_articles(tmp_path / "heldout.jsonl", 6, seed=1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    commands = page_commands("journey_own_text.md")
    assert [command[1] for command in commands] == [
        "prepare", "prepare", "train", "train", "train", "train", "eval", "eval", "report", "export"
    ]  # fmt: skip
    printed = [installed(tmp_path, *command) for command in commands]
    vocabulary = tokenizer.get_vocab_size()
    assert f"data/mine is ready: vocabulary of {vocabulary}" in printed[0] and "counts are consistent" in printed[1]
    assert f"vocabulary    {vocabulary} tokens, those of data/mine" in printed[2]
    assert "mine is continued with these values of runs/mine/run.json: " in printed[4]
    assert f"model.vocab_size={vocabulary}" in printed[4] and "data.path=data/mine" in printed[4]
    assert "heldout.jsonl perplexity " in printed[6] and "validation perplexity " in printed[7]
    assert "on heldout.jsonl" in printed[8]

    run = tmp_path / "runs" / "mine"
    assert (run / "checkpoints" / "step_30").is_dir()
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["model"]["vocab_size"] == vocabulary and record["config"]["train"]["steps"] == 30
    results = {path.name: json.loads(path.read_text()) for path in (run / "eval").glob("*.json")}
    for name in ("perplexity", "extrapolation"):
        [beside] = [file for file in results if file.startswith(f"{name}-heldout.jsonl-")]
        assert Path(results[beside]["settings"]["data_path"]).name == "heldout.jsonl"
        assert results[f"{name}.json"]["own_text"] is True and results[beside]["own_text"] is False
    assert results["generate.json"]["own_text"] is None
    assert (run / "report.html").is_file() and (tmp_path / "mine-hf" / "model.safetensors").is_file()
    assert "is already complete: 120 documents" in installed(tmp_path, *commands[0])


@pytest.mark.slow
def test_comparison(installed, tmp_path):
    """The corpus is a part of the standard library, to be quick."""
    printed = []
    for command in page_commands("journey_comparison.md"):
        command = [str(Path(asyncio.__file__).parent) if word == "stdlib" else word for word in command]
        printed.append(installed(tmp_path, *command))
    cost, table = printed[1:3]
    assert "18 runs, 18 to do" in cost and " of training and " in cost
    folder = tmp_path / "runs" / "first"
    rows = json.loads((folder / "ladder.json").read_text())["rows"]
    assert {(row["model"], row["lr"]) for row in rows} == set(product(("gla", "retention", "attention"), (1e-3, 3e-3)))
    assert all(len(row["seeds"]) == 3 and row["sd"] > 0 for row in rows)
    for model in ("gla", "retention", "attention"):
        same = [row for row in rows if row["model"] == model]
        best = min(same, key=lambda row: row["perplexity"])
        assert [row["best"] for row in same] == [row is best for row in same]
        assert f"{best['perplexity']:.2f} ± {best['sd']:.2f}" in table
    assert len((folder / "ladder.csv").read_text().splitlines()) == 19
    for name in ("loss", "positions"):
        assert (folder / f"{name}.svg").is_file() and (folder / f"{name}.png").is_file()
    assert (folder / "gla-lr-0.003-1" / "report.html").is_file()
