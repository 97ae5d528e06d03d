"""The algebra of bands: what two collections have in common, what either holds, and what one holds beyond the other."""

from __future__ import annotations

from math import lcm

import numpy as np

from ringattn.geometry.bands import (
    ANY,
    HI,
    K_AXIS,
    LO,
    Q_AXIS,
    Bands,
    TooManyPieces,
    at_most,
    common_step,
    concat,
    counts,
    split_residues,
    trim,
    trim_rows,
)
from ringattn.geometry.spans import INF, Intervals, Ints, clip_spans, columns, cross_spans, expand, overlapping

COMPARED = 1 << 22  # pairs of bands that one operation may look at: seconds, and 256 MB


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
    for a, b in np.unique(columns(x[clash], y[clash]), axis=0).tolist() if clash.any() else ():
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
    return split_residues(a, axis, common_step(lcm(*np.unique(b.data[:, axis[2]]).tolist())))


def _compare_at_most(count: int) -> None:
    if count > COMPARED:
        raise TooManyPieces(f"{count:,} pairs of pieces to compare (at most {COMPARED:,}, 2**22)")


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
