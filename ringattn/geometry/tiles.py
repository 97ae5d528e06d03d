"""Tiles: a rank's bands in the local indices of its queries and of a frame of keys, each one kernel call.

Neighbouring tiles whose common hull has exactly their pairs become one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ringattn.geometry.bands import (
    ANY,
    HI,
    K0,
    K_AXIS,
    KN,
    KSET,
    LO,
    Q0,
    Q_AXIS,
    QN,
    QS,
    QSET,
    TAG,
    Bands,
)
from ringattn.geometry.frames import Frame
from ringattn.geometry.regular import regular, staircase
from ringattn.geometry.spans import INF, Ints, columns, cross_spans, ordered, overlapping

Window = tuple[int | None, int | None]
RowIndex = slice | Ints  # local rows: a slice (possibly strided), or an index array for scattered tokens


@dataclass(frozen=True, eq=False)
class Tile:
    """Rows ``q`` of a shard against rows ``k`` of a frame, one kernel call.

    ``window = (left, right)`` is bottom-right aligned: row ``i`` attends column ``j`` where
    ``i + (nk - nq) - left <= j <= i + (nk - nq) + right``; ``None`` is unbounded, both sides are >= 0,
    no row and no column is empty. The global positions are those of the frames: ``frame.positions()[tile.k]``.
    """

    q: RowIndex
    k: RowIndex
    window: Window
    area: int


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of one rank against one frame of keys, as a table.

    ``boxes [n, 8]`` holds (q0, nq, q step, k0, nk, k step, lo, hi) of tiles whose rows and columns are evenly spaced,
    local indices, in order of queries then keys; pairs are those with ``lo <= j - i <= hi``. ``products`` are the tiles
    of scattered tokens, which are full.
    """

    boxes: Ints
    products: tuple[Tile, ...] = ()

    def __len__(self) -> int:
        return len(self.boxes) + len(self.products)

    def __iter__(self) -> Iterator[Tile]:
        for (q0, nq, qs, k0, nk, ks, lo, hi), area in zip(self.boxes.tolist(), self.areas.tolist(), strict=True):
            yield Tile(run(q0, nq, qs), run(k0, nk, ks), window(nq, nk, lo, hi), area)
        yield from self.products

    @property
    def areas(self) -> Ints:
        """Attending pairs of each box."""
        _, nq, _, _, nk, _, lo, hi = self.boxes.T
        return staircase(nq, nk, hi) - staircase(nq, nk, lo - 1)

    def take(self, rows: Ints) -> Tiles:
        """Some of the boxes alone."""
        return Tiles(self.boxes[rows])


NO_TILES = Tiles(np.empty((0, 8), np.int64))


def window(nq: int, nk: int, lo: int, hi: int) -> Window:
    """The bottom-right aligned window of pairs with ``lo <= j - i <= hi``; a side that does not bind is None."""
    ahead = nk - nq
    return None if lo <= 1 - nq else ahead - lo, None if hi >= nk - 1 else hi - ahead


def run(start: int, length: int, step: int) -> slice:
    """Evenly spaced rows."""
    return slice(start, start + (length - 1) * step + 1, step)


def cut(bands: Bands, axis: tuple[int, ...], spans: Ints, tags: Ints) -> Bands:
    """The bands restricted to each span ``[n, 3]`` on an axis, the span's tag written into ``TAG``."""
    i, j = overlapping(*bands.hull(axis), *Frame(spans).hull)
    data = bands.data[i]
    data[:, list(axis[:3])] = cross_spans(data[:, list(axis[:3])], spans[j])
    data[:, TAG] = tags[j]
    return Bands(data[data[:, axis[1]] > 0], bands.sets)


def localise(bands: Bands, q_frame: Frame, k_frame: Frame) -> Tiles:
    """The tiles of :func:`regular` bands whose queries lie in ``q_frame``, against the keys of ``k_frame``."""
    scattered = (bands.data[:, [QSET, KSET]] != ANY).any(1)
    products = [t for row in bands.data[scattered] if (t := _product_tile(bands, row, q_frame, k_frame))]
    plain = cut(bands.take(~scattered), Q_AXIS, q_frame.spans, np.arange(len(q_frame.spans)))
    q_of = plain.data[:, TAG].copy()
    i, j = overlapping(*plain.hull(K_AXIS), *k_frame.hull)
    data = plain.data[i]
    data[:, list(K_AXIS[:3])] = cross_spans(data[:, list(K_AXIS[:3])], k_frame.spans[j])
    data[:, TAG] = q_of[i] * max(len(k_frame.spans), 1) + j
    pieces = regular(Bands(data[data[:, KN] > 0])).data
    q_of, k_of = np.divmod(pieces[:, TAG], max(len(k_frame.spans), 1))
    q, k = q_frame.local(pieces[:, list(Q_AXIS[:3])], q_of), k_frame.local(pieces[:, list(K_AXIS[:3])], k_of)
    gap, step = pieces[:, K0] - pieces[:, Q0], pieces[:, QS]
    lo = np.where(pieces[:, LO] > -INF, (pieces[:, LO] - gap) // step, 1 - pieces[:, QN])
    hi = np.where(pieces[:, HI] < INF, (pieces[:, HI] - gap) // step, pieces[:, KN] - 1)
    boxes = coalesce(columns(q, k, lo, hi))
    return Tiles(boxes[ordered(boxes[:, 0], boxes[:, 3])], tuple(products))


def _product_tile(bands: Bands, row: Ints, q_frame: Frame, k_frame: Frame) -> Tile | None:
    """A band of scattered positions with no diagonal: index runs on either axis, one call."""
    sides = []
    for axis, frame in ((Q_AXIS, q_frame), (K_AXIS, k_frame)):
        start, length, step, members = (int(row[c]) for c in axis)
        spans = np.array([[start, length, step]])
        if members != ANY:
            bounds = np.clip(bands.sets[members - 1].bounds, start, start + length)
            bounds = bounds[bounds[:, 1] > bounds[:, 0]]
            spans = columns(bounds[:, 0], bounds[:, 1] - bounds[:, 0], 1)
        runs = frame.rows(spans)
        index = np.sort(Frame(runs).positions())
        if not len(index):
            return None
        steps = np.diff(index)
        even = len(index) == 1 or (steps == steps[0]).all()
        step = int(steps[0]) if even and len(index) > 1 else 1
        sides.append((run(int(index[0]), len(index), step) if even else index, len(index)))
    (q, nq), (k, nk) = sides
    return Tile(q, k, (None, None), nq * nk)


def coalesce(boxes: Ints, enough: float = 0.0) -> Ints:
    """Boxes ``(q0, nq, qs, k0, nk, ks, lo, hi)`` merged where a common hull holds exactly their pairs.

    ``lo <= j - i <= hi`` counts from the box's own corner. Merging goes between neighbours in order of
    queries and in order of keys until nothing changes, then over all pairs where there are few; for an estimate,
    until no more than the part ``enough`` of the boxes merge.
    """
    if not len(boxes):
        return boxes
    if (boxes[:, 2] == 1).all() and (boxes[:, 5] == 1).all():
        return _coalesce_lane(boxes, 1, 1, 0, 0, enough)
    lanes = columns(boxes[:, [2, 5]], boxes[:, 0] % boxes[:, 2], boxes[:, 3] % boxes[:, 5])
    kinds, lane = np.unique(lanes, axis=0, return_inverse=True)
    which = lane.reshape(-1)
    merged = [
        _coalesce_lane(boxes[which == i], qs, ks, q_rest, k_rest, enough)
        for i, (qs, ks, q_rest, k_rest) in enumerate(kinds.tolist())
    ]
    return np.concatenate(merged)


def _coalesce_lane(box: Ints, qs: int, ks: int, q_rest: int, k_rest: int, enough: float) -> Ints:
    """Boxes whose rows are ``q_rest + qs * i`` and whose columns are ``k_rest + ks * j``, merged."""
    q, k = box[:, 0] // qs, box[:, 3] // ks
    flat = columns(q, q + box[:, 1], k, k + box[:, 4], box[:, 6] + k - q, box[:, 7] + k - q)
    q0, q1, k0, k1, lo, hi = _merge_boxes(flat, enough).T
    gap = k0 - q0
    return columns(q0 * qs + q_rest, q1 - q0, qs, k0 * ks + k_rest, k1 - k0, ks, lo - gap, hi - gap)


def _box_area(b: Ints) -> Ints:
    nq, nk, gap = b[:, 1] - b[:, 0], b[:, 3] - b[:, 2], b[:, 2] - b[:, 0]
    below, beyond = staircase(nq, nk, np.stack((b[:, 4] - gap - 1, b[:, 5] - gap)))
    return beyond - below


def _box_hull(a: Ints, b: Ints) -> Ints:
    hull, high = np.minimum(a, b), np.maximum(a, b)
    hull[:, 1::2] = high[:, 1::2]
    return hull


def _merge_boxes(boxes: Ints, enough: float) -> Ints:
    """Boxes ``(q0, q1, k0, k1, lo, hi)`` in one pair of index lattices, merged as far as it goes.

    Boxes of the same queries first: what these see is then one tile, and no two results are to be merged.
    """
    unchanged = turn = 0
    keys, area = ((0, 2), (0, 2), (2, 0)), _box_area(boxes)
    while unchanged < 2 and len(boxes) > 1:
        order = ordered(*boxes.T[list(keys[turn])])
        boxes, area = boxes[order], area[order]
        hull = _box_hull(boxes[:-1], boxes[1:])
        fits = _box_area(hull) == area[:-1] + area[1:]
        if turn == 0:
            fits &= (boxes[:-1, :2] == boxes[1:, :2]).all(1)
        if not fits.any():
            unchanged += turn > 0
            turn = 2 if turn == 1 else 1
            continue
        # Within a run of mergeable neighbours every second pair is merged: no box is used twice.
        begins = fits.copy()
        begins[1:] &= ~fits[:-1]
        at = np.arange(len(fits))
        run = at - np.maximum.accumulate(np.where(begins, at, 0))
        chosen = np.flatnonzero(fits & (run % 2 == 0))
        little = len(chosen) <= enough * len(boxes)
        unchanged = unchanged + (turn > 0) if little else 0
        turn = {0: int(little), 1: 2, 2: 1}[turn]
        boxes[chosen] = hull[chosen]
        area[chosen] += area[chosen + 1]
        left = np.ones(len(boxes), np.bool_)
        left[chosen + 1] = False
        boxes, area = boxes[left], area[left]
    return _merge_all_pairs(boxes) if 2 < len(boxes) <= 64 and not enough else boxes


def _merge_all_pairs(boxes: Ints) -> Ints:
    while len(boxes) > 1:
        i, j = np.triu_indices(len(boxes), 1)
        hull = _box_hull(boxes[i], boxes[j])
        area = _box_area(boxes)
        fits = np.flatnonzero(_box_area(hull) == area[i] + area[j])
        if not len(fits):
            break
        at = fits[0]
        boxes = np.concatenate((np.delete(boxes, [i[at], j[at]], 0), hull[at : at + 1]))
    return boxes
