import importlib.util
import os
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
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
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == own.encode(text)


def test_a_text_that_cannot_be_cut_is_encoded_as_a_whole(tokenizer):
    for text in (" " * 50_000, "a" * 50_000 + "b"):
        ids = tokenizer.encode(text)
        assert ids == tokenizer._backend.processor.encode(text)
        assert tokenizer.decode(ids) == text


def test_split_text():
    places = [5, 11, 12, 31]
    pieces = list(split_text("x" * 50, size=10, can_cut=lambda text, place: place in places))
    assert [len(piece) for piece in pieces] == [11, 20, 19]  # Cut at 11 and 31; nothing can be cut after that.


# Text that normalizers change, that vocabularies lack, and that special symbols and tokens are in.
ATOMS = [" ", "  ", "\n", "\t", "a", "the", "river", "ing", "stone and", "12", "xxxxxxx", "漢", "漢漢漢漢漢", "é", "ﬁ"]
ATOMS += ["e\u0301", "Ａ", "\u3000", "\u00a0", "\u200b", "\ufeff", "①", "ｶﾞ", "가", "😀", "\0", "<s>", "zz", "ab", "—"]
any_text = st.lists(st.one_of(st.sampled_from(ATOMS), st.characters(exclude_categories=["Cs"])), max_size=40)
SENTENCES = [
    f"the river {i} walked to the stone and saw a king — naïve e\u0301té ﬁne 漢字 ＡＢＣ  two" for i in range(100)
]


def train_model(path, **options):
    """Train a SentencePiece model and return it as a Tokenizer."""
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_writer=file,
            hard_vocab_limit=False,
            minloglevel=2,
            num_threads=1,
            **options,
        )
    return Tokenizer(path)


def check_piece_sizes(tokenizer, parts, size, monkeypatch):
    """Compare the ids of a text, encoded in pieces of `size` characters, with SentencePiece's ids of the whole."""
    backend = tokenizer._backend
    text = "".join(parts)
    if backend._mark_ids is not None:
        text = text.replace("\u2581", "_")
    monkeypatch.setattr(backend, "SIZE", size, raising=False)
    assert tokenizer.encode(text) == backend.processor.encode(text)


SENTENCEPIECE = {
    "bpe": {"model_type": "bpe"},
    "bpe without prefix": {"model_type": "bpe", "add_dummy_prefix": False},
    "bpe that keeps spaces": {"model_type": "bpe", "remove_extra_whitespaces": False, "byte_fallback": True},
    "bpe that keeps all": {
        "model_type": "bpe",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    },
    "bpe with bytes": {"model_type": "bpe", "add_dummy_prefix": False, "byte_fallback": True},
    "bpe with a suffix": {"model_type": "bpe", "treat_whitespace_as_suffix": True, "split_by_whitespace": False},
    "bpe with symbols": {
        "model_type": "bpe",
        "user_defined_symbols": ["zz", "ab ", "漢字"],
        "control_symbols": ["<s>"],
    },
    "bpe that folds case": {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": True},
    "unigram": {"model_type": "unigram"},
    "unigram with bytes": {"model_type": "unigram", "byte_fallback": True, "add_dummy_prefix": False},
    "word": {"model_type": "word"},
    "char": {"model_type": "char"},
}


@pytest.fixture(scope="module", params=SENTENCEPIECE)
def any_sentencepiece(request, tmp_path_factory):
    options = SENTENCEPIECE[request.param]
    return train_model(tmp_path_factory.mktemp("any") / "t.model", vocab_size=350, **options)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=any_text, size=st.integers(1, 20))
@example(parts=["the river ", "漢" * 30, " the stone"], size=1)
@example(parts=["the river walked "] * 9, size=4)
@example(parts=["  two  ", "a  "], size=1)
def test_ids_do_not_depend_on_the_size_of_pieces(any_sentencepiece, parts, size, monkeypatch):
    check_piece_sizes(any_sentencepiece, parts, size, monkeypatch)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ids_do_not_depend_on_the_size_of_pieces_for_any_settings(data, tmp_path_factory, monkeypatch):
    switches = ["add_dummy_prefix", "remove_extra_whitespaces", "byte_fallback", "treat_whitespace_as_suffix"]
    switches += ["split_by_whitespace", "split_by_unicode_script", "allow_whitespace_only_pieces", "split_digits"]
    options = {name: data.draw(st.booleans(), label=name) for name in switches}
    options["normalization_rule_name"] = data.draw(st.sampled_from(["identity", "nfkc", "nmt_nfkc", "nmt_nfkc_cf"]))
    options["user_defined_symbols"] = data.draw(st.sampled_from([[], ["zz", "ab"], ["ab ", "a"], ["\n"]]))
    options["vocab_size"] = data.draw(st.sampled_from([300, 400]))
    tokenizer = train_model(tmp_path_factory.mktemp("any") / "t.model", model_type="bpe", **options)
    for _ in range(20):
        check_piece_sizes(tokenizer, data.draw(any_text), data.draw(st.integers(1, 20)), monkeypatch)


def test_a_model_with_unused_tokens_is_not_cut(tmp_path):
    """Such a token is split as it was merged last, wherever that was in the text."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    train_model(tmp_path / "t.model", model_type="bpe", vocab_size=350)
    model = ModelProto.FromString((tmp_path / "t.model").read_bytes())
    for piece in model.pieces:
        if piece.piece == "ver":
            piece.type = piece.UNUSED
    (tmp_path / "t.model").write_bytes(model.SerializeToString())
    tokenizer = Tokenizer(tmp_path / "t.model")
    text = "the river " * 1000
    assert tokenizer.encode(text) == tokenizer._backend.processor.encode(text)
    assert tokenizer._backend._piece_encoder is None


def build_fast_tokenizer(name):
    """Return one of the families of fast tokenizers, trained on SENTENCES."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>"]
    metaspace = "\u2581"
    model, trainer = models.BPE(unk_token="<unk>"), trainers.BpeTrainer
    if name == "unigram":
        model, trainer = models.Unigram(), trainers.UnigramTrainer
    if name == "wordpiece":
        model, trainer = models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer
    fast = Tokenizer(model)
    fast.normalizer = {
        "prepend": normalizers.Sequence([normalizers.Prepend(metaspace), normalizers.Replace(" ", metaspace)]),
        "strip": normalizers.Strip(),
        "nfkc": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
        "wordpiece": normalizers.BertNormalizer(),
    }.get(name)
    fast.pre_tokenizer = {
        "byte level": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "wordpiece": pre_tokenizers.BertPreTokenizer(),
        "prepend": None,
    }.get(name, pre_tokenizers.Metaspace(prepend_scheme="first" if name == "metaspace" else "never"))
    options = {"unk_token": "<unk>"} if name == "unigram" else {}
    fast.train_from_iterator(SENTENCES, trainer(vocab_size=350, special_tokens=special, show_progress=False, **options))
    fast.add_tokens(["zz"])
    return fast


FAST = ["byte level", "prefix space", "metaspace", "prepend", "strip", "nfkc", "unigram", "wordpiece"]


@pytest.fixture(scope="module", params=FAST)
def any_fast(request, tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    fast = build_fast_tokenizer(request.param)
    folder = tmp_path_factory.mktemp("fast")
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    fast.encode_special_tokens = True
    return Tokenizer(folder), fast


@settings(max_examples=20)
@given(parts=any_text, times=st.sampled_from([1, 1, 1, 200]))
@example(parts=["river "], times=20_000)
@example(parts=["1234567,"], times=15_000)
def test_hugging_face_ids_are_those_of_the_library(any_fast, parts, times):
    tokenizer, fast = any_fast
    text = "".join(parts) * times
    assert tokenizer.encode(text) == fast.encode(text, add_special_tokens=False).ids


def test_a_vocabulary_may_have_gaps(tmp_path):
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fast = Fast(models.WordLevel({"<unk>": 0, "</s>": 1, "river": 70_000}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.encode("a river"), tokenizer.vocab_size) == ([0, 70_000], 70_001)


def test_dropout_of_merges_is_switched_off(tmp_path):
    fast = build_fast_tokenizer("byte level")
    expected = fast.encode(SENTENCES[0], add_special_tokens=False).ids
    fast.model.dropout = 0.5
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", eos="</s>")
    assert tokenizer.encode(SENTENCES[0]) == expected
    tokenizer = Tokenizer(tmp_path / tokenizer.save(tmp_path))
    assert tokenizer.encode(SENTENCES[0]) == expected


def test_a_vocabulary_without_an_unknown_token_is_named(tmp_path):
    from tokenizers import Tokenizer as Fast
    from tokenizers import models

    Fast(models.WordLevel({"river": 0, "</s>": 1})).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"cannot encode the text .* Give the tokenizer a token"):
        Tokenizer(tmp_path / "tokenizer.json", eos="</s>")


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


def test_hugging_face_long_texts_have_the_ids_of_the_whole(hugging_face, texts):
    tokenizer = Tokenizer(hugging_face)
    for text in ("".join(texts) * 20, "a" * 20_000):
        assert tokenizer.encode(text) == tokenizer._backend.backend.encode(text, add_special_tokens=False).ids


def test_a_folder_whose_name_is_not_utf8(hugging_face, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/donn\xe9es"))
    folder.mkdir()
    tokenizer = Tokenizer(hugging_face)
    again = Tokenizer(folder / tokenizer.save(folder))
    assert again.fingerprint == tokenizer.fingerprint and again.encode("if x") == tokenizer.encode("if x")


def test_a_folder_with_a_bare_model_is_sentencepiece(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert Tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_what_is_no_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is not a tokenizer that transformers can load"):
        Tokenizer(tmp_path / "empty")
