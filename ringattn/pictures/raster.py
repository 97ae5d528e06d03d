"""Pairs counted by the cells of a grid, exactly and whatever the lengths: from bands in closed form, never pair by
pair."""

from __future__ import annotations

import numpy as np

from ringattn.geometry.bands import ANY, HI, K0, K_AXIS, LO, Q0, Q_AXIS, QS, TAG, Bands, trim
from ringattn.geometry.regular import areas, staircase
from ringattn.geometry.spans import INF, Ints, clip_spans, columns, overlapping
from ringattn.geometry.tiles import cut

WIDE = 2048  # cells that a band meets, from which on it is counted over the whole grid at once
ROOM = 1 << 26  # cells times wide bands that are looked at: about a second
LEAST = 64  # cells of a side that are counted whatever it takes


def edges(start: int, stop: int, cells: int) -> Ints:
    """Where at most so many cells begin, and the end: of equal length, to a position, and none empty."""
    cells = max(min(cells, stop - start), 1)
    return start + np.arange(cells + 1, dtype=np.int64) * (stop - start) // cells


def counted(bands: Bands, rows: Ints, cols: Ints) -> Ints:
    """Pairs of :func:`regular` bands in every cell, ``[len(rows) - 1, len(cols) - 1]``. ``rows`` and ``cols``: the
    first query and the first key of each cell, ascending, and the end of the last."""
    wide = _met(bands, rows, cols) > WIDE
    found = _of_narrow(bands.take(~wide), rows, cols)
    before = np.zeros((len(rows), len(cols)), np.int64)
    for number in np.flatnonzero(wide).tolist():
        before += _before(bands.take([number]), rows, cols)
    return found + np.diff(np.diff(before, axis=0), axis=1)


def affordable(bands: Bands, queries: tuple[int, int], keys: tuple[int, int], most: int) -> int:
    """The cells of a side, at most ``most``, for which counting takes about a second at most. (Residue classes of a
    stride each lie all over the grid.)"""
    while most > LEAST:
        wide = _met(bands, edges(*queries, most), edges(*keys, most)) > WIDE
        if int(wide.sum()) * most * most <= ROOM:
            break
        most //= 2
    return most


def _met(bands: Bands, rows: Ints, cols: Ints) -> Ints:
    """About how many cells each band meets: those of its hull or, where it is a narrow strip, those along it."""
    sides = []
    for axis, at in ((Q_AXIS, rows), (K_AXIS, cols)):
        start, stop = bands.hull(axis)
        sides.append(np.searchsorted(at, stop, "left") - np.searchsorted(at, start, "right") + 1)
    lo, hi = bands.data[:, LO], bands.data[:, HI]
    strip = (lo > -INF) & (hi < INF)
    size = max(int(cols[-1] - cols[0]) // (len(cols) - 1), 1)
    across = np.where(strip, (hi - lo) // size + 3, len(cols))
    return np.asarray(np.minimum(sides[0] * sides[1], (sides[0] + sides[1]) * across))


def _of_narrow(bands: Bands, rows: Ints, cols: Ints) -> Ints:
    """Each band cut at the borders of rows, and what is left of it at those of columns."""
    height, width = len(rows) - 1, len(cols) - 1
    found = np.zeros(height * width, np.int64)
    parts = trim(cut(bands, Q_AXIS, columns(rows[:-1], np.diff(rows), 1), np.arange(height)))
    if len(parts):
        i, j = overlapping(*parts.hull(K_AXIS), cols[:-1], cols[1:])
        data = parts.data[i]
        data[:, list(K_AXIS)] = clip_spans(data[:, list(K_AXIS)], cols[j], cols[j + 1] - 1)
        np.add.at(found, data[:, TAG] * width + j, areas(Bands(data, parts.sets)))
    return found.reshape(height, width)


def _before(band: Bands, rows: Ints, cols: Ints) -> Ints:
    """Pairs of one band with a query below each border of rows and a key below each of columns."""
    row = band.data[0]
    nq, nk = _below(band, Q_AXIS, rows)[:, None], _below(band, K_AXIS, cols)[None]
    gap, step = row[K0] - row[Q0], row[QS]
    found = staircase(nq, nk, (row[HI] - gap) // step) if row[HI] < INF else nq * nk
    return found - staircase(nq, nk, (row[LO] - gap) // step - 1) if row[LO] > -INF else found


def _below(band: Bands, axis: tuple[int, ...], at: Ints) -> Ints:
    """How many positions of one band on an axis lie below each of some."""
    start, length, step, members = (int(band.data[0, column]) for column in axis)
    if members == ANY:
        return np.clip(-((start - at) // step), 0, length)
    chosen, ends = band.sets[members - 1], np.array([start, start + (length - 1) * step + 1])
    return chosen.rank(np.clip(at, *ends)) - chosen.rank(ends[:1])
