import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glalm.data.tokenizer import Tokenizer, sample_texts, train_sentencepiece


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    return train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=400)


@given(st.text(st.one_of(st.sampled_from(" \t\n\r_▁a1<>s/"), st.characters(exclude_categories=["Cs"]))))
@example("  two leading and two trailing  ")
@example("\n\n\tif x:\r\n\t    return  1\n")
@example("▁ is not a space▁▁")
@example("<s></s><unk><0x41>▅ ⁇ \0\ufeff")
@example("漢字 é e\u0301 \U0001f600 ﬁ")
def test_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_special_ids_and_size(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (400, 1, 2)
    assert tokenizer.decode([1, *tokenizer.encode("a b"), 2]) == "a b"


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


def test_errors_say_what_to_do(tmp_path, texts):
    with pytest.raises(FileNotFoundError, match="no such tokenizer"):
        Tokenizer(tmp_path / "absent.model")
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"bad\.model: not a SentencePiece model"):
        Tokenizer(tmp_path / "bad.model")
    for size in (100, 10**6):
        with pytest.raises(ValueError, match=f"vocab_size={size} does not suit"):
            train_sentencepiece(texts, tmp_path / "t.model", vocab_size=size)
    with pytest.raises(ValueError, match="no training text"):
        train_sentencepiece([""], tmp_path / "t.model", vocab_size=400)
    assert not (tmp_path / "t.model").exists()
