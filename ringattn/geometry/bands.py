"""The integer algebra under every mask: sets of banded rectangles, held as int64 arrays.

A band is the set of pairs ``(q, k)`` with ``q`` in a span, ``k`` in a span and ``lo <= k - q <= hi``::

        k ->                       a span is start + step * i;
      q  . x x . . .               a bound at or past INF is absent;
      |  . . x x . .               an axis may also be cut down to scattered
      v  . . . x x .               positions, a set of intervals (global tokens)

Intersection, difference and union of bands are bands, so one representation carries full, causal,
windows, documents, chunks, strides, global tokens and everything made of them. The bands of one
:class:`Bands` are disjoint. Nothing here knows torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringattn.arguments.values import MANY
from ringattn.geometry.spans import INF, Intervals, Ints, clip_spans, cross_spans, expand, overlapping

Q0, QN, QS, QSET, K0, KN, KS, KSET, LO, HI, TAG = range(11)
Q_AXIS = (Q0, QN, QS, QSET)
K_AXIS = (K0, KN, KS, KSET)
ANY = 0  # the set that holds every position
COMPARED = 1 << 22  # pairs of bands that one operation may look at: seconds, and 256 MB


class TooManyPieces(ValueError):
    """More bands than can be planned, where they would have come to be."""


def at_most(count: int) -> None:
    """Raises :class:`TooManyPieces` before so many bands are made."""
    if count > MANY:
        raise TooManyPieces(f"{count:,} pieces (at most {MANY:,}, 2**20)")


def _compare_at_most(count: int) -> None:
    if count > COMPARED:
        raise TooManyPieces(f"{count:,} pairs of pieces to compare (at most {COMPARED:,}, 2**22)")


@dataclass(frozen=True)
class Bands:
    """Disjoint bands: ``data [n, 11]`` with the columns above, and the table its set columns point into.

    ``TAG`` is a number that every operation carries along with a band (a plan stores the rank there).
    """

    data: Ints
    sets: tuple[Intervals, ...] = ()  # column value i > 0 means sets[i - 1]; ANY = 0

    @staticmethod
    def of(*rows: Sequence[int], sets: tuple[Intervals, ...] = ()) -> Bands:
        """Bands from rows ``(q0, qn, qs, qset, k0, kn, ks, kset, lo, hi)``, trimmed."""
        data = np.zeros((len(rows), 11), np.int64)
        data[:, :TAG] = np.array(rows, np.int64).reshape(-1, TAG)
        return trim(Bands(data, sets))

    @staticmethod
    def columns(q0: Ints | int, qn: Ints | int, k0: Ints | int, kn: Ints | int,
                lo: Ints | int = -INF, hi: Ints | int = INF, step: int = 1) -> Bands:  # fmt: skip
        """Bands from columns, both axes with the same step and no scattered sets."""
        columns = {Q0: q0, QN: qn, QS: step, K0: k0, KN: kn, KS: step, LO: lo, HI: hi}
        rows = max(np.size(values) for values in columns.values())
        data = np.zeros((min(np.size(values) for values in columns.values()) and rows, 11), np.int64)
        for column, values in columns.items():
            data[:, column] = values
        return trim(Bands(data))

    def __len__(self) -> int:
        return len(self.data)

    def take(self, rows: Any) -> Bands:
        return Bands(self.data[rows], self.sets)

    def hull(self, axis: tuple[int, ...]) -> tuple[Ints, Ints]:
        """The half-open range of positions each band spans on an axis."""
        start, length, step = (self.data[:, c] for c in axis[:3])
        return start, start + (length - 1) * step + 1

    @property
    def binding(self) -> NDArray[np.bool_]:
        """Which bands have a diagonal bound left (after trimming, bounds that do not bind are INF)."""
        return (self.data[:, LO] > -INF) | (self.data[:, HI] < INF)

    @property
    def max_step(self) -> int:
        return int(self.data[:, [QS, KS]].max(initial=1))


def concat(parts: Sequence[Bands]) -> Bands:
    """The bands of several disjoint collections as one, their set tables joined."""
    if not any(part.sets for part in parts):
        return Bands(np.concatenate([part.data for part in parts] or [np.empty((0, 11), np.int64)]))
    table: dict[bytes, int] = {}
    sets: list[Intervals] = []
    rows = []
    for part in parts:
        remap = np.zeros(len(part.sets) + 1, np.int64)
        for i, members in enumerate(part.sets):
            if members.key not in table:
                sets.append(members)
                table[members.key] = len(sets)
            remap[i + 1] = table[members.key]
        data = part.data.copy()
        data[:, [QSET, KSET]] = remap[data[:, [QSET, KSET]]]
        rows.append(data)
    return Bands(np.concatenate(rows), tuple(sets))


def trim(bands: Bands) -> Bands:
    """Each band cut to the bounding box of its pairs, empty bands dropped, idle bounds set to INF."""
    data, kept = trim_rows(bands.data)
    return Bands(data[kept], bands.sets)


def trim_rows(data: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """The trimmed rows and which of them hold any pair (rows that do not are left as they fall)."""
    lo, hi, out = data[:, LO], data[:, HI], data.copy()
    if (data[:, QS] == 1).all() and (data[:, KS] == 1).all():
        q_first, q_last = data[:, Q0], data[:, Q0] + data[:, QN] - 1
        k_first, k_last = data[:, K0], data[:, K0] + data[:, KN] - 1
        q_first, q_last = np.maximum(q_first, k_first - hi), np.minimum(q_last, k_last - lo)
        k_first, k_last = np.maximum(k_first, q_first + lo), np.minimum(k_last, q_last + hi)
        out[:, Q0], out[:, QN] = q_first, np.maximum(q_last - q_first + 1, 0)
        out[:, K0], out[:, KN] = k_first, np.maximum(k_last - k_first + 1, 0)
    else:
        k_last = data[:, K0] + (data[:, KN] - 1) * data[:, KS]
        q_span = clip_spans(data[:, Q_AXIS], data[:, K0] - hi, k_last - lo)
        q_first, q_last = q_span[:, 0], q_span[:, 0] + (q_span[:, 1] - 1) * q_span[:, 2]
        k_span = clip_spans(data[:, K_AXIS], q_first + lo, q_last + hi)
        k_first, k_last = k_span[:, 0], k_span[:, 0] + (k_span[:, 1] - 1) * k_span[:, 2]
        out[:, Q_AXIS], out[:, K_AXIS] = q_span, k_span
    out[lo <= k_first - q_last, LO] = -INF
    out[hi >= k_last - q_first, HI] = INF
    kept = (data[:, QN] > 0) & (data[:, KN] > 0) & (lo <= hi) & (out[:, QN] > 0) & (out[:, KN] > 0)
    return out, kept


def intersect(a: Bands, b: Bands) -> Bands:
    """The pairs in both."""
    if not len(a) or not len(b):
        return a.take(slice(0))
    i, j = _meeting(a, b)
    both = concat((a.take(i), b.take(j)))
    x, y = both.data[: len(i)], both.data[len(i) :]
    sets = list(both.sets)
    out = x.copy()
    for axis in (Q_AXIS, K_AXIS):
        out[:, list(axis[:3])] = cross_spans(x[:, list(axis[:3])], y[:, list(axis[:3])])
        out[:, axis[3]] = _cross_sets(x[:, axis[3]], y[:, axis[3]], sets)
    out[:, LO] = np.maximum(x[:, LO], y[:, LO])
    out[:, HI] = np.minimum(x[:, HI], y[:, HI])
    return trim(Bands(out, tuple(sets)))


def _meeting(a: Bands, b: Bands) -> tuple[Ints, Ints]:
    """All ``(i, j)`` such that the hulls of the bands ``a[i]`` and ``b[j]`` overlap on both axes."""
    i, j = overlapping(*a.hull(Q_AXIS), *b.hull(Q_AXIS), _compare_at_most)
    k0_a, k1_a = a.hull(K_AXIS)
    k0_b, k1_b = b.hull(K_AXIS)
    meet = (k0_a[i] < k1_b[j]) & (k0_b[j] < k1_a[i])
    return i[meet], j[meet]


def _cross_sets(x: Ints, y: Ints, sets: list[Intervals]) -> Ints:
    """Row by row the id of the intersection of two scattered sets, new ones appended to the table."""
    out = np.where(x == ANY, y, x)
    clash = (x != ANY) & (y != ANY) & (x != y)
    for a, b in np.unique(np.stack((x[clash], y[clash]), 1), axis=0).tolist() if clash.any() else ():
        sets.append(sets[a - 1].intersect(sets[b - 1]))
        out[clash & (x == a) & (y == b)] = len(sets)
    return out


def union(a: Bands, b: Bands) -> Bands:
    """The pairs in either. The operand with the larger step, then the one with diagonals, then the
    longer one is cut by the other: that keeps residue classes and fragments few."""
    if not len(a) or not len(b):
        return b if not len(a) else a
    keep, cut = sorted((a, b), key=lambda m: (m.max_step, bool(m.binding.any()), len(m)))
    return concat((keep, subtract(cut, keep)))


def subtract(a: Bands, b: Bands) -> Bands:
    """The pairs in ``a`` and not in ``b``.

    ``a`` is first cut at the query borders of ``b``, so that a fragment meets few bands of ``b``; then
    every fragment gives up its first, second, ... such band, all fragments at once.
    """
    if not len(a) or not len(b):
        return a
    a = _cut_queries(a, np.unique(np.concatenate(b.hull(Q_AXIS))))
    a = _refine(_refine(a, b, Q_AXIS), b, K_AXIS)
    i, j = _meeting(a, b)
    todo = np.bincount(i, minlength=len(a)).astype(np.int64)
    nxt = np.cumsum(todo) - todo
    done: list[Bands] = []
    while len(a):
        done.append(a.take(todo == 0))
        live = todo > 0
        a, nxt, todo = a.take(live), nxt[live], todo[live]
        if not len(a):
            break
        a, parent = _subtract_rows(a, b.take(j[nxt]))
        nxt, todo = nxt[parent] + 1, todo[parent] - 1
    return concat(done)


def _cut_queries(a: Bands, borders: Ints) -> Bands:
    """``a`` with its query spans cut at the borders (a border is the first query of a new part)."""
    q0, q1 = a.hull(Q_AXIS)
    first = np.searchsorted(borders, q0, "right")
    rows, within = expand(np.searchsorted(borders, q1, "left") - first + 1, at_most)
    edges = np.concatenate(([-INF], borders, [INF]))
    at = first[rows] + within
    data = a.data[rows]
    data[:, list(Q_AXIS)] = clip_spans(data[:, list(Q_AXIS)], edges[at], edges[at + 1] - 1)
    return trim(Bands(data, a.sets))


def _refine(a: Bands, b: Bands, axis: tuple[int, ...]) -> Bands:
    """``a`` split by residue so that each span lies inside or outside of every lattice of ``b`` on the axis."""
    return split_residues(a, axis, _step(lcm(*np.unique(b.data[:, axis[2]]).tolist())))


def _step(common: int) -> int:
    """A common multiple of steps that still is one of positions."""
    if common >= INF:
        raise TooManyPieces("residues of strides whose common multiple is beyond 2**60")
    return common


def split_residues(bands: Bands, axis: tuple[int, ...], step: int | Ints) -> Bands:
    """Bands whose span on the axis has a step that is a multiple of ``step`` (one value, or one a row)."""
    start, length, own, _ = (bands.data[:, c] for c in axis)
    parts = step // np.gcd(own, step)
    _step(int((own.astype(np.float64) * parts).max(initial=1)))
    if (parts == 1).all():
        return bands
    rows, residue = expand(np.minimum(parts, length), at_most)
    data = bands.data[rows]
    data[:, axis[0]] = start[rows] + residue * own[rows]
    data[:, axis[1]] = -((residue - length[rows]) // parts[rows])
    data[:, axis[2]] = own[rows] * parts[rows]
    return trim(Bands(data, bands.sets))


def _subtract_rows(x: Bands, y: Bands) -> tuple[Bands, Ints]:
    """Row by row ``x - y`` as up to eight disjoint pieces, and the row of ``x`` each piece came from."""
    both = concat((x, y))
    a, b = both.data[: len(x)].copy(), both.data[len(x) :]
    sets = list(both.sets)
    pieces: list[Ints] = []
    parents: list[Ints] = []
    rows = np.arange(len(x), dtype=np.int64)

    def put(piece: Ints, which: Ints) -> None:
        pieces.append(piece)
        parents.append(which)

    for axis in (Q_AXIS, K_AXIS):
        start, length, step, members = axis
        apart = (a[:, start] - b[:, start]) % b[:, step] != 0
        put(a[apart], rows[apart])
        a, b, rows = a[~apart], b[~apart], rows[~apart]
        first, last = b[:, start], b[:, start] + (b[:, length] - 1) * b[:, step]
        for lo, hi in ((-INF, first - 1), (last + 1, INF)):
            piece = a.copy()
            piece[:, list(axis)] = clip_spans(a[:, list(axis)], lo, hi)
            put(piece, rows)
        a[:, list(axis)] = clip_spans(a[:, list(axis)], first, last)
        scattered = b[:, members] != ANY
        if scattered.any():
            outside = a[scattered]
            outside[:, members] = _cross_sets(outside[:, members], _complements(b[scattered, members], sets), sets)
            put(outside, rows[scattered])
            a[:, members] = _cross_sets(a[:, members], b[:, members], sets)
    below, above = a.copy(), a.copy()
    below[:, HI] = np.minimum(a[:, HI], np.where(b[:, LO] > -INF, b[:, LO] - 1, -INF - 1))
    above[:, LO] = np.maximum(a[:, LO], np.where(b[:, HI] < INF, b[:, HI] + 1, INF + 1))
    put(below, rows)
    put(above, rows)
    data, kept = trim_rows(np.concatenate(pieces))
    out, parent = Bands(data[kept], tuple(sets)), np.concatenate(parents)[kept]
    if sets:  # a set may be empty inside its span; cut on, such rows would multiply
        held = (counts(out) > 0).all(0)
        out, parent = out.take(held), parent[held]
    return out, parent


def _complements(ids: Ints, sets: list[Intervals]) -> Ints:
    out = np.empty_like(ids)
    for i in np.unique(ids).tolist():
        sets.append(sets[i - 1].complement())
        out[ids == i] = len(sets)
    return out


def regular(bands: Bands) -> Bands:
    """The same pairs as bands of two kinds only: products (no bound binds, an axis may be scattered)
    and diagonals (plain spans of equal step, exactly trimmed)."""
    bands = trim(bands)
    if not bands.sets:
        return _align(bands)
    members = bands.data[:, [QSET, KSET]] != ANY
    stepped = (members & (bands.data[:, [QS, KS]] > 1)).any(1)
    scattered = members.any(1) & (bands.binding | stepped)
    if scattered.any():
        loose = _explode(bands.take(scattered), Q_AXIS)
        bands = concat((bands.take(~scattered), loose))
    if members.any():
        bands = bands.take((counts(bands) > 0).all(0))
    return _align(bands)


def _explode(bands: Bands, axis: tuple[int, ...]) -> Bands:
    """Bands whose scattered axis (and then the other one, where a bound still binds) is cut into its intervals."""
    start, length, step, members = axis
    data, parts = bands.data, []
    for i in np.unique(data[:, members]).tolist():
        rows = data[data[:, members] == i]
        if i == ANY:
            parts.append(rows)
            continue
        bounds = bands.sets[i - 1].bounds
        last = rows[:, start] + (rows[:, length] - 1) * rows[:, step]
        first = np.searchsorted(bounds[:, 1], rows[:, start], "right")
        of, within = expand(np.maximum(np.searchsorted(bounds[:, 0], last, "right") - first, 0))
        piece, at = rows[of], first[of] + within
        piece[:, list(axis)] = clip_spans(piece[:, list(axis)], bounds[at, 0], bounds[at, 1] - 1)
        piece[:, members] = ANY
        parts.append(piece)
    out = trim(_tighten(trim(Bands(np.concatenate(parts), bands.sets))))
    if axis is K_AXIS:
        return out
    again = (out.data[:, KSET] != ANY) & (out.binding | (out.data[:, KS] > 1))
    return concat((out.take(~again), _explode(out.take(again), K_AXIS))) if again.any() else out


def _tighten(bands: Bands) -> Bands:
    """Key spans shrunk to the first and last scattered key they hold, so that idle bounds show as idle."""
    data = bands.data.copy()
    for i in np.unique(data[:, KSET]).tolist():
        rows = np.flatnonzero((data[:, KSET] == i) & (data[:, KS] == 1) & (data[:, KN] > 0))
        if i != ANY:
            first = bands.sets[i - 1].first_at_or_after(data[rows, K0])
            last = bands.sets[i - 1].last_at_or_before(data[rows, K0] + data[rows, KN] - 1)
            data[rows, K0], data[rows, KN] = first, np.maximum(last - first + 1, 0)
    return Bands(data, bands.sets)


def _align(bands: Bands) -> Bands:
    """Diagonals brought to equal steps, their bounds rounded inward to the lattice of ``k - q``."""
    if bands.max_step == 1:
        return bands
    uneven = bands.binding & (bands.data[:, QS] != bands.data[:, KS])
    if uneven.any():
        split = bands.take(uneven)
        split = split_residues(split, Q_AXIS, split.data[:, KS])
        split = split_residues(split, K_AXIS, split.data[:, QS])
        bands = concat((bands.take(~uneven), split))
    data = bands.data.copy()
    gap, step = data[:, K0] - data[:, Q0], data[:, QS]
    lo, hi = data[:, LO], data[:, HI]
    data[:, LO] = np.where(lo > -INF, lo + (gap - lo) % step, lo)
    data[:, HI] = np.where(hi < INF, hi - (hi - gap) % step, hi)
    return trim(Bands(data, bands.sets))


def areas(bands: Bands) -> Ints:
    """Pairs in each band of a :func:`regular` collection, in closed form."""
    data = bands.data
    nq, nk = counts(bands)
    gap, step = data[:, K0] - data[:, Q0], data[:, QS]
    lo = np.where(data[:, LO] > -INF, (data[:, LO] - gap) // step, -nq)
    hi = np.where(data[:, HI] < INF, (data[:, HI] - gap) // step, nk)
    below, beyond = staircase(nq, nk, np.stack((lo - 1, hi)))
    return beyond - below


def counts(bands: Bands) -> Ints:
    """Positions on the query axis and on the key axis of each band, ``[2, n]``; where a scattered axis has
    a step, the members in the span's range, which is 0 only if the axis is empty."""
    found = bands.data[:, [QN, KN]].T.copy()
    if not bands.sets:
        return found
    for count, (start, length, step, members) in zip(found, (Q_AXIS, K_AXIS), strict=True):
        for i in np.unique(bands.data[:, members]).tolist():
            rows = np.flatnonzero(bands.data[:, members] == i)
            if i != ANY:
                first = bands.data[rows, start]
                chosen = bands.sets[i - 1]
                stop = first + (bands.data[rows, length] - 1) * bands.data[rows, step] + 1
                count[rows] = chosen.rank(stop) - chosen.rank(first)
    return found


def staircase(nq: Ints, nk: Ints, c: Ints) -> Ints:
    """Pairs ``(i, j)``, ``0 <= i < nq``, ``0 <= j < nk``, with ``j - i <= c``: a sum of clamped ramps; a row
    for each row of ``c``."""
    start = np.minimum(np.maximum(-c, 0), nq)
    full = np.minimum(np.maximum(nk - 1 - c, start), nq)
    ramp = full - start
    return ramp * (start + c + 1) + ramp * (ramp - 1) // 2 + (nq - full) * nk
