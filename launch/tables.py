"""Frozen dataclasses read from TOML and written back: a key that is not known, one that is missing and a value of the
wrong type are refused by name, with the nearest that is right."""

import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from launch.rules import nearest, shown

KINDS = {
    int: "int, a whole number, for instance 1",
    float: "float, a number, for instance 0.1",
    str: 'str, text in quotes, for instance "x"',
    bool: "bool, one of true and false",
}

T = TypeVar("T")


def parse(text: str) -> dict[str, Any]:
    """TOML. Raises ValueError with the line, what is wrong with it, and the rule."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"at line (\d+)", str(error))
        lines = text.splitlines()
        line = lines[int(found[1]) - 1] if found and int(found[1]) <= len(lines) else ""
        raise ValueError(
            f"{shown(line.strip())} is no TOML: {error}; a key or table is given once, as key = value, text in quotes: "
            "correct that line"
        ) from None
    except (RecursionError, ValueError) as error:  # the latter of a number with thousands of digits
        raise ValueError(f"is no TOML that can be read: {error}; use fewer brackets, or shorter numbers") from None


def dump(settings: Any) -> str:
    """TOML text from which the same settings can be built."""
    values = _given(asdict(settings))
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    arrays = {key: value for key, value in values.items() if _is_array(value)}
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if key not in tables and key not in arrays]
    for heading, entries in (
        *((f"[{name}]", table) for name, table in tables.items()),
        *((f"[[{name}]]", table) for name, array in arrays.items() for table in array),
    ):
        lines += ["", heading, *(f"{key} = {_toml(value)}" for key, value in _given(entries).items())]
    return "\n".join(lines) + "\n"


def _given(entries: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has no None: what is not given is left out; and so are empty lists, where tables may be added by hand."""
    return {key: value for key, value in entries.items() if value not in (None, ())}


def _is_array(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(entry, dict) for entry in value)


def _toml(value: Any) -> str:
    """A value as TOML, which is JSON but for infinity, characters beyond 16 bits and DEL."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    hints = typing.get_type_hints(cls)
    unknown = [key for key in values if key not in hints]
    if unknown:
        key = shown(unknown[0])[1:-1]
        raise ValueError(f"unknown key {where}{key}{nearest(unknown[0], hints)}; known: {', '.join(hints)}")
    arguments = {key: _convert(value, hints[key], f"{where}{key}") for key, value in values.items()}
    required = [f.name for f in fields(cls) if f.default is f.default_factory]  # type: ignore[arg-type]
    missing = [name for name in required if name not in arguments]
    if missing:
        raise ValueError(f"missing key {where}{missing[0]}; it has no default: set it")
    return cls(**arguments)


def _convert(value: Any, hint: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):  # X | None: TOML has no None, so a value is an X; or X | Y
        kinds = typing.get_args(hint)
        hint = type(value) if type(value) in kinds else kinds[0]
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        if not isinstance(value, dict):
            heading = f"[{where}]" if "[" not in where else f"[[{where.partition('[')[0]}]]"
            raise ValueError(f"{where} is {shown(value)}; it must be a table: write {heading} and its keys below it")
        return build(hint, value, f"{where}.")
    if isinstance(hint, types.GenericAlias):
        if not isinstance(value, list):
            raise ValueError(f"{where} is {shown(value)}; it must be a list: put it in brackets")
        item = typing.get_args(hint)[0]
        return tuple(_convert(entry, item, f"{where}[{i}]") for i, entry in enumerate(value))
    if hint is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} is {shown(value)}; it must be {KINDS[hint]}")
    return value
