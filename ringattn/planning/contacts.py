"""Contacts: the keys that each rank holds and needs, and what its queries' bands are when cut by them.

The same whatever the schedule, which only says when keys lie together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

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
    counts,
)
from ringattn.geometry.regular import regular
from ringattn.geometry.spans import INF, Ints, columns, meeting

if TYPE_CHECKING:
    from ringattn.planning.plan import Plan

# Pieces that are looked at: of more, the ranks with the most stand for all.
PIECES = 1 << 15
# A common step of local rows beyond which gaps between groups of rows do not suit it.
STEP = 1 << 20


@dataclass(frozen=True, eq=False)
class Contacts:
    """keys: rows (rank, owner, start, length, step), each rank's own in storage order, then what it needs.
    weights: about how many pieces each rank has; known: the ranks whose pieces are here.
    of: the row of ``keys`` that each piece meets; queries, spans: its queries as local rows of all shards end to end,
        and its keys, both (start, length, step); bounds: its ``lo`` and ``hi`` counted from its corner in steps.
    step: a common multiple of the steps of all local rows; rows: where these end, a multiple of it.
    products: rows (rank, row of ``keys``, band, queries) of pieces of scattered positions.
    """

    keys: Ints
    weights: Ints
    known: NDArray[np.bool_]
    of: Ints
    queries: Ints
    spans: Ints
    bounds: Ints
    step: int
    rows: int
    products: Ints


def contacts_of(plan: Plan, needs: Ints) -> Contacts:
    """``needs``: those of the world, as they lie in buffers."""
    table, offset = plan.k_layout.table, plan.mask.q_offset
    keys = np.concatenate((table[:, [0, 0, 1, 2, 3]], needs))
    weights = _weights(plan, keys)
    heavy = np.argsort(-weights, kind="stable")
    known = np.zeros(plan.world_size, bool)
    known[heavy[: max(int(np.searchsorted(weights[heavy].cumsum(), PIECES, "right")), 1)]] = True
    bands = plan.world if known.all() else plan.world.take(known[plan.world.data[:, TAG]])
    scattered = (bands.data[:, [QSET, KSET]] != ANY).any(1) if bands.sets else np.zeros(len(bands), bool)
    plain = regular(plan.meet(bands.take(~scattered) if scattered.any() else bands, keys[:, [0, 2, 3, 4]])[1]).data
    home = _homes(plan, plain, keys[plain[:, TAG], 0])
    inner = np.stack((plain[:, QS] // plan.q_layout.table[home, 3], plain[:, K_AXIS[2]] // keys[plain[:, TAG], 4]))
    common = int(np.lcm.reduce(np.unique(inner).astype(object), initial=1)) if inner.max(initial=1) > 1 else 1
    step = common if common <= STEP else int(inner.max())
    at = laid_out(plan.q_layout.table[:, 2], plan.q_layout.table[:, 0], step)
    rows = -(-int((at + plan.q_layout.table[:, 2]).max()) // step) * step
    spans = plan.q_layout.table[:, 1:] + np.array([offset, 0, 0])
    gap, by = plain[:, K0] - plain[:, Q0], plain[:, QS]
    lo = np.where(plain[:, LO] > -INF, (plain[:, LO] - gap) // by, 1 - plain[:, QN])
    hi = np.where(plain[:, HI] < INF, (plain[:, HI] - gap) // by, plain[:, KN] - 1)
    queries, bounds = local(plain[:, Q_AXIS[:3]], spans, at, home), columns(lo, hi)
    products = _products(plan, bands.take(scattered), keys)
    return Contacts(keys, weights, known, plain[:, TAG], queries, plain[:, K_AXIS[:3]], bounds, step, rows, products)


def _weights(plan: Plan, keys: Ints) -> Ints:
    """Pieces of each rank, about: the spans of keys that its bands' hulls meet."""
    data, width = plan.world.data, 1 + plan.mask.kv_len
    start = keys[:, 0] * width + keys[:, 2]
    stop = start + np.maximum(keys[:, 3] - 1, 0) * keys[:, 4] + 1
    first, last = (edge + data[:, TAG] * width for edge in plan.world.hull(K_AXIS))
    met = np.searchsorted(np.sort(start), last) - np.searchsorted(np.sort(stop), first, "right")
    return np.bincount(data[:, TAG], met, plan.world_size).astype(np.int64)


def _homes(plan: Plan, plain: Ints, rank: Ints) -> Ints:
    """The row of the query layout that holds each piece's queries."""
    table, offset = plan.q_layout.table, plan.mask.q_offset
    if not plan.q_layout.interleaved:
        order = np.argsort(table[:, 1])
        return order[np.searchsorted(table[order, 1], plain[:, Q0] - offset, "right") - 1]
    queries, spans, width = plain[:, Q_AXIS[:3]], table[:, 1:].copy(), 1 + offset + plan.mask.q_len
    queries[:, 0] += rank * width
    spans[:, 0] += table[:, 0] * width + offset
    i, j, _ = meeting(queries, spans)
    home = np.zeros(len(plain), np.int64)
    home[i] = j
    return home


def _products(plan: Plan, bands: Bands, keys: Ints) -> Ints:
    if not len(bands):
        return np.empty((0, 4), np.int64)
    i, met = plan.meet(bands, keys[:, [0, 2, 3, 4]])
    nq, nk = counts(met)
    held = (nq > 0) & (nk > 0)
    row = met.data[held, TAG]
    return columns(keys[row, 0], row, i[held], nq[held])


def laid_out(length: Ints, group: Ints, step: int) -> Ints:
    """Where each of some rows begins when they lie end to end, those of one group side by side and groups apart.
    Groups are runs of equal numbers, and begin at multiples of ``step``."""
    before, new = np.cumsum(length) - length, np.append(True, group[1:] != group[:-1])
    number, first = np.cumsum(new) - 1, before[new]
    room = (np.diff(first, append=length.sum()) // step + 2) * step
    return before - first[number] + (np.cumsum(room) - room)[number]


def local(spans: Ints, home: Ints, at: Ints, which: Ints) -> Ints:
    """Spans as local rows (start, length, step): each lies in the span of ``home`` of its number, which begins at
    ``at``."""
    start, _, step = home[which].T
    return columns((spans[:, 0] - start) // step + at[which], spans[:, 1], spans[:, 2] // step)
