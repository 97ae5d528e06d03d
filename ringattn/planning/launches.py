"""Launches: tiles that one kernel call computes together.

Masks made of many small equal blocks (BigBird, chunks, strides) have thousands of equal tiles. A kernel takes such a
*stack* as one call, the tiles side by side in its batch dim, so that a step costs as many calls as it has shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from ringattn.geometry.spans import Ints
from ringattn.geometry.tiles import RowIndex, Tile, Tiles, Window, run, window

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
    def of(device: str, alone: bool) -> Stacking:
        """That of a type of device. For 64 x 64 tiles of 4 heads, a CPU needs 1.6 times as long for stacks of scattered
        rows as for their tiles one by one, and 0.75 times for rows that lie side by side. ``alone``: each tile is to
        be a call of its own, as it must know where it lies (a bias, dropout), or sums must have one order."""
        if alone:
            return Stacking.NONE
        return Stacking.VIEWS if device == "cpu" else Stacking.ALL


@dataclass(frozen=True, eq=False)
class Launch:
    """``count`` tiles of one window, whose query rows are disjoint: one kernel call. ``q`` and ``k`` are their rows,
    tile after tile, ``area`` their pairs. ``fresh``: nothing was written to these rows of the result before (in
    backward: of dq), ``fresh_keys``: nor to these rows of dk and dv."""

    q: RowIndex
    k: RowIndex
    window: Window
    area: int
    count: int = 1
    fresh: bool = False
    fresh_keys: bool = False

    @staticmethod
    def of(tile: Tile) -> Launch:
        return Launch(tile.q, tile.k, tile.window, tile.area)

    def as_fresh(self) -> Launch:
        """The same for rows that nothing has touched yet."""
        return replace(self, fresh=True)

    @property
    def tiles(self) -> list[Tile]:
        """Its tiles one by one."""
        if self.count == 1:
            return [Tile(self.q, self.k, self.window, self.area)]
        parts = (np.split(_index(rows), self.count) for rows in (self.q, self.k))
        return [Tile(q, k, self.window, self.area // self.count) for q, k in zip(*parts, strict=True)]


def launches(tiles: Tiles, stacking: Stacking = Stacking.ALL) -> list[Launch]:
    """The tiles in launches, single ones first, in their order."""
    stacks, alone = _stacks(tiles, stacking) if stacking is not Stacking.NONE else ([], np.arange(len(tiles.boxes)))
    single = Tiles(tiles.boxes[alone], tiles.products)
    return [*map(Launch.of, single), *stacks]


def _stacks(tiles: Tiles, stacking: Stacking) -> tuple[list[Launch], Ints]:
    """Small tiles that are launched together, and the numbers of those that are left."""
    boxes, alone = tiles.boxes, np.ones(len(tiles.boxes), bool)
    small = np.flatnonzero((boxes[:, [1, 4]] <= SMALL).all(1))
    if len(small) < SOME:
        return [], np.flatnonzero(alone)
    kinds, which, counts = np.unique(boxes[small][:, [1, 4, 6, 7]], axis=0, return_inverse=True, return_counts=True)
    made = []
    for kind in np.flatnonzero(counts >= SOME).tolist():
        nq, nk, lo, hi = kinds[kind].tolist()
        members, most = small[which.reshape(-1) == kind], max(ROWS // (nq + nk), 1)
        for row in _disjoint(boxes[members]):
            for part in (members[row[i : i + most]] for i in range(0, len(row), most)):
                q, k = _laid_out(boxes[part][:, :3]), _laid_out(boxes[part][:, 3:6])
                if stacking is Stacking.ALL or (isinstance(q, slice) and isinstance(k, slice)):
                    area = int(tiles.take(part).areas.sum())
                    made.append(Launch(q, k, window(nq, nk, lo, hi), area, len(part)))
                    alone[part] = False
    return made, np.flatnonzero(alone)


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


def _disjoint(boxes: Ints) -> Iterator[Ints]:
    """The numbers of boxes in rows of which no two share a query: each goes to the first row that has none of its
    queries."""
    rows: list[tuple[list[int], set[int]]] = []
    for number, (start, length, step) in enumerate(boxes[:, :3].tolist()):
        wanted = range(start, start + length * step, step)
        free = next((row for row in rows if row[1].isdisjoint(wanted)), None)
        if free is None:
            rows.append(free := ([], set()))
        free[0].append(number)
        free[1].update(wanted)
    return (np.array(row) for row, _ in rows)


def _laid_out(runs: Ints) -> RowIndex:
    """Rows of runs (start, length, step) of one length, one after the other."""
    if len(runs) == 1:
        return run(*runs[0].tolist())
    start, length, step = runs.T
    index = (start[:, None] + step[:, None] * np.arange(length[0])).reshape(-1)
    stride = int(index[1] - index[0])
    even = stride > 0 and bool((np.diff(index) == stride).all())
    return run(int(index[0]), len(index), stride) if even else index


def _index(rows: RowIndex) -> Ints:
    return np.arange(rows.start, rows.stop, rows.step) if isinstance(rows, slice) else rows
