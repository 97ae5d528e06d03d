"""Work lists: a table of tiles as what the programs of a launch are to compute. Integers only.

A *lane* is a run of local rows of one step, or an index list; the rows of a launch are cut along their lanes into
*blocks*, and each block belongs to one program, which computes all that the tiles say of its rows. So no two programs
write to one row, nothing is added atomically, and sums always have one order. Tiles whose lanes may share rows go into
launches of their own, *waves*, one after the other.

For the gradients of keys the same is made of the table transposed, with keys as rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ringattn.geometry.spans import Ints, columns, expand
from ringattn.geometry.tiles import RowIndex, Tiles

Bools = NDArray[np.bool_]

# Of a block: first row and step (step 0: its place in the index table), rows, its entries, whether its rows are fresh.
BLOCK = ("first", "step", "count", "begin", "end", "fresh")
# Of a block in a tile: the block's rows [x0, x1) that the tile has, its columns as a run, and which pairs (row x of the
# block, column j of the tile) it has: lo <= j - x <= hi.
ENTRY = ("x0", "x1", "first", "step", "count", "lo", "hi")


@dataclass(frozen=True, eq=False)
class Axis:
    """One side of tiles: ``runs [n, 3]`` (first, count, step) of local rows. With step 0 the rows are listed in
    ``index``, from place ``first`` on."""

    runs: Ints
    index: Ints

    @staticmethod
    def of(runs: Ints, lists: list[RowIndex]) -> Axis:
        """Even runs, followed by rows that may be lists; equal lists are kept once."""
        made, index, known, size = [], [np.empty(0, np.int64)], dict[bytes, int](), 0
        for rows in lists:
            if isinstance(rows, slice):
                made.append((rows.start, len(range(rows.start, rows.stop, rows.step)), rows.step))
                continue
            place = known.setdefault(rows.tobytes(), size)
            if place == size:
                index.append(rows)
                size += len(rows)
            made.append((place, len(rows), 0))
        runs = np.concatenate((runs, np.array(made, np.int64).reshape(-1, 3)))
        runs[(runs[:, 1] == 1) & (runs[:, 2] > 1), 2] = 1  # the step of one row is any
        return Axis(runs, np.concatenate(index))

    @property
    def size(self) -> int:
        """All local rows lie below it."""
        first, count, step = self.runs[self.runs[:, 2] > 0].T
        return int(max((first + (count - 1) * step).max(initial=-1), self.index.max(initial=-1))) + 1


@dataclass(frozen=True, eq=False)
class Table:
    """Tiles by rows and columns, with pairs where ``lo <= j - i <= hi``."""

    rows: Axis
    cols: Axis
    lo: Ints
    hi: Ints

    @staticmethod
    def of(tiles: Tiles) -> Table:
        q0, nq, qs, k0, nk, ks, lo, hi = tiles.boxes.T
        rows = Axis.of(columns(q0, nq, qs), [tile.q for tile in tiles.products])
        cols = Axis.of(columns(k0, nk, ks), [tile.k for tile in tiles.products])
        free = np.full(len(tiles.products), 1 << 40)
        lo, hi = np.concatenate((lo, -free)), np.concatenate((hi, free))
        return Table(rows, cols, np.maximum(lo, 1 - rows.runs[:, 1]), np.minimum(hi, cols.runs[:, 1] - 1))

    @property
    def transposed(self) -> Table:
        return Table(self.cols, self.rows, -self.hi, -self.lo)


@dataclass(frozen=True, eq=False)
class Wave:
    """One launch: ``blocks [n, 6]`` as in ``BLOCK``, those with most to do first, and ``entries [m, 7]`` as in
    ``ENTRY``. ``lists``: whether some rows, and whether some columns, are index lists."""

    blocks: Ints
    entries: Ints
    lists: tuple[bool, bool]

    def computed(self, block_rows: int, block_cols: int) -> int:
        """Scores that its programs compute for one head, in blocks of so many rows and columns, masked ones counted."""
        return int(block_rows * (-(-_reached(self.entries) // block_cols)).sum() * block_cols)


def waves(table: Table, height: int, fresh: Bools | None = None) -> list[Wave]:
    """The launches that compute a table, in blocks of at most ``height`` rows. ``fresh``: of the first local rows, if
    nothing was written to them yet; to the others something was."""
    size = table.rows.size
    empty, made = np.zeros(size, bool), []
    if fresh is not None:
        empty[: len(fresh)] = fresh[:size]
    for lanes in _disjoint(table.rows, size):
        made.append(_wave(table, lanes, height, empty))
        for lane in lanes:
            empty[lane.rows] = False
    return made


@dataclass(frozen=True, eq=False)
class Lanes:
    """All lanes of one step, or one index list: rows end to end on one axis, on which tiles are runs.

    ``rows`` are the local rows that tiles have; ``home [m]`` is the local row of each place of the axis, -1 where no
    tile has it; ``length`` is that of a lane, ``base`` the place in the index table and ``step`` 0 for a list.
    """

    tiles: Ints
    begins: Ints
    rows: Ints
    home: Ints
    length: int
    step: int
    base: int

    def block(self, place: Ints, count: Ints) -> tuple[Ints, Ints, Ints]:
        """First row, step and number of rows of runs on the axis."""
        first = self.base + place if not self.step else place // self.length + place % self.length * self.step
        return first, np.full_like(first, self.step), count


def _lanes(axis: Axis, size: int) -> Iterator[Lanes]:
    """The lanes of tiles, by their step, lists one by one."""
    first, count, step = axis.runs.T
    kinds, which = np.unique(np.where(step > 0, step, -1 - first), return_inverse=True)
    for number, kind in enumerate(kinds.tolist()):
        tiles = np.flatnonzero(which.reshape(-1) == number)
        if kind < 0:
            rows = axis.index[-1 - kind : -1 - kind + count[tiles[0]]]
            yield Lanes(tiles, np.zeros(len(tiles), np.int64), rows, rows, len(rows), 0, -1 - kind)
            continue
        length = -(-size // kind)
        edges = np.zeros(kind * (length + 1), np.int64)
        np.add.at(edges, first[tiles], 1)
        np.add.at(edges, first[tiles] + count[tiles] * kind, -1)
        touched = np.flatnonzero(edges.reshape(-1, kind).cumsum(0).reshape(-1))
        home = np.full(kind * length, -1)
        home[touched % kind * length + touched // kind] = touched
        yield Lanes(tiles, first[tiles] % kind * length + first[tiles] // kind, touched, home, length, kind, 0)


def _disjoint(axis: Axis, size: int) -> list[list[Lanes]]:
    """Lanes in waves of which no two share a row: each goes to the first wave that has none of its rows."""
    made: list[tuple[list[Lanes], Bools]] = []
    for lanes in _lanes(axis, size):
        free = next((wave for wave in made if not wave[1][lanes.rows].any()), None)
        if free is None:
            made.append(free := ([], np.zeros(size, bool)))
        free[0].append(lanes)
        free[1][lanes.rows] = True
    return [lanes for lanes, _ in made]


def _wave(table: Table, lanes: list[Lanes], height: int, fresh: Bools) -> Wave:
    blocks, entries, number = [], [], 0
    for lane in lanes:
        start, count, new = _cut(lane, height, fresh)
        tile, block = _met(start, start + count, lane.begins, table.rows.runs[lane.tiles, 1])
        at, tile = lane.begins[tile] - start[block], lane.tiles[tile]
        x0, x1 = np.maximum(at, 0), np.minimum(at + table.rows.runs[tile, 1], count[block])
        first, nk, step = table.cols.runs[tile].T
        # The row of the tile is x - at.
        entries.append(columns(block + number, x0, x1, first, step, nk, table.lo[tile] - at, table.hi[tile] - at))
        blocks.append(columns(*lane.block(start, count), new))
        number += len(start)
    entry, block = np.concatenate(entries), np.concatenate(blocks)
    entry = entry[np.argsort(entry[:, 0], kind="stable")]
    bounds = np.searchsorted(entry[:, 0], np.arange(number + 1))
    effort = np.bincount(entry[:, 0], _reached(entry[:, 1:]), number)
    order = np.argsort(-effort, kind="stable")  # so that no program begins a long block when others are done
    made = columns(block[:, :3], bounds[:-1], bounds[1:], block[:, 3])[order]
    return Wave(made, entry[:, 1:], (bool((block[:, 1] == 0).any()), bool((entry[:, 4] == 0).any())))


def _cut(lanes: Lanes, height: int, fresh: Bools) -> tuple[Ints, Ints, Ints]:
    """Blocks on the axis of lanes, as start, count and fresh: rows that tiles have, fresh for all or for none."""
    state = np.where(lanes.home >= 0, 1 + fresh[lanes.home], 0)
    border = np.arange(len(state)) % lanes.length == 0
    border[1:] |= state[1:] != state[:-1]
    starts = np.flatnonzero(border)
    lengths = np.diff(np.append(starts, len(state)))
    run, within = expand(np.where(state[starts] > 0, -(-lengths // height), 0))
    start = starts[run] + within * height
    return start, np.minimum(height, lengths[run] - within * height), state[start] - 1


def _met(starts: Ints, stops: Ints, begins: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Pairs of a tile and a block that share places of an axis; blocks are in order."""
    low, high = np.searchsorted(stops, begins, "right"), np.searchsorted(starts, begins + counts, "left")
    tile, within = expand(high - low)
    return tile, low[tile] + within


def _reached(entries: Ints) -> Ints:
    """Columns that some row of an entry sees."""
    x0, x1, _, _, count, lo, hi = entries.T
    return np.minimum(count, x1 + hi) - np.maximum(0, x0 + lo)
