"""Relays: keys that pass from rank to rank, and leave the way where nobody behind needs them."""

from __future__ import annotations

import itertools

import numpy as np

from ringattn.geometry.spans import Intervals, Ints, columns, expand
from ringattn.planning.plan import merge_spans


class Relays:
    """What relays carry at each of their places: the union of what is needed there and behind.

    lanes: the relay on which each need travels. places: where on it the rank is that has the need, below ``length``.
    spans: what it needs, ``[n, 3]``.
    """

    def __init__(self, lanes: Ints, places: Ints, spans: Ints, length: int) -> None:
        order = np.lexsort((-places, lanes))
        self.length, self.spans = length, spans[order]
        # One lattice for all places, so that what a hop carries is a part of what the hop before carried.
        self.step = int(np.lcm.reduce(spans[:, 2], initial=1))
        self._key = lanes[order] * length + (length - 1 - places[order])

    def carried(self, lanes: Ints, places: Ints) -> list[Ints]:
        """For each (lane, place) the spans that come to it; none beyond the last place."""
        lane = lanes * self.length
        first = np.searchsorted(self._key, lane, "left")
        last = np.searchsorted(self._key, lane + np.maximum(self.length - places, 0), "left")
        group, within = expand(last - first)
        merged = merge_spans(group, self.spans[first[group] + within], self.step)
        edges = np.searchsorted(merged[:, 0], np.arange(len(lanes) + 1))
        return [merged[a:b, 1:] for a, b in itertools.pairwise(edges)]

    def minus(self, a: list[Ints], b: list[Ints]) -> list[Ints]:
        """Pair by pair the spans of ``a`` that are not in ``b``."""
        return [self._without(x, y) if len(y) else x for x, y in zip(a, b, strict=True)]

    def _without(self, x: Ints, y: Ints) -> Ints:
        parts = []
        for residue in np.unique(x[:, 0] % self.step).tolist():
            runs = [self._runs(spans[spans[:, 0] % self.step == residue]) for spans in (x, y)]
            left = runs[0].intersect(runs[1].complement()).bounds
            start, length = left[:, 0] * self.step + residue, left[:, 1] - left[:, 0]
            parts.append(columns(start, length, self.step))
        return np.concatenate(parts or [x])

    def _runs(self, spans: Ints) -> Intervals:
        start = spans[:, 0] // self.step
        return Intervals(columns(start, start + spans[:, 1]))
