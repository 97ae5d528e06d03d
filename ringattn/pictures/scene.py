"""What a picture shows, as data: panels with axes and legends, marks in the units of the axes, and what is said of a
mark where a pointer rests on it. Writers (`svg`, `page`, `text`, `png`) decide how it looks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ringattn.geometry.bands import Bands
from ringattn.geometry.layouts import Layout
from ringattn.pictures import colours, numbers
from ringattn.pictures.colours import Colours
from ringattn.pictures.owners import Owners, owners
from ringattn.pictures.raster import affordable, counted, edges

MOST_CELLS = 512  # of a side


@dataclass(frozen=True)
class Axis:
    """From ``start`` to ``stop`` in a unit: tokens, rank, turn, B, s, pairs or another word. ``down``: from the top."""

    label: str
    start: float
    stop: float
    unit: str = ""
    down: bool = False


@dataclass(frozen=True, eq=False)
class Layer:
    """A number of every cell, ``[h, w]``, by its name; cells of which a number below 0 says nothing."""

    name: str
    values: NDArray[Any]
    unit: str = ""


@dataclass(frozen=True, eq=False)
class Cells:
    """A grid of coloured cells. ``ink [h, w]`` from 0 to 1, ``colours [h, w, 3]``; ``rows`` and ``cols`` begin where
    the axes say, the end as last entry; what is said of a cell: the words of its row and column, and each layer."""

    rows: NDArray[Any]
    cols: NDArray[Any]
    ink: NDArray[Any]
    colours: Colours
    row_words: tuple[str, ...]
    col_words: tuple[str, ...]
    layers: tuple[Layer, ...]
    row_owners: Owners | None = None
    col_owners: Owners | None = None

    @property
    def scale(self) -> str:
        """How many positions of either side a cell stands for."""
        rows, cols = (int(np.diff(at).max(initial=0)) for at in (self.rows, self.cols))
        return f"a cell is {rows:,} x {cols:,} tokens" if rows * cols > 1 else "a cell is one pair"

    def words(self, i: int, j: int) -> list[str]:
        """What is said of one cell."""
        words = [self.row_words[i], self.col_words[j]]
        for layer in self.layers:
            value = layer.values[i, j]
            if value >= 0:
                words.append(f"{layer.name}: {said(value, layer.unit)}")
        return words


@dataclass(frozen=True, eq=False)
class Field:
    """The pairs of :func:`regular` bands, of queries and keys from a first to an end; with the layouts of either side,
    coloured by who computes them. Whatever draws it asks for as many cells as it has room for."""

    bands: Bands
    queries: tuple[int, int]
    keys: tuple[int, int]
    layouts: tuple[Layout, Layout] | None = None

    def cells(self, rows: int = MOST_CELLS, cols: int = MOST_CELLS) -> Cells:
        """The field in at most so many cells, each of which counts exactly its pairs."""
        most = affordable(self.bands, self.queries, self.keys, max(rows, cols))
        q, k = edges(*self.queries, min(rows, most)), edges(*self.keys, min(cols, most))
        pairs = counted(self.bands, q, k)
        whole = np.multiply.outer(np.diff(q), np.diff(k))
        share = pairs / np.maximum(whole, 1)
        places = [
            tuple(_range(*names, int(a), int(b)) for a, b in pairwise(at))
            for names, at in ((("query", "queries"), q), (("key", "keys"), k))
        ]
        layers = (Layer("pairs", pairs, "exact"), Layer("of all pairs here", 100 * share, "%"))
        if self.layouts is None:
            return Cells(q, k, share, colours.of_shares(share), places[0], places[1], layers)
        of_q, of_k = owners(self.layouts[0], q, self.queries[0]), owners(self.layouts[1], k, self.keys[0])
        tint = np.broadcast_to(of_q.colours[:, None], (*pairs.shape, 3))
        held = [
            tuple(f"{word}, {verb} {owner}" for word, owner in zip(words, of.words, strict=True))
            for words, verb, of in ((places[0], "of", of_q), (places[1], "held by", of_k))
        ]
        return Cells(q, k, share, colours.tinted(tint, share), held[0], held[1], layers, of_q, of_k)

    @cached_property
    def drawn(self) -> Cells:
        """As a picture of some hundred pixels has room for."""
        return self.cells()


@dataclass(frozen=True)
class Rect:
    """A rectangle, with a word on it where there is room."""

    x0: float
    y0: float
    x1: float
    y1: float
    fill: str
    note: str = ""
    label: str = ""


@dataclass(frozen=True)
class Arrow:
    """From a place to another, ``width`` in pixels; ``dashed``, where it goes another way."""

    x0: float
    y0: float
    x1: float
    y1: float
    colour: str
    width: float
    note: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Level:
    """A line across the panel at a height, with its name."""

    y: float
    name: str


@dataclass(frozen=True)
class Border:
    """A thin line between rows, or with ``across`` False between columns."""

    at: float
    across: bool = True


Mark = Cells | Field | Rect | Arrow | Level | Border


class Entry(NamedTuple):
    """What a legend says of a colour: of a ``box``, or of an arrow, ``solid`` or ``dashed``."""

    colour: str
    name: str
    kind: str = "box"


@dataclass(frozen=True)
class Panel:
    """Marks over two axes, ``width`` and ``height`` in pixels. ``lines``: the same for a terminal, where marks alone
    would say little there; these sum neighbours as they have room."""

    title: str
    x: Axis
    y: Axis
    marks: tuple[Mark, ...]
    width: int = 440
    height: int = 440
    legend: tuple[Entry, ...] = ()
    legend_title: str = ""
    lines: tuple[str, ...] = ()
    together: str = ""  # how many neighbours are drawn as one, if several are
    taken: bool = False  # of several that are offered, the one that is taken

    @property
    def grid(self) -> Cells | Field | None:
        """Its cells, if it has any."""
        return next((mark for mark in self.marks if isinstance(mark, (Cells, Field))), None)


@dataclass(frozen=True)
class Scene:
    """A title, sentences below it, and panels in rows."""

    title: str
    notes: tuple[str, ...]
    rows: tuple[tuple[Panel, ...], ...] = field(default=())

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row)


def said(value: Any, unit: str) -> str:
    """A number in full, with its unit."""
    if unit == "%":
        return f"{value:.3g} %"
    if unit == "s":
        return numbers.seconds(float(value))
    return f"{int(value):,}" + {"B": " bytes", "tokens": " tokens"}.get(unit, "")


def _range(one: str, several: str, first: int, end: int) -> str:
    return f"{one} {first:,}" if end == first + 1 else f"{several} {first:,} to {end - 1:,}"
