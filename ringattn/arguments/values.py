"""The rules of arguments: what a number, a flag or a list of numbers may be, and what is said of one that is not.

Each function gives the value as a plain Python one, or raises ``ValueError`` with the value, the rule and, where the
rule does not say it, what to pass. A bool is no number, and a number is no flag. Nothing here knows torch.
"""

from __future__ import annotations

import itertools
import operator
import os
import re
import reprlib
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np

LARGEST = 1 << 40  # of any length, position or size in tokens: sums and products of a few stay far inside int64
PAIRS = 1 << 62  # of queries and keys, q_len * kv_len: what int64 counts exactly
MANY = 1 << 20  # bounds, positions or masks in one list: more take seconds to compare
SEEDS = 1 << 62  # seeds are below: what fits an int64 with room for a mark
SHORTEST, LONGEST = 1e-3, 1e6  # seconds of a deadline: what clocks tell apart, and what polls take in milliseconds
WIDEST = 200  # characters of a value in a text

_brief = reprlib.Repr()
_brief.maxlong = _brief.maxstring = _brief.maxother = 120


def integer(name: str, value: object, least: int = 0, most: int = LARGEST, hint: str = "", rule: str = "") -> int:
    """An integer from ``least`` to ``most``."""
    try:
        number = operator.index(_no_bool(value))  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # torch raises the latter for what it cannot read
        raise ValueError(f"{name}={shown(value)}: must be an integer of at least {least}{hint}") from None
    if number < least:
        raise ValueError(f"{name}={shown(number)}: must be {rule}at least {_power(least)}{hint}")
    if number > most:
        raise ValueError(f"{name}={shown(number)}: must be at most {_power(most)}{hint}")
    return number


def number(
    name: str, value: Any, least: float, most: float, hint: str = "", also: tuple[type, ...] = (), rule: str = "a"
) -> Any:
    """A number from ``least`` to ``most``, as a float; what is one of the types ``also`` is kept as it is."""
    kinds: Any = (int, float, np.integer, np.floating, *also)
    if not isinstance(value, kinds) or isinstance(value, (bool, np.bool_, np.timedelta64)):
        raise ValueError(f"{name}={shown(value)}: must be a number from {least:g} to {most:g}{hint}")
    if not least <= value <= most:
        raise ValueError(f"{name}={shown(value)}: must be {rule} number from {least:g} to {most:g}{hint}")
    return value if isinstance(value, also) else float(value)


TOKENS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def tokens_of(name: str, text: str | int, least: int = 1) -> int:
    """A number of tokens or ranks as people write it: 131072, 131,072, "128K" (K is 1,024), "1M"."""
    rule = "a positive whole number, such as 131072 or 128K (K is 1,024, M is 1,048,576)"
    return quantity(name, text, TOKENS, rule, least)


def quantity(name: str, text: str | int, units: dict[str, int], rule: str, least: int = 0, most: int = LARGEST) -> int:
    """A number with one of the units behind it, that is whole in units of 1."""
    plain = str(text).replace(",", "").replace("_", "")
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", plain)
    value = Fraction(found[1]) * units.get(found[2].lower(), 0) if found else Fraction(-1)
    unknown = found is None or found[2].lower() not in units
    if isinstance(text, bool) or unknown or value.denominator > 1 or value < least:
        raise ValueError(f"{name}={shown(text)}: must be {rule}")
    return integer(name, int(value), least, most)


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}={shown(value)}: must be True or False")
    return bool(value)


def path(name: str, value: Any) -> str:
    """A path, as text."""
    try:
        return os.fsdecode(value)
    except TypeError:
        raise ValueError(f"{name}={shown(value)}: must be a path") from None


def seed_of(name: str, value: object, hint: str = "") -> int:
    """A seed, the same on every rank."""
    return integer(name, value, 0, SEEDS - 1, f"{hint}, the same on every rank")


def deadline(name: str, value: object) -> float:
    """Seconds to wait for a peer."""
    return float(number(name, value, SHORTEST, LONGEST, " seconds"))


def integers(name: str, values: Iterable[Any], least: int = 0) -> tuple[int, ...]:
    """A list, array or tensor of integers of at least ``least``."""
    found = listed(name, values, "integers")
    if all(type(v) is int for v in found) and (not found or (least <= min(found) and max(found) <= LARGEST)):
        return tuple(found)
    return tuple(_entry(name, i, v, least) for i, v in enumerate(found))


def _entry(name: str, i: int, value: object, least: int) -> int:
    try:
        return integer(f"{name}[{i}]", value, least)
    except ValueError as error:
        raise ValueError(f"{error}; {name} must be a sequence of integers") from None


def listed(name: str, values: Any, of: str, most: int = MANY, rule: str = "a sequence of") -> list[Any]:
    """What is iterable as a list of at most ``most`` entries; nothing that has no end is walked to it."""
    try:
        if isinstance(values, (str, bytes, dict)):
            raise TypeError
        whole = values.tolist() if hasattr(values, "tolist") and values.ndim else values
        found = list(itertools.islice(whole, most + 1))
    except (TypeError, RuntimeError):  # torch raises the latter for what it cannot read
        raise ValueError(f"{name}={shown(values)}: must be {rule} {of}") from None
    if len(found) > most:
        raise ValueError(f"{name} has more than {most:,} entries: must be at most so many {of}")
    return found


def shown(value: object) -> str:
    """A value in a few words, however large it is."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"<an integer of {value.bit_length()} bits>"
    try:
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    except RuntimeError:  # a nested tensor has none
        return f"<{type(value).__name__}>"
    if shape is not None and dtype is not None and len(shape):
        return f"<{type(value).__name__} {tuple(shape)} {dtype}>"
    try:
        text = _brief.repr(value)
    except (ValueError, RuntimeError):  # an integer of too many digits in it, or a tensor that cannot be written
        return f"<{type(value).__name__}>"
    return text if len(text) <= WIDEST else f"{text[:WIDEST]}..."


def _no_bool(value: object) -> object:
    if isinstance(value, (bool, np.bool_)) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        raise TypeError
    return value


def _power(bound: int) -> str:
    size = abs(bound)
    for power, name in ((size, ""), (size + 1, " - 1")):
        if size >= MANY and power & (power - 1) == 0:
            return f"{bound} ({'-' if bound < 0 else ''}2**{power.bit_length() - 1}{name})"
    return str(bound)


def boundaries(name: str, values: Iterable[int]) -> tuple[int, ...]:
    """The bounds of documents, from 0 on and never falling."""
    bounds = integers(name, values)
    if not bounds or bounds[0] != 0:
        raise ValueError(f"{name}={shortened(bounds)}: must start with 0, the beginning of the first document")
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        if b < a:
            raise ValueError(
                f"{name}[{i + 1}]={b} comes after {a}: cumulative lengths must not fall; sort or re-add them"
            )
    return bounds


def shortened(arg: object) -> str:
    """A value in words, of many numbers only the first and the last."""
    if isinstance(arg, tuple) and len(arg) > 6:
        return f"({', '.join(map(str, arg[:3]))}, ... {len(arg)} numbers ..., {arg[-1]})"
    return repr(arg)
