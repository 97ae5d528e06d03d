"""Launches: tiles that one kernel call computes together.

Masks made of many small equal blocks (BigBird, chunks, strides) have thousands of equal tiles. A kernel takes such a
*stack* as one call, the tiles side by side in its batch dim, so that a step costs as many calls as it has shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

import numpy as np

from ringattn.geometry.spans import Ints
from ringattn.geometry.tiles import Rows, Tile

# Tiles of at most this many rows and columns are stacked, where there are some: larger ones fill a device alone.
SMALL, SOME = 256, 4
# Rows and columns of one stack, which are copied together.
ROWS = 1 << 15


class Stacking(Enum):
    """Which tiles a device computes together."""

    NONE = "none"  # each tile must know where it lies
    VIEWS = "views"  # rows that lie evenly side by side: copying others costs more than calls
    ALL = "all"

    @staticmethod
    def of(device: str, positional: bool) -> Stacking:
        """That of a type of device. For 64 x 64 tiles of 4 heads, a CPU needs 1.6 times as long for stacks of scattered
        rows as for their tiles one by one, and 0.75 times for rows that lie side by side. ``positional``: tiles must
        know where they lie, for a bias or dropout."""
        if positional:
            return Stacking.NONE
        return Stacking.VIEWS if device == "cpu" else Stacking.ALL


@dataclass(frozen=True, eq=False)
class Launch:
    """Tiles of one shape, window and freshness, whose query rows are disjoint: one kernel call."""

    tiles: tuple[Tile, ...]

    @property
    def area(self) -> int:
        return sum(tile.area for tile in self.tiles)

    @property
    def fresh(self) -> bool:
        return self.tiles[0].fresh

    def as_fresh(self) -> Launch:
        """The same for rows that nothing has touched yet."""
        return Launch(tuple(replace(tile, fresh=True) for tile in self.tiles))

    @cached_property
    def q(self) -> Rows:
        """Query rows of all tiles, one after the other."""
        return _laid_out([tile.q for tile in self.tiles])

    @cached_property
    def k(self) -> Rows:
        """Key rows of all tiles, one after the other."""
        return _laid_out([tile.k for tile in self.tiles])


def launches(tiles: Sequence[Tile], stacking: Stacking = Stacking.ALL) -> list[Launch]:
    """The tiles in launches, single ones first, in their order."""
    if stacking is Stacking.NONE:
        return [Launch((tile,)) for tile in tiles]
    alike: dict[tuple[int, int, tuple[int | None, int | None]], list[Tile]] = {}
    for tile in tiles:
        small = isinstance(tile.q, slice) and isinstance(tile.k, slice) and max(shape := _shape(tile)) <= SMALL
        if small:
            alike.setdefault((*shape, tile.window), []).append(tile)
    stacked = {kind: same for kind, same in alike.items() if len(same) >= SOME}
    together = {id(tile) for same in stacked.values() for tile in same}
    made = [Launch((tile,)) for tile in tiles if id(tile) not in together]
    for (nq, nk, _), same in stacked.items():
        most = max(ROWS // (nq + nk), 1)
        for row in _disjoint(same):
            for stack in (Launch(tuple(row[i : i + most])) for i in range(0, len(row), most)):
                views = isinstance(stack.q, slice) and isinstance(stack.k, slice)
                made += [stack] if views or stacking is Stacking.ALL else [Launch((tile,)) for tile in stack.tiles]
    return made


def _disjoint(tiles: Sequence[Tile]) -> list[list[Tile]]:
    """Tiles in rows of which no two share a query: each goes to the first row that has none of its queries."""
    rows: list[tuple[list[Tile], set[int]]] = []
    for tile in tiles:
        assert isinstance(tile.q, slice)
        wanted = range(tile.q.start, tile.q.stop, tile.q.step)
        free = next((row for row in rows if row[1].isdisjoint(wanted)), None)
        if free is None:
            rows.append(free := ([], set()))
        free[0].append(tile)
        free[1].update(wanted)
    return [row for row, _ in rows]


def _shape(tile: Tile) -> tuple[int, int]:
    """Rows and columns of a tile of slices."""
    q, k = (len(range(rows.start, rows.stop, rows.step)) for rows in (tile.q, tile.k) if isinstance(rows, slice))
    return q, k


def _laid_out(parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    index: Ints = np.concatenate([np.arange(p.start, p.stop, p.step) if isinstance(p, slice) else p for p in parts])
    step = int(index[1] - index[0])
    even = step > 0 and bool((np.diff(index) == step).all())
    return slice(int(index[0]), int(index[-1]) + 1, step) if even else index
