"""What is under every mask: sets of banded rectangles, held as int64 arrays.

A band is the set of pairs ``(q, k)`` with ``q`` in a span, ``k`` in a span and ``lo <= k - q <= hi``::

        k ->                       a span is start + step * i;
      q  . x x . . .               a bound at or past INF is absent;
      |  . . x x . .               an axis may also be cut down to scattered
      v  . . . x x .               positions, a set of intervals (global tokens)

Intersection, difference and union of bands are bands (``algebra.py``), so one representation carries full,
causal, windows, documents, chunks, strides, global tokens and everything made of them. The bands of one
:class:`Bands` are disjoint. Nothing here knows torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringattn.arguments.values import MANY
from ringattn.geometry.spans import INF, Intervals, Ints, clip_spans, expand

Q0, QN, QS, QSET, K0, KN, KS, KSET, LO, HI, TAG = range(11)
Q_AXIS = (Q0, QN, QS, QSET)
K_AXIS = (K0, KN, KS, KSET)
ANY = 0  # the set that holds every position


class TooManyPieces(ValueError):
    """More bands than can be planned, where they would have come to be."""


def at_most(count: int) -> None:
    """Raises :class:`TooManyPieces` before so many bands are made."""
    if count > MANY:
        raise TooManyPieces(f"{count:,} pieces (at most {MANY:,}, 2**20)")


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


def common_step(common: int) -> int:
    """A common multiple of steps that still is one of positions."""
    if common >= INF:
        raise TooManyPieces("residues of strides whose common multiple is beyond 2**60")
    return common


def split_residues(bands: Bands, axis: tuple[int, ...], step: int | Ints) -> Bands:
    """Bands whose span on the axis has a step that is a multiple of ``step`` (one value, or one a row)."""
    start, length, own, _ = (bands.data[:, c] for c in axis)
    parts = step // np.gcd(own, step)
    common_step(int((own.astype(np.float64) * parts).max(initial=1)))
    if (parts == 1).all():
        return bands
    rows, residue = expand(np.minimum(parts, length), at_most)
    data = bands.data[rows]
    data[:, axis[0]] = start[rows] + residue * own[rows]
    data[:, axis[1]] = -((residue - length[rows]) // parts[rows])
    data[:, axis[2]] = own[rows] * parts[rows]
    return trim(Bands(data, bands.sets))


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
