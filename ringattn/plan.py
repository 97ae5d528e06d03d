"""Plans: from a bound mask and the layouts of queries and keys to work, needs and tiles. Integers only.

A band is cut by the spans of a rank's queries and trimmed; what remains names the rank's work and,
on its key side, the keys the rank needs. Cut again by the spans of a frame of keys (a shard, or a
buffer of received spans) and expressed in local indices, it is a tile: exactly one kernel call.
Neighbouring tiles whose common hull has the sum of their areas become one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import lcm

import numpy as np

from ringattn.bands import (
    ANY,
    HI,
    INF,
    K0,
    K_AXIS,
    KN,
    KS,
    KSET,
    LO,
    Q0,
    Q_AXIS,
    QN,
    QS,
    QSET,
    TAG,
    Bands,
    Ints,
    areas,
    concat,
    cross_spans,
    expand,
    overlapping,
    regular,
    staircase,
)
from ringattn.layouts import Frame, Layout
from ringattn.masks import BoundMask

Rows = slice | Ints  # local rows: a slice (possibly strided), or an index array for scattered tokens


@dataclass(frozen=True, eq=False)
class Tile:
    """One kernel call: rows ``q`` of the shard against rows ``k`` of a frame.

    ``window = (left, right)`` is bottom-right aligned: row ``i`` attends column ``j`` where
    ``i + (nk - nq) - left <= j <= i + (nk - nq) + right``; ``None`` is unbounded, both sides are >= 0,
    no row and no column is empty. ``fresh`` says that no earlier tile of the rank touched these rows.
    The global positions are those of the frames: ``frame.positions()[tile.k]``.
    """

    q: Rows
    k: Rows
    window: tuple[int | None, int | None]
    area: int
    fresh: bool = False


def cut(bands: Bands, axis: tuple[int, ...], spans: Ints, tags: Ints) -> Bands:
    """The bands restricted to each span ``[n, 3]`` on an axis, the span's tag written into ``TAG``."""
    i, j = overlapping(*bands.hull(axis), *Frame(spans).hull)
    data = bands.data[i]
    data[:, list(axis[:3])] = cross_spans(data[:, list(axis[:3])], spans[j])
    data[:, TAG] = tags[j]
    return Bands(data[data[:, axis[1]] > 0], bands.sets)


@dataclass(frozen=True, eq=False)
class Plan:
    """Who computes what and who needs which keys, for one bound mask over ``world_size`` ranks.

    The whole world's figures are computed only when asked for; a single rank's tiles never need them.
    """

    mask: BoundMask
    q_layout: Layout
    k_layout: Layout

    @property
    def world_size(self) -> int:
        return self.q_layout.world_size

    def q_frame(self, rank: int) -> Frame:
        """The rank's queries in global positions, ``q_offset`` included."""
        spans = self.q_layout.frame(rank).spans + np.array([self.mask.q_offset, 0, 0])
        return Frame(spans)

    @cached_property
    def world(self) -> Bands:
        """All bands cut by all ranks' queries, ``TAG`` = rank."""
        table = self.q_layout.table
        spans = table[:, 1:] + np.array([self.mask.q_offset, 0, 0])
        bands = self.mask.bands(self.mask.q_offset, self.mask.q_offset + self.mask.q_len)
        return regular(cut(bands, Q_AXIS, spans, table[:, 0]))

    @lru_cache(maxsize=2)  # noqa: B019 - a plan lives as long as its context; two ranks are never asked at once
    def rank_bands(self, rank: int) -> Bands:
        """The bands of one rank's queries, from the stretches of its own spans only."""
        parts = []
        for span in self.q_frame(rank).spans:
            start, stop = int(span[0]), int(span[0] + (span[1] - 1) * span[2] + 1)
            parts.append(cut(self.mask.bands(start, stop), Q_AXIS, span[None], np.array([rank])))
        return regular(concat(parts))

    @cached_property
    def work(self) -> Ints:
        """Attending pairs of each rank."""
        return np.bincount(self.world.data[:, TAG], areas(self.world), self.world_size).astype(np.int64)

    @cached_property
    def windowed(self) -> bool:
        """Whether any tile of any rank may be bounded on the left."""
        bands = self.mask.bands(self.mask.q_offset, self.mask.q_offset + self.mask.q_len)
        return bool((bands.data[:, LO] > -INF).any())

    @cached_property
    def world_needs(self) -> Ints:
        """Rows (rank, owner, start, length, step): the foreign key spans every rank needs, each token once."""
        return self._needs(self.world)

    def needs(self, rank: int) -> Ints:
        """Rows (owner, start, length, step): the foreign key spans this rank needs."""
        return self._needs(self.rank_bands(rank))[:, 1:]

    def _needs(self, bands: Bands) -> Ints:
        wanted = key_spans(bands)
        table = self.k_layout.table
        i, j = overlapping(*Frame(wanted[:, 1:]).hull, *Frame(table[:, 1:]).hull)
        foreign = wanted[i, 0] != table[j, 0]
        i, j = i[foreign], j[foreign]
        spans = cross_spans(wanted[i, 1:], table[j, 1:])
        held = spans[:, 1] > 0
        rank, owner = wanted[i, 0][held], table[j, 0][held]
        world = self.world_size
        merged = merge_spans(rank * world + owner, spans[held])
        return np.column_stack((merged[:, 0] // world, merged[:, 0] % world, merged[:, 1:]))

    @cached_property
    def received(self) -> Ints:
        """Tokens of foreign K/V each rank needs: the least any schedule can bring it."""
        needs = self.world_needs
        return np.bincount(needs[:, 0], needs[:, 3], self.world_size).astype(np.int64)

    def tiles(self, rank: int, keys: Frame) -> tuple[Tile, ...]:
        """The rank's tiles against a frame of keys, coalesced, in order of queries then keys."""
        return localise(self.rank_bands(rank), self.q_frame(rank), keys)


def key_spans(bands: Bands) -> Ints:
    """Rows (tag, start, length, step) of all keys the bands hold; a tag's spans may still overlap."""
    data = bands.data
    parts = [data[data[:, KSET] == ANY][:, [TAG, K0, KN, KS]]]
    for i, members in enumerate(bands.sets, start=1):
        # Queries of one rank see nested ranges of the same scattered keys: join the ranges first.
        rows = data[data[:, KSET] == i]
        runs = _merge_runs(rows[:, TAG], rows[:, K0], rows[:, KN])
        tag, start, stop = runs[:, 0], runs[:, 1], runs[:, 1] + runs[:, 2]
        first = np.searchsorted(members.bounds[:, 1], start, "right")
        of, within = expand(np.maximum(np.searchsorted(members.bounds[:, 0], stop, "left") - first, 0))
        bounds = members.bounds[first[of] + within]
        low, high = np.maximum(bounds[:, 0], start[of]), np.minimum(bounds[:, 1], stop[of])
        parts.append(np.stack((tag[of], low, high - low, np.ones_like(low)), 1))
    return np.concatenate(parts)


def merge_spans(group: Ints, spans: Ints, step: int = 0) -> Ints:
    """Union of spans within each group, as rows (group, start, length, step), disjoint, sorted.

    Spans of one step come back with that step. Mixed steps are merged by residue class of their least
    common multiple (or of ``step``, if given), and a group that is one gapless run becomes one span.
    """
    if not len(spans):
        return np.empty((0, 4), np.int64)
    common = step or lcm(*np.unique(spans[:, 2]).tolist())
    parts = common // spans[:, 2]
    rows, residue = expand(np.minimum(parts, spans[:, 1]))
    start = spans[rows, 0] + residue * spans[rows, 2]
    length = -((residue - spans[rows, 1]) // parts[rows])
    lane = group[rows] * common + start % common
    merged = _merge_runs(lane, start // common, length)
    out = np.stack((merged[:, 0] // common, merged[:, 1] * common + merged[:, 0] % common, merged[:, 2]), 1)
    out = np.column_stack((out, np.full(len(out), common)))
    return out if step or common == 1 else _join_residues(out)


def _merge_runs(lane: Ints, start: Ints, length: Ints) -> Ints:
    """Union of step-1 runs within each lane, as rows (lane, start, length), sorted."""
    if not len(lane):
        return np.empty((0, 3), np.int64)
    order = np.lexsort((start, lane))
    lane, start, end = lane[order], start[order], (start + length)[order]
    # Lanes are laid end to end on one axis, so that one running maximum serves all of them.
    width = int(end.max(initial=0)) + 2
    base = (lane - lane[0]) * width
    reach = np.maximum.accumulate(base + end)
    new = np.concatenate(([True], (base + start)[1:] > reach[:-1]))
    first = np.flatnonzero(new)
    last = np.append(first[1:] - 1, len(lane) - 1)
    return np.stack((lane[first], start[first], (reach - base)[last] - start[first]), 1)


def _join_residues(spans: Ints) -> Ints:
    """Groups (column 0) whose residue classes together hold one gapless run, replaced by that run."""
    first = np.flatnonzero(np.concatenate(([True], np.diff(spans[:, 0]) > 0)))
    count = np.add.reduceat(spans[:, 2], first)
    low = np.minimum.reduceat(spans[:, 1], first)
    high = np.maximum.reduceat(spans[:, 1] + (spans[:, 2] - 1) * spans[:, 3], first)
    whole = high - low + 1 == count
    runs = np.stack((spans[first, 0], low, count, np.ones_like(count)), 1)[whole]
    rest = spans[~np.isin(spans[:, 0], runs[:, 0])]
    out = np.concatenate((runs, rest))
    return out[np.lexsort((out[:, 1], out[:, 0]))]


# -- tiles --------------------------------------------------------------------------------------


def localise(bands: Bands, q_frame: Frame, k_frame: Frame) -> tuple[Tile, ...]:
    """The tiles of :func:`regular` bands whose queries lie in ``q_frame``, against the keys of ``k_frame``."""
    scattered = (bands.data[:, [QSET, KSET]] != ANY).any(1)
    tiles = [t for row in bands.data[scattered] if (t := _product_tile(bands, row, q_frame, k_frame))]
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
    boxes = coalesce(np.column_stack((q, k, lo, hi)))
    order = np.lexsort((boxes[:, 3], boxes[:, 0]))
    return tuple(_tile(row) for row in boxes[order].tolist()) + tuple(tiles)


def _tile(box: Sequence[int]) -> Tile:
    q0, nq, qs, k0, nk, ks, lo, hi = box
    shift = nk - nq
    left = None if lo <= 1 - nq else shift - lo
    right = None if hi >= nk - 1 else hi - shift
    area = int(staircase(*np.array([[nq], [nk], [hi]]))[0] - staircase(*np.array([[nq], [nk], [lo - 1]]))[0])
    return Tile(_slice(q0, nq, qs), _slice(k0, nk, ks), (left, right), area)


def _slice(start: int, length: int, step: int) -> slice:
    return slice(start, start + (length - 1) * step + 1, step)


def _product_tile(bands: Bands, row: Ints, q_frame: Frame, k_frame: Frame) -> Tile | None:
    """A band of scattered positions with no diagonal: index runs on either axis, one call."""
    sides = []
    for axis, frame in ((Q_AXIS, q_frame), (K_AXIS, k_frame)):
        start, length, step, members = (int(row[c]) for c in axis)
        spans = np.array([[start, length, step]])
        if members != ANY:
            bounds = np.clip(bands.sets[members - 1].bounds, start, start + length)
            bounds = bounds[bounds[:, 1] > bounds[:, 0]]
            spans = np.stack((bounds[:, 0], bounds[:, 1] - bounds[:, 0], np.ones(len(bounds), np.int64)), 1)
        runs = frame.rows(spans)
        index = np.sort(Frame(runs).positions())
        if not len(index):
            return None
        steps = np.diff(index)
        even = len(index) == 1 or (steps == steps[0]).all()
        step = int(steps[0]) if even and len(index) > 1 else 1
        sides.append((_slice(int(index[0]), len(index), step) if even else index, len(index)))
    (q, nq), (k, nk) = sides
    return Tile(q, k, (None, None), nq * nk)


def coalesce(boxes: Ints) -> Ints:
    """Boxes ``(q0, nq, qs, k0, nk, ks, lo, hi)`` merged where a common hull holds exactly their pairs.

    ``lo <= j - i <= hi`` counts from the box's own corner. Merging goes between neighbours in order of
    queries and in order of keys until nothing changes, then over all pairs where there are few.
    """
    if not len(boxes):
        return boxes
    lanes = np.column_stack((boxes[:, [2, 5]], boxes[:, 0] % boxes[:, 2], boxes[:, 3] % boxes[:, 5]))
    kinds, lane = np.unique(lanes, axis=0, return_inverse=True)
    out = []
    for i, (qs, ks, q_rest, k_rest) in enumerate(kinds.tolist()):
        box = boxes[lane.reshape(-1) == i]
        q, k = box[:, 0] // qs, box[:, 3] // ks
        flat = np.column_stack((q, q + box[:, 1], k, k + box[:, 4], box[:, 6] + k - q, box[:, 7] + k - q))
        flat = _merge_boxes(flat)
        q0, q1, k0, k1, lo, hi = flat.T
        steps = np.full((2, len(flat)), [[qs], [ks]])
        columns = (
            q0 * qs + q_rest,
            q1 - q0,
            steps[0],
            k0 * ks + k_rest,
            k1 - k0,
            steps[1],
            lo - k0 + q0,
            hi - k0 + q0,
        )
        out.append(np.stack(columns, 1))
    return np.concatenate(out)


def _box_area(b: Ints) -> Ints:
    nq, nk, gap = b[:, 1] - b[:, 0], b[:, 3] - b[:, 2], b[:, 2] - b[:, 0]
    return staircase(nq, nk, b[:, 5] - gap) - staircase(nq, nk, b[:, 4] - gap - 1)


def _box_hull(a: Ints, b: Ints) -> Ints:
    low, high = np.minimum(a, b), np.maximum(a, b)
    return np.stack((low[:, 0], high[:, 1], low[:, 2], high[:, 3], low[:, 4], high[:, 5]), 1)


def _merge_boxes(boxes: Ints) -> Ints:
    """Boxes ``(q0, q1, k0, k1, lo, hi)`` in one pair of index lattices, merged as far as it goes."""
    unchanged = 0
    keys = ((2, 0), (0, 2))
    turn = 0
    while unchanged < len(keys) and len(boxes) > 1:
        boxes = boxes[np.lexsort(boxes[:, keys[turn % 2]].T)]
        turn += 1
        hull = _box_hull(boxes[:-1], boxes[1:])
        area = _box_area(boxes)
        fits = _box_area(hull) == area[:-1] + area[1:]
        if not fits.any():
            unchanged += 1
            continue
        unchanged = 0
        # Within a run of mergeable neighbours every second pair is merged: no box is used twice.
        starts = np.flatnonzero(fits & ~np.concatenate(([False], fits[:-1])))
        run = np.arange(len(fits)) - starts[np.maximum(np.cumsum(np.isin(np.arange(len(fits)), starts)) - 1, 0)]
        chosen = np.flatnonzero(fits & (run % 2 == 0))
        boxes[chosen] = hull[chosen]
        boxes = np.delete(boxes, chosen + 1, 0)
    return _merge_all_pairs(boxes) if 2 < len(boxes) <= 64 else boxes


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
