"""Generate pages of the site while MkDocs builds it: the root's pages, the config keys and the API reference.

MkDocs calls the functions `on_*` (https://www.mkdocs.org/user-guide/plugins/#events).
"""

import dataclasses
import inspect
import json
import textwrap
import typing
from ast import AnnAssign, get_docstring, parse, unparse
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

from glalm.cli import CONFIGS
from glalm.config.key_help import read_field_comments
from glalm.config.strict import default_tree, join_key
from glalm.evals.options import EvalConfig, TrainingRun
from glalm.studies.mqar import MQARConfig

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
API_PACKAGES = ("kernels", "model", "model/mixers", "train", "generation")


def on_config(config: MkDocsConfig) -> None:
    """Append the modules to the navigation."""
    reference = next(section["Reference"] for section in config.nav if "Reference" in section)
    for package in API_PACKAGES:
        folder = ROOT / "glalm" / package
        pages = [{module_name(path): api_page(path)} for path in (folder, *modules(package))]
        reference.append({module_name(folder): pages})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the generated pages to those of docs/."""
    pages = {target: site_links((ROOT / source).read_text()) for source, target in ROOT_PAGES.items()}
    pages["config_keys.md"] = config_page()
    for package in API_PACKAGES:
        folder = ROOT / "glalm" / package
        pages[api_page(folder)] = f"::: {module_name(folder)}\n\n## Modules\n\n{module_table(package)}\n"
        for path in modules(package):
            pages[api_page(path)] = f"::: {module_name(path)}\n"
    for target, content in pages.items():
        files.append(File.generated(config, target, content=content))
    files.append(File.generated(config, "CITATION.cff", abs_src_path=str(ROOT / "CITATION.cff")))


def site_links(text: str) -> str:
    """Return a page of the repository's root with links as they are from docs/."""
    return text.replace("](docs/", "](").replace("[docs/", "[")


def modules(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / "glalm" / package).glob("*.py") if path.stem != "__init__")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def api_page(path: Path) -> str:
    return f"api/{module_name(path)}.md"


def module_table(package: str) -> str:
    """Return a Markdown table of a package's modules, each with the first paragraph of its docstring."""
    lines = ["| module | |", "|-|-|"]
    for path in modules(package):
        summary = (get_docstring(parse(path.read_text())) or "").partition("\n\n")[0].replace("\n", " ")
        lines.append(f"| [{module_name(path)}]({module_name(path)}.md) | {summary} |")
    return "\n".join(lines)


# Config keys ------------------------------------------------------------------------------------------------


def config_page() -> str:
    """Return the page of all config keys of the commands that Hydra configures."""
    parts = [
        "# Config keys\n\n"
        "Every key that [`KEY=VALUE`](getting-started.md#change-settings) can set, with its type and default. The "
        "files that `GROUP=CHOICE` names set several keys at once, and a command without arguments uses the choices in "
        "`configs/train.yaml`, `eval.yaml` or `mqar.yaml`. `glalm train --help` shows the values that a command line "
        "results in."
    ]
    described = {}
    for command, cls in (("train", TrainingRun), ("eval", EvalConfig), ("mqar", MQARConfig)):
        parts.append(f"## glalm {command}\n\n{describe_class(cls)}\n\n{key_table(cls, default_tree(cls))}")
        for key, level, defaults in nested_levels(cls, default_tree(cls)):
            if level in described:
                parts.append(f"`{key}` has the keys of {described[level]}.")
                continue
            heading = f"glalm {command}: {key}"
            described[level] = f"[{heading}](#{slugify(case='lower')(heading, '-')})"
            parts.append(f"### {heading}\n\n{describe_class(level)}{choices(key)}\n\n{key_table(level, defaults, key)}")
    return "\n\n".join(parts) + "\n"


def nested_levels(cls: type, defaults: dict, where: str = "") -> Iterator[tuple[str, type, dict]]:
    """Yield (dotted key, dataclass, default values) of every level below `cls`."""
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            key = join_key(where, name)
            yield key, hint, defaults[name]
            yield from nested_levels(hint, defaults[name], key)


def describe_class(cls: type) -> str:
    """Return the docstring of a level's class, without the signature that dataclasses writes where there is none."""
    text = inspect.getdoc(cls) or ""
    return "" if text.startswith(f"{cls.__name__}(") else text


def choices(key: str) -> str:
    """Return a paragraph with the files of the config group `key`, or nothing if it is not a group."""
    names = sorted(path.stem for path in (CONFIGS / key).glob("*.yaml"))
    return f"\n\nChoices of `{key}=`: {', '.join(names)}." if names else ""


def key_table(cls: type, defaults: dict, where: str = "") -> str:
    """Return a Markdown table of the keys of a dataclass that are not levels themselves."""
    lines = ["| key | type | default | meaning |", "|-|-|-|-|"]
    comments = field_comments(cls)
    types = field_types(cls)
    for name, hint in typing.get_type_hints(cls).items():
        if not dataclasses.is_dataclass(hint):
            default = json.dumps(defaults[name])
            key = join_key(where, name)
            lines.append(f"| `{key}` | `{types[name]}` | `{default}` | {comments.get(name, '')} |")
    return "\n".join(lines)


def field_types(cls: type) -> dict[str, str]:
    """Return the annotation of each field as it is written, with the values of a Literal in its place."""
    types = {}
    for base in reversed(cls.__mro__):
        for node in annotated_fields(base):
            text = unparse(node.annotation).replace("'", "")
            hint = typing.get_type_hints(cls)[node.target.id]
            literal = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
            types[node.target.id] = ", ".join(map(str, literal)) or text.replace("None", "null")
    return types


def field_comments(cls: type) -> dict[str, str]:
    """Return what the comments above and after each field of a dataclass say, in Markdown."""
    comments = {}
    for name, comment in read_field_comments(cls).items():
        text = f"{comment.above} {comment.after}".strip()
        comments[name] = text.replace("|", "\\|").replace("*", "\\*")
    return comments


def annotated_fields(cls: type) -> list[AnnAssign]:
    """Return the statements of a dataclass's source that declare its fields, inherited ones excluded."""
    if not dataclasses.is_dataclass(cls):
        return []
    (definition,) = parse(textwrap.dedent(inspect.getsource(cls))).body
    return [node for node in definition.body if isinstance(node, AnnAssign)]
