"""Panels of numbers by rank: bars, and matrices. Where ranks are many, neighbours are drawn as one, exactly, and the
title says how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringattn.geometry.spans import Ints
from ringattn.pictures import numbers
from ringattn.pictures.colours import Colours, of_shares
from ringattn.pictures.scene import Axis, Cells, Entry, Layer, Level, Panel, Rect, said

BARS = 128  # of a panel
SIDE = 128  # cells of a matrix's side
LINES = 32  # bars in a terminal, whose longest has
LONGEST = 40  # letters
HEADROOM = 1.15  # above bars, for the name of a line


@dataclass(frozen=True, eq=False)
class Series:
    """A number of each rank, ``[ranks]``."""

    name: str
    colour: str
    values: NDArray[Any]


def bars(
    title: str, unit: str, series: Sequence[Series], levels: Sequence[Level] = (), label: str = "", width: int = 560,
) -> Panel:  # fmt: skip
    """Series on top of each other by rank. Of many ranks, a bar is the tallest of as many neighbours."""
    total = np.sum([one.values for one in series], axis=0)
    ranks, top = len(total), max(float(total.max(initial=0)), *(level.y for level in levels), 0.0)
    marks: list[Rect | Level] = []
    for first, end, rank in _tallest(total, BARS):
        low = 0.0
        of = "" if end == first + 1 else f", the most of ranks {first:,} to {end - 1:,}"
        note = "\n".join([f"rank {rank:,}{of}", *(_value(one, rank, unit) for one in series)])
        gap = 0.1 * (end - first)
        for one in series:
            height = float(one.values[rank])
            if height > 0:
                marks.append(Rect(first + gap, low, end - gap, low + height, one.colour, note))
            low += height
    shown = -(-ranks // _together(ranks, BARS))
    many = "" if shown == ranks else f"a bar is the most of {_together(ranks, BARS)} neighbours"
    return Panel(
        title,
        Axis("rank", 0, ranks, "rank"),
        Axis(label or unit, 0, top * HEADROOM or 1.0, unit),
        (*marks, *levels),
        width,
        190,
        tuple(Entry(one.colour, one.name) for one in series),
        lines=tuple(_in_letters(total, series, unit, levels)),
        together=many,
    )


def _value(one: Series, rank: int, unit: str) -> str:
    return f"{one.name}: {said(one.values[rank], unit)}"


def _in_letters(total: NDArray[Any], series: Sequence[Series], unit: str, levels: Sequence[Level]) -> list[str]:
    """Bars lying down, of the ranks' names and numbers."""
    top = float(total.max(initial=0)) or 1.0
    groups = _tallest(total, LINES)
    of = {first: f" (most of {first:,}-{end - 1:,})" if end > first + 1 else "" for first, end, _ in groups}
    names = [f"rank {rank:,}{of[first]}" for first, _, rank in groups]
    wide = max(map(len, names), default=0)
    lines = [f"{'':{wide}} {' + '.join(one.name for one in series)}"]
    for name, (_, _, rank) in zip(names, groups, strict=True):
        bar = "█" * max(round(LONGEST * float(total[rank]) / top), int(total[rank] > 0))
        parts = " + ".join(numbers.written(float(one.values[rank]), unit) for one in series)
        lines.append(f"{name:{wide}} {bar:{LONGEST}} {parts}")
    return [*lines, *(f"{'':{wide}} {level.name}" for level in levels)]


def matrix(
    title: str, rows: str, cols: str, layers: Sequence[Layer], tint: Colours | None = None,
    units: tuple[str, str] = ("rank", "rank"), size: tuple[int, int] = (300, 300),
    legend: Sequence[Entry] = (), legend_title: str = "", lines: Sequence[str] = (),
) -> Panel:  # fmt: skip
    """A number of each pair, as dark as it is large beside the largest; or a colour ``tint [h, w, 3]``, white where
    the first layer has nothing. Of many, cells are the sum of neighbours (colours that of the largest of them)."""
    first = layers[0].values
    steps = tuple(_together(count, SIDE) for count in first.shape)
    kept = [one for one in layers if one.unit != "turn" or steps == (1, 1)]  # turns do not add up
    summed = tuple(Layer(one.name, _summed(one.values, steps), one.unit) for one in kept)
    shown = _summed(first, steps)
    at = [np.minimum(np.arange(0, count + step, step), count) for count, step in zip(first.shape, steps, strict=True)]
    at = [np.unique(edge) for edge in at]
    share = shown / (shown.max(initial=0) or 1)
    colours = of_shares(share)
    if tint is not None:
        colours = np.where((shown > 0)[..., None], tint[_largest(first, steps)], 255).astype(np.uint8)
    words = [_names(name, edge) for name, edge in zip((rows, cols), at, strict=True)]
    many = "" if steps == (1, 1) else f"a cell sums {steps[0]:,} x {steps[1]:,}"
    return Panel(
        title,
        Axis(cols, 0, first.shape[1], units[1]),
        Axis(rows, 0, first.shape[0], units[0], down=True),
        (Cells(at[0], at[1], share, colours, words[0], words[1], summed),),
        *size,
        tuple(legend),
        legend_title if legend else "",
        lines=tuple(lines),
        together=many,
    )


def summed_most(values: NDArray[Any]) -> float:
    """What the darkest cell of a matrix stands for."""
    return float(_summed(values, tuple(_together(count, SIDE) for count in values.shape)).max(initial=0))


def _names(name: str, at: Ints) -> tuple[str, ...]:
    """Of each cell of a side: sender 3, senders 0 to 7."""
    pairs = zip(at[:-1].tolist(), at[1:].tolist(), strict=True)
    return tuple(f"{name} {a:,}" if b == a + 1 else f"{name} {a:,} to {b - 1:,}" for a, b in pairs)


def _summed(values: NDArray[Any], steps: tuple[int, ...]) -> NDArray[Any]:
    """Blocks of neighbours added up."""
    for axis, step in enumerate(steps):
        if step > 1:
            at = np.arange(0, values.shape[axis], step)
            values = np.add.reduceat(values, at, axis)
    return values


def _largest(values: NDArray[Any], steps: tuple[int, ...]) -> tuple[Ints, Ints]:
    """Where the largest of each block of neighbours is: its row and its column."""
    height, width = (-(-count // step) for count, step in zip(values.shape, steps, strict=True))
    room = np.zeros((height * steps[0], width * steps[1]), values.dtype)
    room[: values.shape[0], : values.shape[1]] = values
    blocks = room.reshape(height, steps[0], width, steps[1]).swapaxes(1, 2).reshape(height, width, -1)
    row, col = np.divmod(blocks.argmax(2), steps[1])
    return np.arange(height)[:, None] * steps[0] + row, np.arange(width) * steps[1] + col


def _together(count: int, most: int) -> int:
    """Neighbours that are drawn as one: a power of two."""
    step = 1
    while -(-count // step) > most:
        step *= 2
    return step


def _tallest(total: NDArray[Any], most: int) -> list[tuple[int, int, int]]:
    """The first rank, the end and the rank of most, of each group of neighbours."""
    step = _together(len(total), most)
    groups = [(first, min(first + step, len(total))) for first in range(0, len(total), step)]
    return [(first, end, first + int(np.argmax(total[first:end]))) for first, end in groups]
