"""Text in a field of any name, with a bare tokenizer.json: what `glalm prepare` says and leaves behind."""

import json
import sys

import pytest
from tokenizers import Tokenizer as JsonTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from glalm.commands.prepare_data import prepare
from glalm.data.shards import TokenSet
from glalm.data.tokenizer import Tokenizer
from glalm.prepare.pipeline import prepare_data
from glalm.prepare.set_folder import remove_set

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer_json(texts, tmp_path_factory):
    """A file as the tokenizers library saves it: nothing in it says which token ends a document."""
    model = JsonTokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|pad|>", END], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    path = tmp_path_factory.mktemp("own") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture
def articles(texts, tmp_path):
    path = tmp_path / "articles.jsonl"
    rows = [{"title": f"number {i}", "body": text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*arguments): what `glalm prepare` prints to stdout."""

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["glalm prepare", *map(str, arguments)])
        capsys.readouterr()
        assert prepare() == 0
        return capsys.readouterr().out

    return run


def test_tokens_are_those_of_the_library(tokenizer_json, articles, texts, tmp_path):
    given = {"tokenizer": tokenizer_json, "eos": END, "held_out": {}, "text_field": "body", "progress": False}
    manifest = prepare_data([articles], tmp_path / "set", **given)
    library = JsonTokenizer.from_file(str(tokenizer_json))
    tokens = TokenSet(tmp_path / "set", "train")
    assert tokens.eos_id == tokens.bos_id == library.token_to_id(END) == 1
    for i, text in enumerate(texts):
        assert tokens.read_document(i).tolist() == [*library.encode(text).ids, 1]
    saved = Tokenizer(tokens.tokenizer_path)  # The set's folder names the token, so that nobody has to again.
    assert (saved.eos_id, saved.vocab_size) == (1, 400)
    assert saved.fingerprint == manifest["tokenizer"]["fingerprint"] == Tokenizer(tokenizer_json, END).fingerprint
    assert saved.decode(tokens.read_document(3).tolist()) == texts[3]


def test_a_token_that_is_not_yet_special_ends_documents(texts, tmp_path):
    """A word of the vocabulary becomes special: spelled in a text, it is text."""
    vocabulary = {"<unk>": 0, "END": 1, "a": 2, "E": 3, "N": 4, "D": 5, " ": 6}
    path = tmp_path / "tokenizer.json"
    JsonTokenizer(models.BPE(vocabulary, [], unk_token="<unk>")).save(str(path))
    (tmp_path / "a.txt").write_text("a END a")
    prepare_data([tmp_path / "a.txt"], tmp_path / "set", tokenizer=path, eos="END", held_out={}, progress=False)
    tokens = TokenSet(tmp_path / "set", "train")
    assert tokens.read_document(0).tolist() == [2, 6, 3, 4, 5, 6, 2, 1]
    assert Tokenizer(tokens.tokenizer_path).fingerprint == tokens.tokenizer_fingerprint


def test_errors_say_which_flag_to_write(tokenizer_json, prepared, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json names no end-of.*--eos TOKEN\. It has <\|pad\|>, <\|endof"):
        Tokenizer(tokenizer_json)
    with pytest.raises(ValueError, match=r"--eos </s>: the tokenizer has no such token\. .*It has <\|pad\|>, <\|endof"):
        Tokenizer(tokenizer_json, "</s>")
    with pytest.raises(ValueError, match=r"--eos is for Hugging Face tokenizers"):
        Tokenizer(prepared / "tokenizer.model", "</s>")
    with pytest.raises(FileNotFoundError, match=r"absent\.json does not exist"):
        Tokenizer(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer that transformers can load"):
        Tokenizer(tmp_path / "bad.json", END)
    (tmp_path / "folder").mkdir()
    for content in ("{}", "[]", "null"):
        (tmp_path / "folder/tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"folder is not a tokenizer that transformers can load \(\w+: "):
            Tokenizer(tmp_path / "folder", END)


def test_a_refused_first_try_leaves_nothing(tokenizer_json, articles, tmp_path):
    out = tmp_path / "set"
    refused = [
        ({"tokenizer": tokenizer_json, "eos": END}, r"no field 'text'"),
        ({"tokenizer": tokenizer_json, "text_field": "body"}, r"--eos TOKEN"),
        ({"tokenizer": tokenizer_json, "eos": END, "text_field": "body", "source_field": "x"}, r"no field 'x'"),
        ({}, r"no field 'text'"),
        ({"text_field": "body", "vocab_size": 10**6}, r"--vocab-size 1000000 does not fit"),
    ]
    for settings, message in refused:
        with pytest.raises(ValueError, match=message):
            prepare_data([articles], out, progress=False, **settings)
        assert not out.exists(), settings
    manifest = prepare_data([articles], out, tokenizer=tokenizer_json, eos=END, text_field="body", progress=False)
    assert manifest["complete"] and next(iter(manifest["books"].values()))["written"] == 60


def test_the_users_own_empty_folder_stays(articles, tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match="no field 'text'"):
        prepare_data([articles], tmp_path / "set", progress=False)
    assert list((tmp_path / "set").iterdir()) == []


def test_a_tokenizer_with_several_chat_templates_is_part_of_the_set(tokenizer_json, articles, tmp_path):
    """transformers writes all but the default one into a folder below that of the tokenizer."""
    templates = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    original = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_json), eos_token=END, chat_template=templates)
    original.save_pretrained(tmp_path / "original")
    given = {"tokenizer": tmp_path / "original", "text_field": "body", "progress": False}
    out = tmp_path / "set"
    for overwrite in (False, True):
        manifest = prepare_data([articles], out, overwrite=overwrite, **given)
    saved = [entry["file"] for entry in manifest["tokenizer"]["files"]]
    assert saved == sorted(path.relative_to(out).as_posix() for path in (out / "tokenizer").rglob("*.j*"))
    assert "tokenizer/additional_chat_templates/rag.jinja" in saved
    assert PreTrainedTokenizerFast.from_pretrained(out / "tokenizer").chat_template == templates
    remove_set(out)
    assert list(out.iterdir()) == []


def test_another_end_is_another_set(tokenizer_json, articles, tmp_path):
    given = {"tokenizer": tokenizer_json, "text_field": "body", "progress": False}
    prepare_data([articles], tmp_path / "set", eos=END, **given)
    with pytest.raises(ValueError, match=r"prepared otherwise \(different (--tokenizer, )?--eos\)"):
        prepare_data([articles], tmp_path / "set", eos="<|pad|>", **given)


def test_a_complete_set_says_so_in_one_line(command, tokenizer_json, articles, tmp_path):
    out = tmp_path / "set"
    arguments = ["--out", out, "--tokenizer", tokenizer_json, "--eos", END, "--text-field", "body", articles]
    assert f"{out} is ready: vocabulary of 400, prepared in" in command(*arguments)
    splits = json.loads((out / "manifest.json").read_text())["splits"].values()
    tokens = sum(split["tokens"] for split in splits)
    assert command(*arguments) == (
        f"{out} is already complete: 60 documents, {tokens:,} tokens, vocabulary of 400. To see what is in it, run: "
        f"glalm prepare inspect {out}\n"
    )
    assert "is ready" in command(*arguments, "--overwrite")
    (articles.parent / "more.txt").write_text("more text")
    assert "is ready" in command("--out", out, "--add", articles.parent / "more.txt")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--eos", END, "x.txt"], "Add --tokenizer"),
        (["--add", "--eos", END, "x.txt"], "Remove --eos"),
        (["--validation", "1", "x.txt"], None),
        (["--workers", "0", "x.txt"], None),
        (["--shard-tokens", "0", "x.txt"], None),
    ],
)
def test_errors_of_the_command_speak_in_flags(command, capsys, arguments, message, tmp_path):
    with pytest.raises((SystemExit, ValueError)) as error:
        command("--out", tmp_path / "set", *arguments)
    text = capsys.readouterr().err if message else str(error.value)
    assert (message or " ".join(arguments[:2])) in text
    assert not (tmp_path / "set").exists()


def test_a_note_says_that_no_document_is_held_out(command, tokenizer_json, articles, tmp_path):
    arguments = ["--tokenizer", tokenizer_json, "--eos", END, "--text-field", "body", articles]
    note = "Note: no document is in the validation split"
    assert note not in command("--out", tmp_path / "set", "--validation", "0.5", *arguments)
    assert note in command("--out", tmp_path / "all", "--validation", "0", *arguments)
