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
from numpy.typing import NDArray

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


def stacks(boxes: Ints, group: Ints, stacking: Stacking) -> Ints:
    """The group of every launch that :func:`launches` makes of tiles, which are given as boxes ``(q0, nq, qs, k0, nk,
    ks, lo, hi)``; those of one shape have their queries in common or none."""
    if stacking is Stacking.NONE or len(boxes) < SOME:
        return group
    q0, nq, qs, k0, nk, ks, lo, hi = boxes.T
    small = np.flatnonzero(np.maximum(nq, nk) <= SMALL)
    alike = _numbered(np.stack((group, nq, nk, np.maximum(lo, 1 - nq), np.minimum(hi, nk - 1)))[:, small])
    some = np.bincount(alike)[alike] >= SOME
    at, alike = small[some], alike[some]
    if not len(at):
        return group
    order = np.lexsort((k0[at], q0[at], alike))
    at, alike = at[order], alike[order]
    row = _within((np.diff(alike) != 0) | (np.diff(q0[at]) != 0))  # of disjoint queries
    order = np.lexsort((q0[at], row, alike))
    at, alike, row = at[order], alike[order], row[order]
    begins = _within((np.diff(alike) != 0) | (np.diff(row) != 0)) % np.maximum(ROWS // (nq + nk)[at], 1) == 0
    alone = np.ones(len(boxes), bool)
    alone[at] = False
    if stacking is Stacking.ALL:
        return np.concatenate((group[alone], group[at[begins]]))
    even = np.append(True, (np.diff(q0[at]) == (nq * qs)[at][1:]) & (np.diff(k0[at]) == (nk * ks)[at][1:])) | begins
    stack = np.cumsum(begins) - 1
    view = np.bincount(stack, ~even) == 0
    return np.concatenate((group[alone], group[at[begins]][view], group[at[~view[stack]]]))


def _numbered(columns: Ints) -> Ints:
    """Equal columns by one number."""
    order = np.lexsort(columns)
    number = np.empty(len(order), np.int64)
    number[order] = np.append(0, (np.diff(columns[:, order]) != 0).any(0).cumsum())[: len(order)]
    return number


def _within(new: NDArray[np.bool_]) -> Ints:
    """The place of each entry in its run, where ``new`` says of all but the first whether they begin one."""
    at = np.arange(len(new) + 1)
    return at - np.maximum.accumulate(np.where(np.append(True, new), at, 0))


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
