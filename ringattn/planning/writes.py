"""First writes of gradients: where what comes first to a row writes it whole, sums need no zeros to begin with."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ringattn.geometry.tiles import RowIndex
from ringattn.planning.launches import Launch
from ringattn.planning.program import Buffer, Copy, Row, Sums, Turn, Work

QUERIES, KEYS = "dq", "dk and dv"  # the rank's own


@dataclass
class _Target:
    """The rows of one gradient. ``whole``: all that came so far found its rows all written or all untouched."""

    written: NDArray[np.bool_]
    whole: bool = True
    sums: bool = False
    fresh: set[Launch] = field(default_factory=set)

    def take(self, launch: Launch, rows: RowIndex) -> None:
        """A launch writes its rows where nothing is in them, else it adds."""
        seen = self.written[rows]
        twice = not isinstance(rows, slice) and len(np.unique(rows)) < len(rows)  # a key of several tiles
        if twice or seen.any():
            self.whole &= bool(not twice and seen.all())
            self.sums = True
        else:
            self.fresh.add(launch)
        self.written[rows] = True

    def add(self, rows: slice) -> None:
        self.whole &= bool(self.written[rows].all())
        self.sums = True

    @property
    def zeros(self) -> bool:
        """Whether it must begin as zeros: then nothing is a first write."""
        return not (self.whole and self.written.all())


def first_writes(turns: Sequence[Turn], queries: int, keys: int) -> tuple[list[Turn], tuple[bool, bool], Sums]:
    """A backward loop whose launches say which gradients they write, and not add to.

    ``queries`` and ``keys`` are the rows that the rank holds. Returns also whether dq, and dk and dv, must be zeros
    before the loop, and what is summed in them.
    """
    targets: dict[Hashable, _Target] = {QUERIES: _Target(np.zeros(queries, bool)), KEYS: _Target(np.zeros(keys, bool))}
    for t, turn in enumerate(turns):
        targets |= {(buffer.slot, t): _Target(np.zeros(buffer.rows, bool)) for buffer in turn.zeros}
        for work in turn.work:
            for name, side in _sides(work, t).items():
                target = targets[name]
                target.whole &= work.heads.parts == 1 or isinstance(name, tuple)
                for launch in work.launches:
                    target.take(launch, getattr(launch, side))
        for copy in turn.adds:
            for _, rows in copy.pairs:
                targets[_home(copy, t)].add(rows)
    marked = [_marked(turn, t, targets) for t, turn in enumerate(turns)]
    own = targets[QUERIES], targets[KEYS]
    return marked, (own[0].zeros, own[1].zeros), Sums(*(target.sums or target.zeros for target in own))


def _sides(work: Work, t: int) -> dict[Hashable, str]:
    """The gradients that a work touches, each with the rows of its launches that lie in it. Results for guests begin as
    zeros in any case, and keys that came from elsewhere may have none."""
    sides: dict[Hashable, str] = {} if work.queries is not None else {QUERIES: "q"}
    if work.grads is not None:
        sides[work.grads.slot, t] = "k"
    elif work.keys is None:
        sides[KEYS] = "k"
    return sides


def _home(copy: Copy, t: int) -> Hashable:
    if copy.target is not None:
        return copy.target.slot, t
    return QUERIES if copy.row is Row.DQ else KEYS


def _marked(turn: Turn, t: int, targets: dict[Hashable, _Target]) -> Turn:
    def marked(work: Work) -> Work:
        kept = [(targets[name].fresh, rows) for name, rows in _sides(work, t).items() if not targets[name].zeros]
        first = {side: [fresh for fresh, rows in kept if rows == side] for side in ("q", "k")}
        return replace(work, launches=tuple(_mark(launch, first["q"], first["k"]) for launch in work.launches))

    def zeros(buffer: Buffer) -> bool:
        return targets[buffer.slot, t].zeros

    return replace(turn, zeros=tuple(filter(zeros, turn.zeros)), work=tuple(map(marked, turn.work)))


def _mark(launch: Launch, queries: Sequence[set[Launch]], keys: Sequence[set[Launch]]) -> Launch:
    """The launch with what it is the first to write, if that is not what it says already."""
    fresh, fresh_keys = (any(launch in first for first in sides) for sides in (queries, keys))
    if (fresh, fresh_keys) == (launch.fresh, launch.fresh_keys):
        return launch
    return replace(launch, fresh=fresh, fresh_keys=fresh_keys)
