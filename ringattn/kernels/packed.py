"""Packed tiles: those that lie one after the other in rows and in columns, as documents do, are one call of an operator
that is told the bounds between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate

import torch

from ringattn.geometry.tiles import Window
from ringattn.kernels.calls import TileCall, TileCalls
from ringattn.kernels.pieces import TileBand
from ringattn.kernels.scores import Bounds


def packed(calls: TileCalls, takes: Callable[[Window], bool] = lambda window: True) -> TileCalls:
    """The calls, runs of packed tiles with one window as one each. ``takes``: which windows the operator takes so."""
    return replace(calls, calls=tuple(run.joined(calls.device) for run in _runs(calls.calls, takes)))


def _runs(calls: tuple[TileCall, ...], takes: Callable[[Window], bool]) -> Iterator[_Run]:
    """Calls that may be one, in their order."""
    run: _Run | None = None
    for call in calls:
        if run is None or not (takes(call.scores.window) and takes(run.window) and run.take(call)):
            if run is not None:
                yield run
            run = _Run(call)
    if run is not None:
        yield run


class _Run:
    """Packed tiles, of which the largest says the window: a bound that does not reach the others' borders is none."""

    def __init__(self, first: TileCall) -> None:
        self.calls = [first]
        self.window, self.size = first.scores.window, _size(first)

    def take(self, call: TileCall) -> bool:
        """Whether a tile is one more of the run."""
        if not _follows(self.calls[-1], call):
            return False
        larger = _size(call) > self.size
        window = call.scores.window if larger else self.window
        if not all(_means(window, known) for known in (self.calls if larger else [call])):
            return False
        self.window, self.size = window, max(self.size, _size(call))
        self.calls.append(call)
        return True

    def joined(self, device: torch.device) -> TileCall:
        """All of it as one call."""
        first, last = self.calls[0], self.calls[-1]
        if first is last:
            return first
        sizes = [[side.stop - side.start for side in sides] for sides in zip(*map(_sides, self.calls), strict=True)]
        q, k = (torch.tensor([0, *accumulate(side)], dtype=torch.int32, device=device) for side in sizes)
        rows = [slice(a.start, b.stop, 1) for a, b in zip(_sides(first), _sides(last), strict=True)]
        scores = replace(first.scores, window=self.window, bounds=Bounds(q, k, max(sizes[0]), max(sizes[1])))
        return replace(first, q=rows[0], k=rows[1], scores=scores)


def _follows(last: TileCall, call: TileCall) -> bool:
    """Whether a tile begins where the last one ends, and writes or adds as that does."""
    if not all(isinstance(rows, slice) and rows.step in (None, 1) for rows in (last.q, last.k, call.q, call.k)):
        return False
    beside = all(a.stop == b.start for a, b in zip(_sides(last), _sides(call), strict=True))
    alike = (last.fresh, last.fresh_keys, last.count, 1) == (call.fresh, call.fresh_keys, 1, call.count)
    return beside and alike and last.scores.place is call.scores.place is None


def _sides(call: TileCall) -> tuple[slice, slice]:
    assert isinstance(call.q, slice) and isinstance(call.k, slice), "tiles of scattered tokens are not packed"
    return call.q, call.k


def _size(call: TileCall) -> int:
    return sum(side.stop - side.start for side in (call.q, call.k) if isinstance(side, slice))


def _means(window: Window, call: TileCall) -> bool:
    """Whether a window gives a tile the band that it has."""
    nq, nk = (side.stop - side.start for side in _sides(call))
    return TileBand.of(nq, nk, window) == TileBand.of(nq, nk, call.scores.window)
