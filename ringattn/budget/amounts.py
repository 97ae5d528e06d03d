"""Numbers that know how they were computed: one object gives the bytes of the account and the formula that explains
them, so that the two cannot differ."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce


@dataclass(frozen=True, slots=True)
class Amount:
    """A count, most often of bytes. ``symbols`` is its formula in names, ``numbers`` the same with the values put in;
    ``sum`` says that they are a sum, which wants brackets in a product."""

    value: int
    symbols: str
    numbers: str
    sum: bool = False

    def __mul__(self, other: Amount | int) -> Amount:
        other = amount(other)
        if other.symbols == "1":
            return self
        if self.symbols == "1":
            return other
        pairs = ((self.symbols, other.symbols), (self.numbers, other.numbers))
        symbols, numbers = (f"{_in_product(a, self)} x {_in_product(b, other)}" for a, b in pairs)
        return Amount(self.value * other.value, symbols, numbers)

    __rmul__ = __mul__

    def __add__(self, other: Amount | int) -> Amount:
        other = amount(other)
        if not other.value:
            return self
        if not self.value:
            return other
        return Amount(
            self.value + other.value,
            f"{self.symbols} + {other.symbols}",
            f"{self.numbers} + {other.numbers}",
            True,
        )

    __radd__ = __add__

    def over(self, parts: Amount | int) -> Amount:
        """Divided by so many parts, the largest of them: rounded up."""
        parts = amount(parts)
        if parts.value == 1:
            return self
        symbols, numbers = (
            f"{_in_product(a, self)} / {_in_product(b, parts)}"
            for a, b in ((self.symbols, parts.symbols), (self.numbers, parts.numbers))
        )
        if self.value % parts.value:
            symbols, numbers = f"ceil({symbols})", f"ceil({numbers})"
        return Amount(-(-self.value // parts.value), symbols, numbers)

    def __str__(self) -> str:
        return f"{self.symbols} = {self.numbers}"


NOTHING = Amount(0, "0", "0")


def named(name: str, value: int) -> Amount:
    """A quantity that formulas call by its name."""
    return Amount(value, name, f"{value:,}")


def amount(value: Amount | int) -> Amount:
    """A plain number as it is."""
    return value if isinstance(value, Amount) else Amount(value, f"{value:,}", f"{value:,}")


def total(amounts: list[Amount]) -> Amount:
    """Their sum."""
    return reduce(Amount.__add__, amounts, NOTHING)


def _in_product(text: str, of: Amount) -> str:
    return f"({text})" if of.sum else text
