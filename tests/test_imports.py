"""Who may import whom: data flows one way, and nothing upstream knows what is downstream of it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "glalm"
CORE = {"config", "data", "kernels", "model", "hf", "pretrained", "train", "progress"}
ALLOWED = {
    "__main__": {"commands", "config.strict", "progress"},
    "config": {"model.config"},
    "cli": {"config", "launcher", "model.mixers", "progress"},
    "launcher": {"config.strict", "data.processes"},
    "kernels": set(),
    "data": {"config.strict"},
    "progress": set(),
    "prepare": {"data", "progress"},
    "model": {"config.strict", "kernels"},
    "pretrained": {"model"},
    "hf": {"config.strict", "kernels", "model", "pretrained"},
    "train": {"config", "data", "progress", "hf", "kernels", "model"},
    "generation": CORE,
    "compat": {*CORE, "evals.identity", "evals.options", "evals.result_files"},
    "evals": {*CORE, "generation", "prepare"},
    "commands": {*CORE, "cli", "compat", "evals", "prepare", "studies"},
    "studies": {*CORE, "cli", "launcher", "evals", "generation", "prepare"},
}
NO_MODEL = {"torch", "transformers", "glalm.model"}
REPORTS = ("evals.html_report", "evals.identity", "evals.plot", "evals.published", "evals.report", "evals.result_files")
PLOTS = dict.fromkeys(REPORTS, NO_MODEL)


def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> list[tuple[str, Path]]:
    names = ((p.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."), p) for p in PACKAGE.rglob("*.py"))
    return sorted((name.removesuffix(".__init__"), p) for name, p in names if name != "__init__")


@pytest.mark.parametrize("name, path", modules(), ids=[m for m, _ in modules()])
def test_imports_only_upstream(name, path):
    part = name.split(".")[0]
    for target in imports(path):
        if not target.startswith("glalm."):
            continue
        inner = target.removeprefix("glalm.")
        allowed = ALLOWED[part] | {part, "IGNORE_INDEX"}  # The constant is in glalm/__init__.py.
        assert any(inner == a or inner.startswith(a + ".") or a.startswith(inner + ".") for a in allowed), (
            f"glalm.{name} imports {target}, but glalm.{part} may import only {sorted(allowed)}"
        )


@pytest.mark.parametrize("name", PLOTS)
def test_plots_read_json_alone(name):
    path = PACKAGE / (name.replace(".", "/") + ".py")
    banned = {t for t in imports(path) for b in PLOTS[name] if t == b or t.startswith(b + ".")}
    assert not banned


def test_every_part_is_listed():
    assert {m.split(".")[0] for m, _ in modules()} == set(ALLOWED)
