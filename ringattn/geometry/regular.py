"""The regular form of bands: products, which no bound cuts, and diagonals of equal steps. Their pairs have a closed
form, and they are what tiles are cut from."""

from __future__ import annotations

import numpy as np

from ringattn.geometry.bands import (
    ANY,
    HI,
    K0,
    K_AXIS,
    KN,
    KS,
    KSET,
    LO,
    Q0,
    Q_AXIS,
    QS,
    QSET,
    Bands,
    concat,
    counts,
    split_residues,
    trim,
)
from ringattn.geometry.spans import INF, Ints, clip_spans, expand


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


def staircase(nq: Ints, nk: Ints, c: Ints) -> Ints:
    """Pairs ``(i, j)``, ``0 <= i < nq``, ``0 <= j < nk``, with ``j - i <= c``: a sum of clamped ramps; a row
    for each row of ``c``."""
    start = np.minimum(np.maximum(-c, 0), nq)
    full = np.minimum(np.maximum(nk - 1 - c, start), nq)
    ramp = full - start
    return ramp * (start + c + 1) + ramp * (ramp - 1) // 2 + (nq - full) * nk
