import importlib.util
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from glalm.data.tokenizer import Tokenizer, split_text
from glalm.prepare.tokenizer_training import train_sentencepiece


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


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Tokenizer(tmp_path / "absent.model")
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"bad\.model is not a SentencePiece model"):
        Tokenizer(tmp_path / "bad.model")


def mistral():
    shared = Path(__file__).parents[3] / "shared/tokenizer/mistral_v1_tokenizer.model"
    if importlib.util.find_spec("mistral_common"):
        return "mistral-v1"
    return shared if shared.exists() else pytest.skip("needs the package mistral-common")


def test_mistral_has_the_ids_of_sentencepiece():
    name = mistral()
    tokenizer = Tokenizer(name)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.fingerprint == "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
    assert tokenizer.round_trips
    own = sentencepiece.SentencePieceProcessor(model_proto=tokenizer._backend.model)
    assert tokenizer.encode("a  b") == own.encode("a  b") == [264, 28705, 287]
    pick = random.Random(0)
    parts = [
        "word",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "é漢字",
        "▁",
        "'s",
        "3.14",
        "</s>",
        "aaaa",
        "def f(x):",
        "—",
        "\u200b",
    ]
    for size in (0, 1, 10, 1000, 20_000):  # The last two are cut into pieces.
        for _ in range(6):
            text = "".join(pick.choice(parts) for _ in range(size))
            ids = tokenizer.encode(text)
            assert ids == own.encode(text)
            assert tokenizer.decode(ids) == own.decode(ids)


def test_mistral_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"mistral-common.*\.\[mistral\]"):
        Tokenizer("mistral-v1")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_long_texts_have_the_ids_of_the_whole(texts, tmp_path, model_type):
    tokenizer = train_sentencepiece(texts, tmp_path / "t.model", vocab_size=330, model_type=model_type)
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    text = "".join(texts) * 3
    assert len(text) > 10 * tokenizer._backend.SIZE
    ids, whole = tokenizer.encode(text), own.encode(text)
    assert tokenizer.decode(ids) == text
    if model_type == "bpe":
        assert ids == whole
    else:
        # Of two equally likely segmentations, float32 sums of a long text's scores may prefer the other one.
        scores = [sum(own.get_score(i) for i in x if not own.is_byte(i)) for x in (ids, whole)]
        assert len(ids) == len(whole) and scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_a_text_that_cannot_be_cut_is_cut_all_the_same_and_round_trips(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer._backend), "MAX_SEARCH", 1000)
    for text in (" " * 50_000, "a" * 50_000 + "b"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text


def test_split_text():
    places = [5, 11, 12, 31]
    pieces = list(split_text("x" * 50, size=10, max_search=8, can_cut=lambda text, p: p in places))
    assert [len(p) for p in pieces] == [11, 18, 18, 3]  # Cut at 11, then at the limit (10 + 8) twice, then the rest.


def test_hugging_face(hugging_face, texts, tmp_path):
    tokenizer = Tokenizer(hugging_face)
    assert (tokenizer.vocab_size, tokenizer.round_trips) == (400, True)
    assert (tokenizer.bos_ids, tokenizer.eos_ids) == ([], [tokenizer.eos_id]) and tokenizer.bos_id == tokenizer.eos_id
    for text in [*texts, "", "<|end|> is text <s></s>", "".join(texts) * 20]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text  # Also beyond the length limit.
        assert tokenizer.eos_id not in ids
    again = Tokenizer(tmp_path / tokenizer.save(tmp_path))
    assert again.fingerprint == tokenizer.fingerprint and again.encode("if x") == tokenizer.encode("if x")


def test_hugging_face_long_texts_have_the_ids_of_the_whole(hugging_face, texts, monkeypatch):
    tokenizer = Tokenizer(hugging_face)
    text = "".join(texts) * 2
    whole = tokenizer.encode(text)
    monkeypatch.setattr(type(tokenizer._backend), "SIZE", 1000)
    assert tokenizer.encode(text) == whole
    tokenizer.encode("a" * 20_000)


def test_a_folder_with_a_bare_model_is_sentencepiece(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert Tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_what_is_no_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is not a tokenizer that transformers can load"):
        Tokenizer(tmp_path / "empty")
