"""Dataclasses from plain mappings and back, strictly.

A key that no dataclass knows is an error that names it and the nearest known one, so a typing
mistake never trains a model silently with a default.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import math
import os
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from metastate.errors import ConfigError

T = TypeVar("T")

# Metadata of fields that came later: at None they are not written, so that what was written before
# (states with a hash of their config, settings of runs) is still equal to what is written now.
LATER = {"written_if_set": True}


def unknown_key_message(key: str, known: list[str], where: str) -> str:
    """Say that `key` is unknown in `where` and name the nearest known key."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [name for name in known if name.startswith(f"{key}_")]  # as `from` is a flag
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
    return f"unknown key {key!r} in {where}{hint}"


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Check `value` against the type hint `hint` and return it in that type."""
    origin = get_origin(hint)
    if origin is Literal:
        if value not in get_args(hint):
            allowed = ", ".join(repr(a) for a in get_args(hint))
            raise ConfigError(f"{where} is {value!r}; allowed: {allowed}")
        return value
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        return _coerce(value, next(o for o in options if o is not type(None)), where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {value!r}; a list is needed")
        return tuple(_coerce(v, get_args(hint)[0], f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}; a mapping is needed")
        return dict(value)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML reads 6e-4 as a string
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
        raise ConfigError(f"{where} is {value!r}; {hint.__name__} is needed")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{where} is {value!r}; a finite number is needed")
    return value


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Build the dataclass `cls` from a mapping; unknown keys and wrong types raise ConfigError."""
    where = where or cls.__name__
    fields = coerce_fields(cls, data, where)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = f.default is f.default_factory is dataclasses.MISSING
        if required and f.name not in fields:
            raise ConfigError(f"{where} has no {f.name!r}, which it needs")
    return cls(**fields)


_hints = functools.cache(get_type_hints)  # which evaluates every annotation anew


def give_types(config: Any, where: str) -> None:
    """Give the fields of a new configuration their types; a wrong one is found as in a file."""
    for key, value in coerce_fields(type(config), vars(config), where).items():
        object.__setattr__(config, key, value)


def coerce_fields(cls: type, data: Any, where: str) -> dict[str, Any]:
    """Check the keys and types of settings for the dataclass `cls`; return them typed.

    A class may name in MEANT what keys of other programs, or of other mappings, are called in it.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where} is {data!r}; a mapping of settings is needed")
    hints = _hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in known:
            if meant := getattr(cls, "MEANT", {}).get(key):
                raise ConfigError(f"unknown key {key!r} in {where}; did you mean {meant!r}?")
            raise ConfigError(unknown_key_message(str(key), known, where))
    return {k: _coerce(v, hints[k], f"{where}.{k}") for k, v in data.items()}


def to_dict(config: Any) -> dict[str, Any]:
    """Return `config` as plain JSON-ready values; `from_dict` gives the same object back."""
    data = json.loads(json.dumps(dataclasses.asdict(config), default=str))  # tuples become lists
    later = [f.name for f in dataclasses.fields(config) if f.metadata == LATER]
    return {key: value for key, value in data.items() if value is not None or key not in later}


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `override` laid over it, nested mappings merged key by key."""
    out = dict(base)
    for key, value in override.items():
        old = out.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        out[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return out
