"""Values of settings: read from the text of `key=value`, and checked to be of the type of their key."""

import importlib
import json
import os
import sys
import types
import typing
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib as tomllib
else:
    import tomli as tomllib

PATHS = ("data", "output_dir")


class ConfigError(ValueError):
    """A setting that is wrong or can't be served, named by a message of one line."""


def parsed(text: str) -> Any:
    """Return the TOML value of a text; None for `none`; the text itself where it is not TOML."""
    text = text.strip()
    if text.lower() == "none":
        return None
    try:
        value = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return value["value"] if value.keys() == {"value"} else text


def plain_text(text: str) -> str:
    """Return the text itself, without the quotes if it is a TOML string."""
    value = parsed(text)
    return value if isinstance(value, str) else text.strip()


def typed(name: str, value: Any, kind: Any) -> Any:
    """Return `value` as `kind`: an int may stand for a float, a list for a tuple, a path for a text.

    Raises:
        ConfigError: a value of another type. One of a union of types is left to be checked by its meaning.
    """
    optional = isinstance(kind, types.UnionType) and types.NoneType in kind.__args__
    if isinstance(kind, types.UnionType) and not optional:
        return tuple(value) if isinstance(value, list) else value
    if optional:
        if value is None:
            return None
        kind = kind.__args__[0]
    if name in PATHS and isinstance(value, os.PathLike):
        value = os.fspath(value)
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
        return tuple(typed(name, part, argument) for part, argument in zip(value, arguments))
    if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
        words = {
            tuple: f"a list of {len(arguments)} numbers",
            dict: "a table",
            bool: "true or false",
            str: "text (in TOML, in quotes)",
        }.get(origin, origin.__name__)
        got = f"{type(value).__name__} {value!r}"
        raise ConfigError(f"{name} must be {words}{' or none' if optional else ''}, got {got}")
    if origin is dict:
        try:
            # as checkpoints hold it
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{name} must hold numbers, texts, lists and tables, got {value!r}: {error}") from None
    return value


def expanded(name: str, path: str) -> str:
    """Return a path with `~` replaced by the home folder.

    Raises:
        ConfigError: a home folder of no user.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ConfigError(f"{name} {path} is in the home folder of no user; write ./{path} if ~ is part of the name")
    return found


def one_of(name: str, value: str, allowed: typing.Iterable[str]) -> None:
    """Check that a value is among those that are allowed."""
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def class_name(name: str, value: str, words: typing.Iterable[str]) -> tuple[str, str]:
    """Return module and class of the value "package.module:Class"; a message names `words` as the other values.

    Raises:
        ConfigError: another form of value.
    """
    module, colon, attribute = value.partition(":")
    if not (module and colon and attribute):
        known = ", ".join(f'"{word}"' for word in words)
        raise ConfigError(f'{name} must be {known} or "package.module:Class", got {value!r}')
    return module, attribute


def imported(name: str, value: str, words: typing.Iterable[str]) -> typing.Any:
    """Return the class that a setting names as "package.module:Class".

    Raises:
        ConfigError: another form of value, no such module or class.
    """
    module, attribute = class_name(name, value, words)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{name} {value} can't be imported: {error}; {module} must be installed, on PYTHONPATH, or in the folder "
            "in which `python -m fastmim` is started"
        ) from None
