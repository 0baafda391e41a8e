"""Dataclasses from trees of plain values: what is unknown or ill-typed is an error that says what to write."""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Literal


class ConfigError(ValueError):
    """A config that cannot be run. The message names the key and what to write instead."""


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that the message says in full: the command line shows no traceback."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def build(cls: type, tree: dict, where: str = ""):
    """A dataclass from a tree of plain dicts, lists and scalars. Missing keys take the dataclass's default.

    Raises ConfigError at an unknown key (with the nearest valid one) or a value of another type than the field's.
    """
    require(isinstance(tree, dict), f"{where or 'the config'} must be a mapping, not {tree!r}")
    hints = typing.get_type_hints(cls)
    for key in tree:
        require(key in hints, unknown(key, hints, where))
    return cls(**{key: _convert(hints[key], value, join(where, key)) for key, value in tree.items()})


def convert(instance, cls: type, where: str) -> None:
    """Makes the fields that `instance` has of `cls` what they are declared to be; ConfigError where one is not."""
    for name, hint in typing.get_type_hints(cls).items():
        setattr(instance, name, _convert(hint, getattr(instance, name), join(where, name)))


def defaults(cls: type) -> dict:
    """The tree of a dataclass's keys and defaults, as `build` takes it."""
    tree = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            tree[f.name] = defaults(f.type)
        else:
            value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            tree[f.name] = list(value) if isinstance(value, tuple) else value
    return tree


def check_overrides(args: list[str], cls: type, groups: list[str]) -> None:
    """Checks the keys of a command line (`a.b=c`) before Hydra sees them, since its own error names no neighbour.

    `groups` are the config groups (`model=...` chooses a file there). Raises ConfigError at the first unknown key.
    """
    for arg in args:
        key, equals, _ = arg.partition("=")
        key = key.lstrip("+~").partition("@")[0]
        if not equals or key.startswith("-") or key.split(".")[0].split("/")[0] == "hydra" or key in groups:
            continue
        level, where = cls, ""
        for part in key.split("."):
            hints = typing.get_type_hints(level) if dataclasses.is_dataclass(level) else {}
            known = hints | dict.fromkeys(groups) if not where else hints
            deeper = [] if where else [path for path in paths(cls) if path.endswith(f".{part}")]
            require(part in known, unknown(part, known, where, deeper))
            level, where = hints.get(part), join(where, part)
            if dict in map(typing.get_origin, (level, *typing.get_args(level))):
                break  # whose keys are the user's


def paths(cls: type, where: str = "") -> Iterator[str]:
    """The dotted paths of all keys of a dataclass and of those in it."""
    for name, hint in typing.get_type_hints(cls).items():
        yield join(where, name)
        if dataclasses.is_dataclass(hint):
            yield from paths(hint, join(where, name))


def unknown(key: str, known, where: str = "", deeper: Sequence[str] = ()) -> str:
    """What is wrong with a key that is not among `known`, and where it is to be found, or else the nearest that is."""
    near = deeper or [join(where, n) for n in difflib.get_close_matches(str(key), [*known], n=1, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"valid keys: {', '.join(known) or 'none'}"
    return f"unknown key {join(where, key)}; {hint}"


def join(where: str, key) -> str:
    """The dotted path of a key."""
    return f"{where}.{key}" if where else str(key)


def _convert(hint, value, where: str):
    """`value` as type `hint`, or a ConfigError. Types change only between numbers of one value, and list to tuple."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    if origin is Literal:
        near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
        hint_text = f"; did you mean {near[0]}?" if near else ""
        require(value in args, f"{where}={value} must be one of {', '.join(map(str, args))}{hint_text}")
        return value
    if origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        fits = (a for a in kinds if isinstance(value, typing.get_origin(a) or a))
        return _convert(next(fits, kinds[0]), value, where)
    if origin is dict:
        require(isinstance(value, dict), f"{where}={value!r} must be a mapping: {where}={{a: 1, b: 2}}")
        return {str(k): _convert(args[1], v, join(where, k)) for k, v in value.items()}
    if origin is list:
        require(isinstance(value, list), f"{where}={value!r} must be a list: {where}=[a,b]")
        return [_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is tuple:
        ok = isinstance(value, (list, tuple)) and len(value) == len(args)
        require(ok, f"{where}={value!r} must be a list of {len(args)} values")
        return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is int and isinstance(value, float) and value.is_integer():  # and 15e9 as a float
        return int(value)
    ok = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
    require(ok, f"{where}={value!r} must be {_spell(hint)}, not {_spell(type(value))}")
    # A home that the shell left as it is, or a file has.
    return os.path.expanduser(value) if hint is str and value.startswith("~/") else value


def _spell(hint) -> str:
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, f"a {hint.__name__}")


def divisors(n: float) -> str:
    """What to write instead of a number that does not divide `n`."""
    n = int(n)
    return "write one of " + ", ".join(str(d) for d in range(1, n + 1) if n % d == 0 and (n < 64 or d <= 64))
