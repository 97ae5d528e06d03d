"""A scene as text, for a terminal: shades for shares, digits and letters for ranks, and bars."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ringattn.pictures import numbers
from ringattn.pictures.owners import Owners
from ringattn.pictures.scene import Field, Panel, Scene, said

WIDTH, HEIGHT = 64, 32  # cells of the largest grid; letters are twice as high as they are wide
SHADES = ((0.0, " "), (0.1, "·"), (0.35, "░"), (0.65, "▒"), (0.999, "▓"), (2.0, "█"))
LEGEND = "blank none, · to 10 %, ░ to 35 %, ▒ to 65 %, ▓ more, █ all"
LETTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def text(scene: Scene) -> str:
    """Printable text, 100 letters wide at most but for names and numbers."""
    lines = [scene.title, *scene.notes]
    for panel in scene.panels:
        lines += ["", panel.title]
        lines += panel.lines or _panel(panel)
    return "\n".join(line.rstrip() for line in lines)


def _panel(panel: Panel) -> Iterator[str]:
    grid = panel.grid
    if grid is None:
        return
    tall = max(round(HEIGHT * panel.height / max(panel.width, panel.height)), 1)
    wide = max(round(WIDTH * panel.width / max(panel.width, panel.height)), 1)
    if isinstance(grid, Field):
        few = max(grid.queries[1] - grid.queries[0], grid.keys[1] - grid.keys[0]) <= HEIGHT
        cells = grid.cells(tall, wide // 2 if few else wide)
    else:
        cells = grid
        few = len(cells.cols) - 1 <= HEIGHT
    names = [numbers.written(float(at), panel.y.unit) for at in cells.rows[:-1]]
    margin = max(map(len, names), default=0)
    strip = _letters(cells.row_owners)
    above = _letters(cells.col_owners)
    if above:
        yield " " * (margin + 3) + "".join(letter * (2 if few else 1) for letter in above)
    of = cells.row_owners
    owned = [f"│ {who}" for who in of.words] if of is not None and not strip else [""] * len(names)
    ink = _fitted(cells.ink, tall if not few else HEIGHT, wide)
    every = max(len(ink) // 8, 1)
    for i, row in enumerate(ink):
        at = i * len(names) // len(ink)
        name, words = (names[at], owned[at]) if i % every == 0 else ("", "")
        side = strip[i] if strip else " "
        yield f"{name:>{margin}} {side}│{''.join(_shade(share) * (2 if few else 1) for share in row)}{words}"
    first, last = (numbers.written(float(cells.cols[at]), panel.x.unit) for at in (0, -1))
    line = "─" * (ink.shape[1] * (2 if few else 1))
    yield f"{'':{margin}}  └{line}"
    yield f"{'':{margin}}   {first}{last:>{max(len(line) - len(first), 1)}}"
    yield f"{panel.x.label} across, {panel.y.label} down"
    if isinstance(grid, Field):
        yield f"{cells.scale}; shades: share of the pairs that attend; {LEGEND}"
    else:
        layer = cells.layers[0]
        most = said(layer.values.max(initial=0), layer.unit)
        yield f"shades: {layer.name}, as a part of the most that a cell has ({most}); {LEGEND}"
    if strip:
        beyond = "; a is rank 10, A rank 36" if _ranks(cells.row_owners, cells.col_owners) > 10 else ""
        yield f"at the edges: the rank that holds most of a row or column, * where several hold as much{beyond}"
    elif of is not None:
        yield "at the right: who holds the queries of a row"


def _shade(share: float) -> str:
    return next(letter for most, letter in SHADES if share <= most)


def _ranks(*of: Owners | None) -> int:
    """As many as have a share of any stretch."""
    return 1 + max((int(one.tokens[:, 1].max(initial=0)) for one in of if one is not None), default=0)


def _letters(of: Owners | None) -> list[str]:
    """A letter for the rank of each stretch; none where ranks are more than letters."""
    if of is None or of.tokens[:, 1].max(initial=0) >= len(LETTERS):
        return []
    return [LETTERS[rank] if rank >= 0 else "*" for rank in of.first]


def _fitted(ink: np.ndarray, tall: int, wide: int) -> np.ndarray:
    """At most so many rows and columns, each the mean of neighbours."""
    for axis, most in enumerate((tall, wide)):
        size = ink.shape[axis]
        if size > most:
            at = np.arange(most) * size // most
            count = np.diff(np.append(at, size)).reshape((-1, 1) if axis == 0 else (1, -1))
            ink = np.add.reduceat(ink, at, axis) / count
    return ink
