"""Check the documentation without rendering it: commands parse, and links and their anchors exist."""

import argparse
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

from glalm.__main__ import COMMANDS, load_command
from glalm.cli import CONFIGS, check_choices, check_plugins, compose_config, normalize_overrides
from glalm.config.strict import check_overrides, iterate_key_paths
from glalm.evals.options import EvalConfig, TrainingRun
from glalm.launcher import register_launcher
from glalm.studies.mqar import MQARConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
HYDRA_COMMANDS = {"train": TrainingRun, "eval": EvalConfig, "mqar": MQARConfig}
# The reader of these pages writes the file of this choice or the module of this mixer.
WRITTEN_BY_READER = re.compile(r"model=(linearized|average_tiny)|model\.mixer=average|.*(package\.module|average):.*")


class Parsed(BaseException):
    """The command line of a command that uses argparse is valid."""


def shell_commands(page: Path) -> list[list[str]]:
    """Return the commands of a page's shell blocks as words, without the lines' comments."""
    commands = []
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            separators = [i for i, word in enumerate(words) if word in ("&&", "|", ">")]
            for start, end in zip([-1, *separators], [*separators, len(words)], strict=True):
                commands.append(words[start + 1 : end])
    return commands


def glalm_commands() -> list[tuple[str, ...]]:
    """Return the words after `glalm` of every such command in the shell blocks, whatever launches it."""
    found = {}
    for page in PAGES:
        for words in shell_commands(page):
            # A launcher names the module; whatever precedes it is for the launcher.
            starts = [i + 2 for i in range(len(words) - 1) if words[i : i + 2] == ["-m", "glalm"]]
            if words[:1] == ["glalm"]:
                starts = [1]
            for start in starts:
                found[tuple(words[start:])] = None
    return list(found)


def inline_code(page: Path) -> list[str]:
    """Return the code spans of a page's prose, each on one line."""
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site name them."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("words", glalm_commands(), ids=" ".join)
def test_command_parses(words, monkeypatch):
    command, *arguments = words
    arguments = [argument for argument in arguments if not WRITTEN_BY_READER.fullmatch(argument)]
    if command in HYDRA_COMMANDS:
        overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
        check_choices(overrides)
        register_launcher()
        if "--multirun" in arguments:
            check_overrides(overrides, HYDRA_COMMANDS[command], [path.name for path in CONFIGS.iterdir()])
            check_plugins(overrides)
            overrides = normalize_overrides(overrides)
        compose_config(HYDRA_COMMANDS[command], command, overrides)
        return

    def stop_after(parse):
        def parse_and_stop(*args):
            parse(*args)
            raise Parsed

        return parse_and_stop

    for method in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, method)
        monkeypatch.setattr(argparse.ArgumentParser, method, stop_after(parse))
    monkeypatch.setattr(sys, "argv", ["glalm", *arguments])
    with pytest.raises(Parsed):
        load_command(command)()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_inline_code_names_existing_commands_and_keys(page):
    for span in inline_code(page):
        if match := re.match(r"(?:python -m )?glalm ([a-z]\w*)", span):
            assert match[1] in COMMANDS, span
        for key in re.findall(r"(?:^|(?<=[ ']))([a-z_0-9]+(?:\.[a-z_0-9]+)+)=", span):
            errors = []
            for cls in HYDRA_COMMANDS.values():
                try:
                    check_overrides([f"{key}="], cls, [])
                except ValueError as error:
                    errors.append(error)
            assert len(errors) < len(HYDRA_COMMANDS), (span, errors)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_exist(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_config_key_is_on_its_page(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    site_pages = import_module("site_pages")
    page = site_pages.config_page()
    for cls in HYDRA_COMMANDS.values():
        for key in iterate_key_paths(cls):
            table_key = re.search(rf"^\| `(.*\.)?{re.escape(key.rpartition('.')[2])}` \|", page, re.MULTILINE)
            assert table_key or re.search(rf"^###.* {re.escape(key)}$|^`{re.escape(key)}` has", page, re.MULTILINE), key
    assert "| `data.seq_len` | `int` | `256` | T: tokens of a training sequence |" in page
    # A comment above a key, and one after it.
    assert '| `model.gla.gate` | `vector, scalar, fixed, none` | `"vector"` | vector: one forget gate' in page
    assert "`generate` has the keys of [glalm train: train_evals.generate](#glalm-train-train_evalsgenerate)." in page


def test_navigation_of_the_site_lists_every_page():
    listed = re.findall(r"^ +- (?:.*: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(listed) == len({*listed})
    assert {path.name for path in ROOT.glob("docs/*.md")} <= {*listed}
