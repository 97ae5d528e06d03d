"""Numbers in words, and where an axis has its ticks."""

from __future__ import annotations

from math import ceil, floor, log2, log10

KILO, MEGA = 1 << 10, 1 << 20  # of tokens, as lengths of contexts are named
SI = ("", "k", "M", "G", "T", "P", "E")


def tokens(number: int) -> str:
    """128K, 1M where it is a whole number of them, else 100,000."""
    for unit, name in ((MEGA, "M"), (KILO, "K")):
        if number and number % unit == 0:
            return f"{number // unit:,}{name}"
    return f"{number:,}"


def amount(number: float, unit: str = "") -> str:
    """In three figures and powers of a thousand: 12.3 GB, 812 k."""
    if number == 0:
        return f"0 {unit}".rstrip()
    power = min(max(floor(log10(abs(number)) / 3), 0), len(SI) - 1)
    if abs(number) / 1000**power >= 999.5 and power + 1 < len(SI):
        power += 1
    return f"{_figures(number / 1000**power)} {SI[power]}{unit}".rstrip()


def seconds(number: float) -> str:
    """In three figures: 1.23 s, 45.6 ms, 7.89 us; large ones whole."""
    if number >= 1000:
        return f"{number:,.0f} s"
    for size, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if number >= size:
            return f"{_figures(number / size)} {name}"
    return "0 s" if number == 0 else f"{number * 1e6:.2g} us"


def share(part: float, whole: float) -> str:
    """Percent, in so many figures that little is not nothing."""
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.3g} %" if percent < 99.95 or part == whole else "99.9 %"


def written(number: float, unit: str) -> str:
    """A number of a unit, as on an axis."""
    if unit == "tokens":
        return tokens(int(number))
    if unit == "s":
        return seconds(number)
    return amount(number, unit if unit == "B" else "") if unit not in ("rank", "turn") else f"{int(number):,}"


def ticks(start: float, stop: float, unit: str, most: int = 6) -> list[float]:
    """Round numbers inside of ``[start, stop]``: of tokens where these are a whole number of K powers of two, of ranks
    where these are of 64; else of ranks and turns whole ones."""
    span = stop - start
    if unit == "names":
        return []
    if span <= 0:
        return [start]
    if (unit == "tokens" and span % KILO == 0 and span >= 2 * KILO) or (unit == "rank" and span % 64 == 0):
        step = float(2 ** ceil(log2(span / most)))
    else:
        rough = span / most
        ten = 10.0 ** floor(log10(rough))
        step = next(ten * factor for factor in (1, 2, 5, 10) if ten * factor >= rough * (1 - 1e-9))
        if unit in ("tokens", "rank", "turn"):
            step = max(round(step), 1.0)
    first = ceil(start / step - 1e-9)
    last = floor(stop / step + 1e-9)
    found = [number * step for number in range(first, last + 1)]
    return [at for at in found if at < stop] if unit in ("rank", "turn") else found


def _figures(number: float) -> str:
    """Three of them, and no zeros behind the point."""
    text = f"{number:.3g}"
    return f"{number:.0f}" if "e" in text else text
