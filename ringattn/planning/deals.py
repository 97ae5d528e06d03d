"""Deals: chunks of the sequence dealt to the ranks by their exact areas.

The sequence is cut once at every border that any layout in question has, and each *cell* is measured: its pairs,
its kernel calls, the keys it needs. Adding up a rank's cells gives the work and the foreign keys of every layout
exactly, at a small part of a plan's price, and with them a bound below its cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringattn.geometry.bands import HI, K0, K_AXIS, KN, LO, Q0, Q_AXIS, QN, TAG, Bands
from ringattn.geometry.layouts import Layout
from ringattn.geometry.masks import BoundMask
from ringattn.geometry.regular import regular
from ringattn.geometry.spans import Ints, columns
from ringattn.geometry.tiles import cut
from ringattn.planning.cost import Seconds, Terms, unhidden
from ringattn.planning.launches import SMALL, SOME, Stacking
from ringattn.planning.plan import axis_spans, by_kind, merge_spans
from ringattn.planning.rates import Rates


@dataclass(frozen=True)
class Measures:
    """Under one mask: the pairs of every cell by kind, ``[3, cells]``; the keys that it needs, rows (cell, start,
    length, step); and its bands, rows (cell, first key, queries, keys, diagonals, whether it goes on where a band of
    the cell before ended)."""

    pairs: Ints
    keys: Ints
    bands: Ints
    known: dict[Rates, NDArray[Any]] = field(default_factory=dict)

    def weighed(self, rates: Rates) -> NDArray[Any]:
        """The pairs of every cell as so many without a bound."""
        if rates not in self.known:
            self.known[rates] = rates.weigh(self.pairs)
        return self.known[rates]


class Cells:
    """The sequence cut at ``borders``, measured under each mask."""

    def __init__(self, masks: Sequence[BoundMask], borders: Ints) -> None:
        q_len, offset = masks[0].q_len, masks[0].q_offset
        self.starts = np.unique(borders)
        sizes = np.diff(self.starts, append=q_len)
        spans = columns(self.starts + offset, sizes, 1)
        self.measures = [_measure(mask, spans) for mask in masks]
        self.by_kind = np.sum([m.pairs for m in self.measures], 0)
        self.pairs = self.by_kind.sum(0)

    @cached_property
    def total(self) -> int:
        """Pairs of all masks over the whole sequence."""
        return int(self.pairs.sum())

    def even(self, terms: Terms) -> float:
        """Seconds that the pairs take, without calls and transfers, at least and of all ranks together."""
        return float(terms.work(self.by_kind.sum(1)).sum())

    def weights(self, starts: Ints) -> Ints:
        """Pairs of all masks in each of the chunks that begin at ``starts``."""
        return np.add.reduceat(self.pairs, np.searchsorted(self.starts, starts))

    def bound(self, q_layout: Layout, k_layout: Layout, terms: Terms) -> float:
        """What the masks cost on layouts of plain runs, at least, whatever the schedule."""
        return float(self.bounds(self._ranks(q_layout)[None], [k_layout.table], q_layout.world_size, terms)[0])

    def bounds(self, ranks: Ints, held: Sequence[Ints], world: int, terms: Terms) -> Seconds:
        """The same of several layouts in one go: the rank of every cell, ``[layouts, cells]``, and the keys that ranks
        hold, for each layout rows (rank, start, length, step)."""
        lanes = ranks + world * np.arange(len(ranks))[:, None]
        own = np.concatenate([columns(table[:, 0] + world * i, table[:, 1:]) for i, table in enumerate(held)])
        return np.sum([self._bounds(m, lanes, own, world, terms) for m in self.measures], 0)

    def striped_bound(self, k_layout: Layout, terms: Terms, calls: int) -> float:
        """What the masks cost on stripes of queries with so many calls, at least. A rank has queries in every run of as
        many positions as ranks; what it does not hold of the keys of a band as wide, but for its ends, comes to it."""
        world, held = k_layout.world_size, int(k_layout.sizes.max())
        received = np.array([max(_keys_of_all(m.bands, world) - held, 0) for m in self.measures])
        compute = terms.work(np.stack([m.pairs.sum(1) for m in self.measures], 1)) / world
        return float(_least(terms, compute, terms.rates.call * calls, received).sum(0).sum())

    def meetings(self, q_layout: Layout, k_layout: Layout) -> int:
        """How often a run of queries meets a span of the keys it needs, about."""
        if len(self.starts) * len(k_layout.table) < 1_000_000:  # not often
            return 0
        rank = self._ranks(q_layout)
        ends = np.append(rank[1:] != rank[:-1], True)
        return max(int(k_layout.met(*m.keys[ends[m.keys[:, 0]], 1:].T).sum()) for m in self.measures)

    def _ranks(self, q_layout: Layout) -> Ints:
        """Who holds each cell."""
        first = np.argsort(q_layout.table[:, 1])
        at = np.searchsorted(q_layout.table[first, 1], self.starts, "right") - 1
        return q_layout.table[first[at], 0]

    def _bounds(self, cells: Measures, lanes: Ints, own: Ints, world: int, terms: Terms) -> Seconds:
        """Under one mask; every layout has its ranks in lanes of its own."""
        rates, ways, count = terms.rates, len(lanes), lanes.shape[0] * world
        lane = np.concatenate((lanes[:, cells.keys[:, 0]].reshape(-1), own[:, 0]))
        seen = merge_spans(lane, np.concatenate((np.tile(cells.keys[:, 1:], (ways, 1)), own[:, 1:])))
        received = np.bincount(seen[:, 0], seen[:, 2], count) - np.bincount(own[:, 0], own[:, 2], count)
        weighed = np.bincount(lanes.reshape(-1), np.tile(cells.weighed(rates), ways), count)
        calls = rates.call * _calls(cells.bands, lanes, count, terms.stacking)
        work = np.multiply.outer(terms.pair, weighed)
        return np.asarray(_least(terms, work, calls, received).sum(0).reshape(ways, world).max(1))


def _keys_of_all(bands: Ints, world: int) -> int:
    """Keys that every rank sees which has one of ``world`` queries side by side, at least."""
    _, start, queries, keys, diagonals, _ = bands.T
    wide = (queries >= world) & (diagonals >= world) & (keys > 2 * world)
    spans = columns(start + world, keys - 2 * world, 1)[wide]
    return int(merge_spans(np.zeros(len(spans), np.int64), spans)[:, 2].sum())


def _least(terms: Terms, work: Seconds, calls: Seconds | float, received: Ints) -> Seconds:
    """Seconds of each pass, at least: work, calls, and foreign K/V tokens that arrive."""
    compute = work if terms.rates.queued else work + calls
    device = compute + unhidden(terms.topology.fastest * np.multiply.outer(terms.token, received), compute, terms.rates)
    return np.maximum(device, calls) if terms.rates.queued else device


def _calls(bands: Ints, lanes: Ints, count: int, stacking: Stacking) -> Ints:
    """Kernel calls of each of ``count`` lanes, at least, where ``lanes [layouts, cells]`` are those of the cells: bands
    that begin at the same key may become one, and where tiles are stacked, small ones of one shape."""
    cell, start, queries, keys, _, goes_on = bands.T
    lane = lanes[:, cell]
    head = np.flatnonzero((goes_on == 0) | (lane != lanes[:, cell - 1]))
    if not len(head):
        return np.zeros(count, np.int64)
    width, side = start.max() + 1, SMALL + 1
    place, first = np.unique(lane.reshape(-1)[head] * width + start[head % len(cell)], return_index=True)
    held = place // width
    calls = np.bincount(held, minlength=count)
    if stacking is Stacking.NONE:
        return calls
    sizes = np.tile(np.stack((queries, keys)), len(lanes))
    nq, nk = np.add.reduceat(sizes, head, 1)[:, first]
    shape = np.where(np.maximum(nq, nk) <= SMALL, (held * side + nq) * side + nk, -1)
    if stacking is Stacking.VIEWS:  # side by side
        again = (shape[1:] == shape[:-1]) & (shape[1:] >= 0) & (np.diff(place) == nk[:-1])
        return calls - np.bincount(held[1:][again], minlength=count)
    shapes, times = np.unique(shape[shape >= 0], return_counts=True)
    return calls - np.bincount(shapes // side**2, np.where(times >= SOME, times - 1, 0), count).astype(np.int64)


def _measure(mask: BoundMask, spans: Ints) -> Measures:
    rows = regular(cut(mask.whole, Q_AXIS, spans, np.arange(len(spans))))
    data = rows.data
    keys = axis_spans(rows, K_AXIS)
    return Measures(by_kind(rows, data[:, TAG], len(spans)), merge_spans(keys[:, 0], keys[:, 1:]), _bands(rows))


def _bands(rows: Bands) -> Ints:
    """The bands column of :class:`Measures`; none where spans have steps or sets, whose tiles are not counted so."""
    data = rows.data
    if not len(data) or rows.sets or rows.max_step > 1:
        return np.empty((0, 6), np.int64)
    before, here = data[:-1], data[1:]
    follows = (here[:, Q0] == before[:, Q0] + before[:, QN]) & (here[:, TAG] == before[:, TAG] + 1)
    touches = (here[:, K0] <= before[:, K0] + before[:, KN]) & (before[:, K0] <= here[:, K0] + here[:, KN])
    diagonals = data[:, HI] - data[:, LO] + 1
    return columns(data[:, [TAG, K0, QN, KN]], diagonals, np.append(False, follows & touches))


def deal_by_weight(weights: Ints, world: int) -> Ints:
    """The heaviest chunk left goes to the rank with the least work among those that may have more chunks."""
    rank, most = np.empty(len(weights), np.int64), len(weights) // world
    load = [(0, 0, r) for r in range(world)]  # work, chunks, rank
    for chunk in np.argsort(-weights, kind="stable").tolist():
        work, count, r = heapq.heappop(load)
        rank[chunk] = r
        if count + 1 < most:
            heapq.heappush(load, (work + int(weights[chunk]), count + 1, r))
    return rank


def deal_by_rounds(weights: Ints, world: int) -> Ints:
    """Each round deals one chunk to every rank from one stretch of the sequence, the heaviest to the rank with the
    least work: less even than by weight, but equal stretches go to equal places."""
    rounds = weights.reshape(-1, world)
    heavy_first = np.argsort(-rounds, axis=1, kind="stable")
    given = np.take_along_axis(rounds, heavy_first, 1)
    rank, load = np.empty_like(rounds), np.zeros(world, np.int64)
    for one, order, weight in zip(rank, heavy_first, given, strict=True):
        light_first = np.argsort(load, kind="stable")
        one[order] = light_first
        load[light_first] += weight
    return rank.reshape(-1)
