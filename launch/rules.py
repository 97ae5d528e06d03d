"""Rules for the values of settings, as tables: what a value must be, in words, and one that works. A refusal names the
value, the rule and the remedy."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# more than any machine holds, and far from what integers, indices and seeds can hold
SIZE, COUNT, SEED = 2**20, 10**12, 2**63 - 1


@dataclass(frozen=True, slots=True)
class Rule:
    """`holds(value)`, the same in words after "it must be", and a value that holds."""

    holds: Callable[[Any], bool]
    words: str
    example: Any


def integer(least: int, most: int, example: int | None = None) -> Rule:
    """A whole number within bounds."""
    words = f"a whole number from {least} to {most}"
    return Rule(
        lambda value: type(value) is int and least <= value <= most, words, least if example is None else example
    )


def number(least: float, most: float, example: float, *, above: bool = False, below: bool = False) -> Rule:
    """A finite number within bounds, which `above` and `below` leave out."""

    def holds(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
            return False
        return not (above and value == least) and not (below and value == most)

    bounds = f"{'above' if above else 'at least'} {least:g}"
    bounds += "" if most == math.inf else f" and {'below' if below else 'at most'} {most:g}"
    return Rule(holds, f"a finite number, {bounds}", example)


def check(values: Mapping[str, Any], rules: Mapping[str, Rule], where: str = "") -> None:
    """Raises ValueError for the first value that its rule does not allow."""
    for name, rule in rules.items():
        if name in values and not rule.holds(values[name]):
            example = "" if rule.example is None else f", for instance {shown(rule.example)}"
            raise ValueError(f"{where}{name} is {shown(values[name])}; it must be {rule.words}{example}")


def shown(value: Any) -> str:
    """A value in an error text: one line, not a long one."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no number of more than 4,300 digits
        text = f"a number of {value.bit_length():,} bits"
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text):,} characters)"


def one_of(choices: Iterable[str]) -> str:
    """Names in an error text."""
    names = sorted(choices)
    return ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError naming the nearest of `choices` unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"unknown {what} {shown(value)}{nearest(value, choices)}; known: {', '.join(choices)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
