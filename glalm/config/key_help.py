"""The meaning of each key of a config, from the comments in the source of its dataclass."""

import ast
import dataclasses
import difflib
import inspect
import io
import textwrap
import tokenize
import typing


@dataclasses.dataclass(frozen=True)
class FieldComment:
    """The comments of a dataclass's field: on the lines above it, and at the end of its own. Empty: it has none."""

    above: str
    after: str


def describe_keys(cls: type, where: str = "") -> dict[str, str]:
    """Return {dotted key: meaning} of all keys of a dataclass, nested ones included. Empty: its comment says nothing.

    A field's meaning is the comment at the end of its line, or else the lines of comment above it. The meaning of a
    nested dataclass is the first line of its docstring.
    """
    comments = read_field_comments(cls)
    meanings = {}
    for name, hint in typing.get_type_hints(cls).items():
        key = f"{where}.{name}" if where else name
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            docstring = hint.__doc__ or ""
            is_own = not docstring.startswith(f"{hint.__name__}(")  # @dataclass writes the signature otherwise.
            meanings[key] = docstring.partition("\n")[0] if is_own else ""
            meanings |= describe_keys(hint, key)
        else:
            meanings[key] = comments[name].after or comments[name].above if name in comments else ""
    return meanings


def read_field_comments(cls: type) -> dict[str, FieldComment]:
    """Return the comments of the fields of a dataclass that have one. A field declared again keeps an inherited one."""
    comments: dict[str, FieldComment] = {}
    for parent in reversed(cls.__mro__):
        if dataclasses.is_dataclass(parent):
            comments |= _read_own_comments(parent)
    return comments


def _read_own_comments(cls: type) -> dict[str, FieldComment]:
    """Return the comments of the fields that the source of a class defines, of those that have one."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # The class was not read from a file.
        return {}
    comment_lines: dict[int, str] = {}
    inline: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            is_whole_line = not token.line[: token.start[1]].strip()
            (comment_lines if is_whole_line else inline)[token.start[0]] = token.string.lstrip("# ")
    comments = {}
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above: list[str] = []
        line = node.lineno - 1
        while line in comment_lines:
            above.insert(0, comment_lines[line])
            line -= 1
        comment = FieldComment(" ".join(above), inline.get(node.end_lineno or node.lineno, ""))
        if comment.above or comment.after:
            comments[node.target.id] = comment
    return comments


def find_keys(name: str, meanings: dict[str, str]) -> list[str]:
    """Return the keys that `name` may mean: with this last name, or else whose meaning has its words, or alike ones.

    "learning_rate" finds optim.lr, whose meaning is "peak learning rate".
    """
    leaf = name.rpartition(".")[2]
    same = [key for key in meanings if key.rpartition(".")[2] == leaf]
    phrase = leaf.replace("_", " ")
    in_meaning = [key for key, meaning in meanings.items() if meaning.endswith(phrase) and " " in phrase]
    leaves = {key.rpartition(".")[2] for key in meanings}
    near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    alike = [key for key in meanings if key.rpartition(".")[2] in near]
    # Keys of evaluators in training repeat those of the run; the shortest path is the likeliest.
    return sorted(same or in_meaning or alike, key=lambda key: key.count("."))[:3]
