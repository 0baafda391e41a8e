"""Build dataclasses from plain trees, such as YAML files, and refuse unknown keys and values of a wrong type.

pydantic would be the usual library, but a pydantic dataclass loses its checks without a warning when transformers'
config classes inherit from it.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal

from glalm.config.key_help import describe_keys, find_keys

TYPE_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}


class ConfigError(ValueError):
    """The config cannot be run. The message names the key and what to set instead."""


class RunError(RuntimeError):
    """The run cannot continue. The message says everything, so the command line shows no traceback."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition`."""
    if not condition:
        raise ConfigError(message)


def refuse_url(where: str, value: str | None) -> None:
    """Raise ConfigError if `value` is a URL. As a path it would be a local folder, such as `s3:`."""
    is_url = value is not None and re.match(r"[A-Za-z][\w+.-]+://", value)
    require(
        not is_url,
        f"{where}{value} is a URL, but glalm reads and writes files only. Mount the bucket as a folder (mountpoint-s3, "
        "gcsfuse, rclone mount) or copy it to a disk (aws s3 sync, rclone copy), then give that path.",
    )


def require_positive(config, where: str, *names: str, finite: bool = False) -> None:
    """Raise ConfigError unless each of the fields `names` of `config` is None or positive (and finite)."""
    wanted = "positive and finite" if finite else "positive"
    for name in names:
        value = getattr(config, name)
        valid = value is None or (value > 0 and not (finite and math.isinf(value)))
        require(valid, f"{where}.{name} must be {wanted}, not {value}")


def build_dataclass(cls: type, tree: dict, where: str = ""):
    """Return a `cls` with the values of a tree of dicts, lists and scalars.

    Args:
        cls: A dataclass, whose fields may be dataclasses.
        tree: Keys that it lacks take the field's default.
        where: The dotted path of the tree in the whole config, for messages.

    Raises:
        ConfigError: A key is unknown, and the message names the nearest valid one; or a value has a wrong type.
    """
    require(isinstance(tree, dict), f"{where or 'the config'} must be a mapping, not {tree!r}")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise ConfigError(describe_unknown_key(key, hints, where))
    return cls(**{key: _convert_value(hints[key], value, join_key(where, key)) for key, value in tree.items()})


def convert_fields(instance, cls: type, where: str) -> None:
    """Convert the fields of `cls` that `instance` has to their declared types, in place, or raise ConfigError.

    For classes that are not built by `build_dataclass`, such as transformers' configs.
    """
    for name, hint in typing.get_type_hints(cls).items():
        setattr(instance, name, _convert_value(hint, getattr(instance, name), join_key(where, name)))


def default_tree(cls: type) -> dict:
    """Return the keys and default values of a dataclass as a tree that `build_dataclass` accepts."""
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            tree[field.name] = default_tree(field.type)
        elif field.default_factory is not dataclasses.MISSING:
            tree[field.name] = field.default_factory()
        else:
            tree[field.name] = list(field.default) if isinstance(field.default, tuple) else field.default
    return tree


def flatten_tree(tree: dict, where: str = "") -> dict[str, Any]:
    """Return a nested dict as {"a.b": value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten_tree(value, join_key(where, key)) if isinstance(value, dict) else {join_key(where, key): value}
    return flat


def join_key(where: str, key) -> str:
    """Return the dotted path of a key."""
    return f"{where}.{key}" if where else str(key)


def check_overrides(args: Iterable[str], cls: type, groups: list[str]) -> None:
    """Check the keys of a command line before Hydra does, because Hydra's own error suggests no valid key.

    Args:
        args: Such as `train.steps=3`. Flags, and keys of Hydra itself, are skipped.
        cls: The dataclass of the whole config.
        groups: The config groups; `model=NAME` chooses a file of the group "model".

    Raises:
        ConfigError: A key is unknown.
    """
    for arg in args:
        key, equals, _ = arg.partition("=")
        key = key.lstrip("+~").partition("@")[0]
        is_hydra_key = key.split(".")[0].split("/")[0] == "hydra"
        if equals and not key.startswith("-") and not is_hydra_key and key not in groups:
            _check_key(key, cls, groups)


def _check_key(key: str, cls: type, groups: list[str]) -> None:
    level: Any = cls  # the type of the part of the config that `where` names
    where = ""
    for part in key.split("."):
        # The user chooses the keys of a mapping, which a level may be or have as an alternative to null.
        mappings = (hint for hint in (level, *typing.get_args(level)) if typing.get_origin(hint) is dict)
        if mapping := next(mappings, None):
            level = typing.get_args(mapping)[1]
            where = join_key(where, part)
            if not dataclasses.is_dataclass(level):
                return
            continue
        hints = typing.get_type_hints(level) if dataclasses.is_dataclass(level) else {}
        known = hints
        matches_elsewhere = []
        if not where:
            known = hints | dict.fromkeys(groups)
            near = difflib.get_close_matches(part, known, n=1, cutoff=0.8)
            matches_elsewhere = [path for path in iterate_key_paths(cls) if path.endswith(f".{part}")]
            matches_elsewhere = near + matches_elsewhere or find_keys(part, describe_keys(cls))
        require(part in known, describe_unknown_key(part, known, where, matches_elsewhere))
        level = hints.get(part)
        where = join_key(where, part)


def iterate_key_paths(cls: type, where: str = "") -> Iterator[str]:
    """Yield the dotted paths of all keys of a dataclass, nested ones included."""
    for name, hint in typing.get_type_hints(cls).items():
        yield join_key(where, name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from iterate_key_paths(hint, join_key(where, name))


def describe_unknown_key(key: str, known: Iterable[str], where: str = "", elsewhere: Sequence[str] = ()) -> str:
    """Return an error message for a key that is not in `known`.

    It suggests the key's paths `elsewhere` in the config if there are any, or else the most similar known key.
    """
    known = [*known]
    suggestions = elsewhere or [
        join_key(where, name) for name in difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    ]
    hint = f"did you mean {' or '.join(suggestions)}?" if suggestions else f"valid keys: {', '.join(known) or 'none'}"
    return f"unknown key {join_key(where, key)}; {hint}"


def describe_divisors(number: int) -> str:
    """Return advice for a value that should divide `number`."""
    divisors = [d for d in range(1, number + 1) if number % d == 0 and (number < 64 or d <= 64)]
    return "set it to one of " + ", ".join(map(str, divisors))


def _convert_value(hint, value, where: str):
    """Return `value` as the type `hint`.

    Types only change where no information is lost: between numbers of equal value, text of a number to a float, and
    a list to a tuple.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build_dataclass(hint, value, where)
    if origin is Literal:
        matches = difflib.get_close_matches(str(value), [str(arg) for arg in args], n=1)
        suggestion = f"; did you mean {matches[0]}?" if matches else ""
        # Python has 0 == False and 1 == True, but what reads the value asks whether it `is True`.
        fits = any(arg == value and type(arg) is type(value) for arg in args)
        require(fits, f"{where}={value} must be one of {', '.join(map(str, args))}{suggestion}")
        return value
    if origin in (types.UnionType, typing.Union):  # `Literal[...] | None` is the latter.
        if value is None and type(None) in args:
            return None
        kinds = [arg for arg in args if arg is not type(None)]
        if len(kinds) == 1:
            return _convert_value(kinds[0], value, where)
        matching = (kind for kind in kinds if isinstance(value, typing.get_origin(kind) or kind))
        return _convert_value(next(matching, kinds[0]), value, where)
    if origin is dict:
        require(isinstance(value, dict), f"{where}={value!r} must be a mapping: {where}={{a: 1, b: 2}}")
        return {str(key): _convert_value(args[1], item, join_key(where, key)) for key, item in value.items()}
    if origin is list:
        example = value if isinstance(value, (str, int, float)) else "a,b"
        require(isinstance(value, list), f"{where}={value!r} must be a list: '{where}=[{example}]'")
        return [_convert_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is tuple:
        fits = isinstance(value, (list, tuple)) and len(value) == len(args)
        require(fits, f"{where}={value!r} must be a list of {len(args)} values")
        return tuple(_convert_value(arg, value[i], f"{where}[{i}]") for i, arg in enumerate(args))
    return _convert_scalar(hint, value, where)


def _convert_scalar(hint: type, value, where: str):
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML reads 1e-4 as text.
        with suppress(ValueError):
            value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():  # YAML reads 15e9 as a float.
        return int(value)
    # Every comparison with NaN is false, so it would pass the checks of a value's range.
    require(not (isinstance(value, float) and math.isnan(value)), f"{where}={value} must be a number")
    fits = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
    wanted, found = (TYPE_NAMES.get(kind, f"a {kind.__name__}") for kind in (hint, type(value)))
    # Hydra would drop the underscores of name=2024_11 as a number, so a number does not become text by itself.
    is_number = hint is str and isinstance(value, (int, float))
    advice = f". To type it as text, quote it twice: '\"{value}\"'" if is_number else ""
    require(fits, f"{where}={value!r} must be {wanted}, not {found}{advice}")
    # Expand "~" here, because neither Hydra nor YAML does.
    return os.path.expanduser(value) if hint is str and value.startswith("~/") else value
