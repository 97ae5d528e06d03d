"""Frames: spans laid end to end in memory, a local index space of global positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ringattn.geometry.spans import Ints, columns, cross_spans, expand, overlapping


@dataclass(frozen=True, eq=False)
class Frame:
    """Spans laid end to end in memory: the local index space of a shard or of a buffer of keys."""

    spans: Ints  # [n, 3] start, length, step

    @cached_property
    def offsets(self) -> Ints:
        """Local index at which each span begins, and the size of the whole as last entry."""
        return np.concatenate(([0], np.cumsum(self.spans[:, 1])))

    @property
    def size(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def hull(self) -> tuple[Ints, Ints]:
        start, length, step = self.spans.T
        return start, start + np.maximum(length - 1, 0) * step + (length > 0)

    def positions(self) -> Ints:
        """The global position of every local index."""
        rows, within = expand(self.spans[:, 1])
        return self.spans[rows, 0] + within * self.spans[rows, 2]

    def rows(self, spans: Ints) -> Ints:
        """Local index runs (start, length, step) of global spans ``[n, 3]``, in the order given, each by position."""
        if not len(spans):
            return np.empty((0, 3), np.int64)
        if (spans[:, 2] == 1).all() and (self.spans[:, 2] == 1).all():
            return self._rows_of_runs(spans[:, 0], spans[:, 0] + spans[:, 1])
        asked = Frame(spans)
        i, j = overlapping(*asked.hull, *self.hull)
        pieces = cross_spans(spans[i], self.spans[j])
        i, j, pieces = (x[pieces[:, 1] > 0] for x in (i, j, pieces))
        order = np.lexsort((pieces[:, 0], i))
        i, j, pieces = i[order], j[order], pieces[order]
        last = pieces[:, 0] + (pieces[:, 1] - 1) * pieces[:, 2]
        if ((i[1:] == i[:-1]) & (pieces[1:, 0] < last[:-1])).any():
            return self._tokens(i, j, pieces)
        return self.local(pieces, j)

    def _tokens(self, asked: Ints, which: Ints, pieces: Ints) -> Ints:
        """The same one token a run, where spans with steps lie between each other."""
        row, within = expand(pieces[:, 1])
        start, _, step = self.local(pieces, which)[row].T
        order = np.lexsort((pieces[row, 0] + within * pieces[row, 2], asked[row]))
        return columns((start + within * step)[order], 1, 1)

    @cached_property
    def _runs(self) -> Ints:
        """The spans, none with a step, as ascending runs: rows (first, stop, local index)."""
        runs = columns(self.spans[:, 0], self.spans[:, 0] + self.spans[:, 1], self.offsets[:-1])
        runs = runs[self.spans[:, 1] > 0]
        return runs[np.argsort(runs[:, 0])]

    def _rows_of_runs(self, start: Ints, stop: Ints) -> Ints:
        first, last, index = self._runs.T
        at = np.searchsorted(last, start, "right")
        i, within = expand(np.searchsorted(first, stop, "left") - at)
        j = at[i] + within
        low, high = np.maximum(start[i], first[j]), np.minimum(stop[i], last[j])
        out = columns(low - first[j] + index[j], high - low, 1)
        return out[high > low]

    def local(self, spans: Ints, which: Ints) -> Ints:
        """Spans that lie inside the frame's spans number ``which``, as local index runs; empty ones dropped."""
        home = self.spans[which]
        start = (spans[:, 0] - home[:, 0]) // home[:, 2] + self.offsets[which]
        return columns(start, spans[:, 1], spans[:, 2] // home[:, 2])[spans[:, 1] > 0]
