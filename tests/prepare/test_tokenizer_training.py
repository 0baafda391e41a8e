import json
import random
import sys

import pytest

from glalm.__main__ import main
from glalm.commands.prepare_data import train_tokenizer
from glalm.prepare.pipeline import prepare_data
from glalm.prepare.tokenizer_training import sample_texts, train_sentencepiece


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    return train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=400)


def test_pieces_are_learnt_and_whitespace_is_cheap(tokenizer, texts):
    assert len(tokenizer.encode(texts[-1])) < 0.5 * len(texts[-1])
    assert len(tokenizer.encode(" " * 8)) <= 2
    assert tokenizer.encode("a\nb") == tokenizer.encode("a") + tokenizer.encode("\n") + tokenizer.encode("b")
    assert len(tokenizer.encode("\n\n")) == 2
    assert len(tokenizer.encode("2024")) == 4


def test_same_texts_in_any_order_give_the_same_file(tokenizer, texts, tmp_path):
    again = train_sentencepiece(reversed(texts), tmp_path / "other.model", vocab_size=400)
    assert again.fingerprint == tokenizer.fingerprint
    fewer = train_sentencepiece(texts[1:], tmp_path / "fewer.model", vocab_size=400)
    assert fewer.fingerprint != tokenizer.fingerprint


def test_a_line_longer_than_sentencepiece_takes_is_learnt(tmp_path):
    line = "zigzag " * 3000
    assert len(train_sentencepiece([line], tmp_path / "t.model", vocab_size=280).encode(line)) < 4000


def test_sample_keeps_the_budget_whatever_the_order():
    texts = [chr(ord("a") + i) * 50 for i in range(20)]
    sample = sample_texts(texts, max_bytes=420, chunk=30)
    assert 420 - 30 < sum(map(len, sample)) <= 420
    assert sample == sample_texts(texts[::-1], max_bytes=420, chunk=30)
    assert sorted(sample_texts(texts, max_bytes=10**6)) == texts


def test_sample_of_texts_of_many_sizes_is_the_same_in_every_order():
    order = random.Random(0)
    texts = [str(i) * order.randint(1, 200) for i in range(300)] + ["twice" * 40] * 2
    samples = set()
    for _ in range(20):
        order.shuffle(texts)
        samples.add(tuple(sample_texts(texts, max_bytes=20_000)))
    [sample] = samples
    assert 20_000 - 600 < len("".join(sample)) <= 20_000


def test_training_errors_say_what_to_do(tmp_path, texts):
    for size, message in [
        (100, r"--vocab-size 100 does not fit these texts: Vocabulary size is smaller .*\.$"),
        (10**6, r"--vocab-size 1000000 does not fit these texts: Vocabulary size too high"),
        (-3, r"vocab_size=-3 must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_sentencepiece(texts, tmp_path / "t.model", vocab_size=size)
    with pytest.raises(ValueError, match=r"is a folder\. Name the file to write, such as .*tokenizer\.model"):
        train_sentencepiece(iter(lambda: pytest.fail("it was read"), None), tmp_path, vocab_size=400)
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        train_sentencepiece([""], tmp_path / "t.model", vocab_size=400)
    assert not (tmp_path / "t.model").exists()


def test_an_existing_tokenizer_is_not_replaced(tmp_path, monkeypatch, capsys):
    (tmp_path / "my.model").write_text("my own")
    monkeypatch.setattr(sys, "argv", ["tokenizer", "--out", str(tmp_path / "my.model"), str(tmp_path / "a.txt")])
    assert train_tokenizer() == 1 and (tmp_path / "my.model").read_text() == "my own"
    assert f"error: {tmp_path}/my.model exists. Choose another --out" in capsys.readouterr().err


def test_a_sample_has_a_megabyte_or_more(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tokenizer", "--out", str(tmp_path / "my.model"), "--sample-mb", "0", "stdlib"])
    assert train_tokenizer() == 1
    assert capsys.readouterr().err == "error: --sample-mb 0 must be at least 1.\n"


def test_records_without_text_are_reported(texts, tmp_path, monkeypatch, capsys):
    rows = [{"text" if i % 2 else "content": text} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["tokenizer", "--out", str(tmp_path / "my.model"), "--vocab-size", "400", str(tmp_path / "a.jsonl")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert train_tokenizer() == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert f"trained without 30 bad records, of which the first is {tmp_path}/a.jsonl:1: no field 'text'" in shown


def test_a_tokenizer_is_trained_on_part_of_the_text_at_a_url(texts, tmp_path, monkeypatch):
    """As `glalm prepare` advises, which would read the text twice."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    url = f"file://{tmp_path}/a.jsonl"
    with pytest.raises(ValueError, match=r"These sources would be downloaded twice .* with glalm tokenizer, or"):
        prepare_data([url], tmp_path / "set", progress=False)
    path = tmp_path / "my.model"
    monkeypatch.setattr(sys, "argv", ["glalm", "tokenizer", "--out", str(path), "--vocab-size", "400", url])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert prepare_data([url], tmp_path / "set", tokenizer=path, progress=False)["complete"]
