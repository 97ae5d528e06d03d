"""Spans and interval sets: the one-dimensional half of the geometry, in numpy int64 arrays.

A span is the positions ``start + step * i`` for ``0 <= i < length``, a row of an array ``[n, 3]``. An
``Intervals`` is a set of positions as sorted runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from math import gcd

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

INF = 1 << 60  # beyond any position


@dataclass(frozen=True, eq=False)
class Intervals:
    """A set of positions as sorted, disjoint, non-adjacent half-open intervals, ``bounds [n, 2]``."""

    bounds: Ints

    @staticmethod
    def of(positions: Iterable[int]) -> Intervals:
        points = np.unique(np.fromiter(positions, dtype=np.int64))
        if not len(points):
            return Intervals(np.empty((0, 2), np.int64))
        cuts = np.flatnonzero(np.diff(points) > 1) + 1
        starts = points[np.concatenate(([0], cuts))]
        ends = points[np.concatenate((cuts - 1, [len(points) - 1]))] + 1
        return Intervals(columns(starts, ends))

    @cached_property
    def key(self) -> bytes:
        return self.bounds.tobytes()

    @cached_property
    def _before(self) -> Ints:
        return np.concatenate(([0], np.cumsum(self.bounds[:, 1] - self.bounds[:, 0])))

    def complement(self) -> Intervals:
        flat = self.bounds.reshape(-1)
        edges = np.concatenate(([-INF], flat, [INF])).reshape(-1, 2)
        return Intervals(edges)

    def intersect(self, other: Intervals) -> Intervals:
        a, b = self.bounds, other.bounds
        i, j = overlapping(a[:, 0], a[:, 1], b[:, 0], b[:, 1])
        lo, hi = np.maximum(a[i, 0], b[j, 0]), np.minimum(a[i, 1], b[j, 1])
        order = np.argsort(lo, kind="stable")
        return Intervals(columns(lo[order], hi[order]))

    def rank(self, x: Ints) -> Ints:
        """How many members lie below each ``x``."""
        if not len(self.bounds):
            return np.zeros_like(x)
        at = np.searchsorted(self.bounds[:, 0], x, "right") - 1
        inside = np.minimum(x, self.bounds[at, 1]) - self.bounds[at, 0]
        return np.where(at < 0, 0, self._before[at] + inside)

    def first_at_or_after(self, x: Ints) -> Ints:
        at = np.searchsorted(self.bounds[:, 1], x, "right")
        padded = np.append(self.bounds[:, 0], INF)
        return np.maximum(x, padded[at])

    def last_at_or_before(self, x: Ints) -> Ints:
        at = np.searchsorted(self.bounds[:, 0], x, "right")
        padded = np.concatenate(([-INF], self.bounds[:, 1] - 1))
        return np.minimum(x, padded[at])


def columns(*parts: Ints | int) -> Ints:
    """Columns side by side: an array ``[n]`` each, several ``[n, m]``, or one number for all rows. (NumPy's `stack` and
    `column_stack` take five times as long where rows are few.)"""
    widths = [1 if isinstance(part, int) or part.ndim == 1 else part.shape[1] for part in parts]
    rows = next(len(part) for part in parts if not isinstance(part, int))
    out, at = np.empty((rows, sum(widths)), np.int64), 0
    for part, width in zip(parts, widths, strict=True):
        if isinstance(part, int) or part.ndim == 1:
            out[:, at] = part
        else:
            out[:, at : at + width] = part
        at += width
    return out


def ordered(first: Ints, then: Ints) -> Ints:
    """Indices that sort rows by ``first`` and, where these are equal, by ``then``, numbers from 0 on; rows that are
    alike keep their order."""
    width = int(then.max(initial=0)) + 1
    if int(first.max(initial=0)) >= INF // width:
        return np.lexsort((then, first))
    return np.argsort(first * width + then, kind="stable")  # one sort of one column


def overlapping(
    a0: Ints, a1: Ints, b0: Ints, b1: Ints, allow: Callable[[int], None] | None = None
) -> tuple[Ints, Ints]:
    """All index pairs ``(i, j)`` for which ``[a0[i], a1[i])`` meets ``[b0[j], b1[j])``, i ascending, and of one i by
    where j starts. ``allow`` is told their number before they are made, and may raise."""
    by_a, by_b = np.argsort(a0, kind="stable"), np.argsort(b0, kind="stable")
    starts = b0[by_b]
    # Of two that meet, either the second starts inside the first, or the first inside the second and later.
    first = np.searchsorted(starts, a0, "left")
    inside = np.maximum(np.searchsorted(starts, a1, "left") - first, 0)
    later = np.searchsorted(a0[by_a], starts, "right")
    around = np.maximum(np.searchsorted(a0[by_a], b1[by_b], "left") - later, 0)
    if allow is not None:
        allow(int(inside.sum() + around.sum()))
    i, within = expand(inside)
    at, k = expand(around)
    i, place = np.concatenate((i, by_a[later[at] + k])), np.concatenate((first[i] + within, at))
    order = np.argsort(i * len(b0) + place)
    i, j = i[order], by_b[place[order]]
    keep = (b1[j] > a0[i]) & (a1[i] > a0[i])
    return i[keep], j[keep]


def meeting(a: Ints, b: Ints) -> tuple[Ints, Ints, Ints]:
    """All pairs of spans ``(i, j)`` of ``a`` and ``b`` (start, length, step) that share positions, and these."""
    parts, steps = [], set(b[:, 2].tolist())
    for step in sorted(set(a[:, 2].tolist())):
        rows = np.flatnonzero(a[:, 2] == step)
        # One lane of the axis for each residue class that both sides keep to: only spans of one lane can meet.
        lanes = gcd(step, *steps)
        width = 1 + int(max((s[:, 0] + s[:, 1] * s[:, 2]).max(initial=0) for s in (a, b)))
        i, j = overlapping(*_laned(a[rows], lanes, width), *_laned(b, lanes, width))
        i = rows[i]
        spans = cross_spans(a[i], b[j])
        held = spans[:, 1] > 0
        parts.append((i[held], j[held], spans[held]))
    if len(parts) == 1:
        return parts[0]
    none = np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 3), np.int64)
    i, j, spans = (np.concatenate(column) for column in zip(none, *parts, strict=True))
    return i, j, spans


def _laned(spans: Ints, lanes: int, width: int) -> tuple[Ints, Ints]:
    start, length, step = spans.T
    shift = start % lanes * width if lanes > 1 else 0
    return start + shift, start + np.maximum(length - 1, 0) * step + (length > 0) + shift


def expand(count: Ints, allow: Callable[[int], None] | None = None) -> tuple[Ints, Ints]:
    """For ``count = [2, 0, 3]``: the row of each copy ``[0, 0, 2, 2, 2]`` and its number ``[0, 1, 0, 1, 2]``.

    ``allow`` is told their number before they are made, and may raise.
    """
    if allow is not None:
        allow(int(count.sum()))
    rows = np.repeat(np.arange(len(count), dtype=np.int64), count)
    within = np.arange(len(rows), dtype=np.int64) - np.repeat(np.cumsum(count) - count, count)
    return rows, within


def clip_spans(spans: Ints, lo: Ints | int, hi: Ints | int) -> Ints:
    """Spans ``[n, >= 3]`` (start, length, step, ...) restricted to positions in ``[lo, hi]``; length 0 if none."""
    start, length, step = spans[:, 0], spans[:, 1], spans[:, 2]
    first = np.maximum(-((start - lo) // step), 0)
    last = np.minimum((hi - start) // step, length - 1)
    out = spans.copy()
    out[:, 0] = start + first * step
    out[:, 1] = np.maximum(last - first + 1, 0)
    return out


def cross_spans(a: Ints, b: Ints) -> Ints:
    """Row by row the intersection of two spans (start, length, step), by the Chinese remainder theorem."""
    step_a, step_b = a[:, 2], b[:, 2]
    if (step_a == 1).all() and (step_b == 1).all():
        start = np.maximum(a[:, 0], b[:, 0])
        length = np.minimum(a[:, 0] + a[:, 1], b[:, 0] + b[:, 1]) - start
        return columns(start, np.maximum(length, 0), step_a)
    gcd = np.gcd(step_a, step_b)
    gap = b[:, 0] - a[:, 0]
    modulus = step_b // gcd
    shift = np.zeros_like(gap)
    kind = step_a // gcd * (modulus.max(initial=0) + 1) + modulus  # both numbers in one, to be sorted fast
    for number in np.unique(kind).tolist():
        reduced, m = divmod(number, int(modulus.max()) + 1)
        if m > 1:
            rows = kind == number
            shift[rows] = (gap[rows] // gcd[rows]) * pow(reduced, -1, m) % m
    out = columns(a[:, 0] + step_a * shift, a[:, 1] - shift, step_a)
    out[:, 1] = np.maximum(-(-out[:, 1] // modulus), 0)
    out[:, 2] = step_a * modulus
    out = clip_spans(out, b[:, 0], b[:, 0] + (b[:, 1] - 1) * step_b)
    out[gap % gcd != 0, 1] = 0
    return out


def in_words(spans: Ints, most: int = 3) -> str:
    """Positions for a text, the first of many: "0-127, 512-1022 by 2 and 3 more runs"."""
    runs = [
        f"{start}-{start + (length - 1) * step}" + (f" by {step}" if step > 1 else "") if length > 1 else f"{start}"
        for start, length, step in spans[:most].tolist()
    ]
    rest = f" and {len(spans) - most:,} more runs" if len(spans) > most else ""
    return ", ".join(runs) + rest
