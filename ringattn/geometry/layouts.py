"""Layouts: which global positions each rank holds, in storage order. Any length, no divisibility rule.

A layout is one int64 table of spans (rank, start, length, step), a partition of the sequence; shards
may be uneven, by one token in ``LAYOUTS``. A new layout is one function here plus its place there.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ringattn.arguments.values import LARGEST, integer, integers, listed, shown
from ringattn.geometry.frames import Frame
from ringattn.geometry.spans import Ints, columns, expand

BLOCK = 64  # positions of a block of `cyclic`
CHECKED = 1 << 26  # positions of a given layout: all are looked at, which takes half a second for as many


class Span(NamedTuple):
    """The positions ``start + step * i`` for ``0 <= i < length``."""

    start: int
    length: int
    step: int = 1


@dataclass(frozen=True, eq=False)
class Layout:
    """A partition of ``seqlen`` positions over ``world_size`` ranks.

    ``table [n, 4]`` holds (rank, start, length, step), sorted by rank, in storage order within a rank.
    """

    name: str
    seqlen: int
    world_size: int
    table: Ints

    @staticmethod
    def from_spans(shards: Sequence[Iterable[Sequence[int]]], name: str = "custom") -> Layout:
        """A layout from one list of spans ``(start, length[, step])`` a rank.

        Raises ``ValueError`` unless every position from 0 on belongs to exactly one rank.
        """
        shards = listed(f"layout {name!r}: shards", shards, "lists of spans, one for each rank")
        table = np.array([row for rank, spans in enumerate(shards) for row in _table_rows(name, rank, spans)], np.int64)
        table = table.reshape(-1, 4)
        layout = Layout(name, int(table[:, 2].sum()), len(shards), table)
        layout.check()
        return layout

    def check(self) -> None:
        """Raises ``ValueError`` unless the table is one, and every position belongs to exactly one rank."""
        self._checked  # noqa: B018 - raises

    @cached_property
    def _checked(self) -> None:
        table, rule = self.table, "make it with Layout.from_spans()"
        if not isinstance(table, np.ndarray) or table.ndim != 2 or table.shape[1] != 4 or table.dtype != np.int64:
            raise ValueError(f"layout {shown(self.name)}: its table is {shown(table)}: must be int64 [n, 4]; {rule}")
        integer("the layout's seqlen", self.seqlen, 0, LARGEST)
        integer("the layout's world_size", self.world_size, 1)
        ranks = table[:, 0]
        if (np.diff(ranks) < 0).any() or (ranks < 0).any() or (ranks >= self.world_size).any():
            raise ValueError(f"layout {shown(self.name)}: ranks must rise, within 0..{self.world_size - 1}; {rule}")
        self._check_spans(Frame(table[:, 1:]))

    def _check_spans(self, whole: Frame) -> None:
        name = shown(self.name)
        if (whole.spans < [0, 0, 1]).any():
            raise ValueError(f"layout {name}: spans need start >= 0, length >= 0 and step >= 1")
        last = int(whole.hull[1].max(initial=0))
        if last > whole.size or whole.size != self.seqlen:
            raise ValueError(
                f"layout {name}: a span ends at position {last - 1}, but the shards hold {whole.size} in all, and the "
                f"sequence {self.seqlen}; they must hold each position from 0 on exactly once"
            )
        if whole.size >= CHECKED:
            return  # of a name, or refused by from_spans
        times = np.bincount(whole.positions(), minlength=whole.size)
        wrong = np.flatnonzero(times != 1)
        if len(wrong):
            raise ValueError(
                f"layout {name}: position {int(wrong[0])} is held {int(times[wrong[0]])} times; "
                f"the shards must hold each position 0..{whole.size - 1} exactly once"
            )

    @cached_property
    def _edges(self) -> Ints:
        return np.searchsorted(self.table[:, 0], np.arange(self.world_size + 1))

    @cached_property
    def sizes(self) -> Ints:
        """Tokens of each rank."""
        return np.bincount(self.table[:, 0], self.table[:, 2], self.world_size).astype(np.int64)

    def frame(self, rank: int) -> Frame:
        """The rank's spans, in storage order."""
        return Frame(self.table[self._edges[rank] : self._edges[rank + 1], 1:])

    def spans(self, rank: int) -> tuple[Span, ...]:
        return tuple(Span(*row) for row in self.frame(rank).spans.tolist())

    @property
    def fits(self) -> tuple[int, int]:
        """What it is for: a length and a number of ranks."""
        return self.seqlen, self.world_size

    def pieces(self, count: int) -> Layout:
        """The layout of ``count`` times as many ranks in which each shard is cut in storage order into runs of equal
        length, to a token."""
        if count == 1:
            return self
        sizes = np.array([_even(int(size), count) for size in self.sizes]).reshape(-1)
        stops = np.cumsum(sizes)
        length = self.table[:, 2]
        first = np.cumsum(length) - length  # places on one axis on which the shards lie end to end
        piece = np.searchsorted(stops, first, "right")
        row, within = expand(np.searchsorted(stops, first + length, "left") - piece + 1)
        piece = piece[row] + within
        low = np.maximum(first[row], stops[piece] - sizes[piece]) - first[row]
        high = np.minimum(first[row] + length[row], stops[piece]) - first[row]
        _, start, _, step = self.table[row].T
        table = columns(piece, start + low * step, high - low, step)
        return Layout(self.name, self.seqlen, self.world_size * count, table[high > low])

    def merged(self, count: int) -> Layout:
        """The layout of a ``count``-th of the ranks, each with the shards of so many neighbours one after the other."""
        rank, start, length, step = self.table.T
        rank = rank // count
        goes_on = (rank[1:] == rank[:-1]) & (step[1:] == step[:-1]) & (start[1:] == (start + length * step)[:-1])
        first = np.flatnonzero(np.concatenate(([True], ~goes_on))) if len(rank) else np.empty(0, np.int64)
        length = np.add.reduceat(length, first) if len(first) else length
        return Layout(
            self.name, self.seqlen, self.world_size // count, columns(rank[first], start[first], length, step[first])
        )

    @cached_property
    def interleaved(self) -> bool:
        """Whether the spans of the ranks run through each other."""
        return bool((self.table[:, 3] > 1).any())

    @cached_property
    def _hulls(self) -> tuple[Ints, Ints]:
        start, stop = Frame(self.table[:, 1:]).hull
        return np.sort(start), np.sort(stop)

    def met(self, start: Ints, length: Ints, step: Ints) -> Ints:
        """How many spans of the layout each of these spans meets, at most: by hulls, and by steps where it has any."""
        first, last = self._hulls
        stop = start + (length - 1) * step + 1
        count = np.searchsorted(first, stop, "left") - np.searchsorted(last, start, "right")
        if self.interleaved:
            count = -(-count // np.gcd(step, self.table[:, 3].max()))
        return np.minimum(count, length)

    @cached_property
    def digest(self) -> str:
        """Equal exactly for equal tables; for comparing ranks."""
        import hashlib

        return hashlib.sha256(self.table.tobytes()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Layout({self.name}, seqlen={self.seqlen}, world_size={self.world_size})"


class Layouts(NamedTuple):
    """Where queries and where keys lie."""

    q: Layout
    k: Layout


def _table_rows(name: str, rank: int, spans: Iterable[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    for i, span in enumerate(listed(f"layout {name!r}: rank {rank}", spans, "spans (start, length[, step])")):
        try:
            numbers = integers("span", span, -LARGEST)
            row = Span(*numbers)
        except (TypeError, ValueError):
            raise ValueError(
                f"layout {name!r}: rank {rank}, span {i} is {shown(span)}: give each rank a list of spans "
                f"(start, length[, step]), integers of at most {LARGEST} (2**40)"
            ) from None
        if row.start + max(row.length - 1, 0) * row.step >= CHECKED:
            raise ValueError(
                f"layout {name!r}: a span ends at position {row.start + max(row.length - 1, 0) * row.step}: must be "
                f"below {CHECKED} (2**26), as every position is looked at; name a layout for longer sequences"
            )
        yield (rank, *row)


def _even(seqlen: int, parts: int) -> Ints:
    """Sizes of ``parts`` parts, the first ones larger by one where the length does not divide."""
    return seqlen // parts + (np.arange(parts, dtype=np.int64) < seqlen % parts)


def _build(name: str, seqlen: int, world_size: int, rank: Ints, start: Ints, length: Ints, step: int) -> Layout:
    table = columns(rank, start, length, step)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return Layout(name, seqlen, world_size, table[table[:, 2] > 0])


def contiguous(seqlen: int, world_size: int) -> Layout:
    """Rank ``r`` holds the ``r``-th run of the sequence: neighbours in text are neighbours in memory."""
    sizes = _even(seqlen, world_size)
    rank = np.arange(world_size)
    return _build("contiguous", seqlen, world_size, rank, np.cumsum(sizes) - sizes, sizes, 1)


def zigzag(seqlen: int, world_size: int) -> Layout:
    """Rank ``r`` holds the ``r``-th run from the front and from the back: equal work under causal masks."""
    sizes = _even(seqlen, world_size)
    front, back = sizes - sizes // 2, sizes // 2
    rank = np.arange(world_size)
    front_start = np.cumsum(front) - front
    back_start = seqlen - np.cumsum(back)
    starts, lengths = np.concatenate((front_start, back_start)), np.concatenate((front, back))
    return _build("zigzag", seqlen, world_size, np.tile(rank, 2), starts, lengths, 1)


def striped(seqlen: int, world_size: int) -> Layout:
    """Rank ``r`` holds positions ``r, r + world_size, ...``: equal work under causal masks, block by block."""
    rank = np.arange(world_size)
    return _build("striped", seqlen, world_size, rank, rank, _even(seqlen, world_size), world_size)


def chunks(seqlen: int, count: int) -> Ints:
    """The sequence cut into ``count`` runs of equal length, to a token: spans ``[count, 3]``."""
    sizes = _even(seqlen, count)
    return columns(np.cumsum(sizes) - sizes, sizes, 1)


def dealt(name: str, seqlen: int, world_size: int, spans: Ints, rank: Ints) -> Layout:
    """The layout in which ``rank[i]`` holds ``spans[i]``, ascending runs; neighbours on one rank become one run."""
    new = np.concatenate(([True], np.diff(rank) != 0))
    length = np.add.reduceat(spans[:, 1], np.flatnonzero(new))
    return _build(name, seqlen, world_size, rank[new], spans[new, 0], length, 1)


def cyclic(seqlen: int, world_size: int) -> Layout:
    """Blocks of ``BLOCK`` positions go round the ranks. Append-stable: a position's rank and its place there do not
    depend on the length, so a cache that grows is appended to and never moved. Shards differ by up to a block."""
    start = np.arange(0, seqlen, BLOCK, dtype=np.int64)
    length = np.minimum(BLOCK, seqlen - start)
    return _build("cyclic", seqlen, world_size, start // BLOCK % world_size, start, length, 1)


# Those that a context chooses from, and those that it takes by name.
LAYOUTS: tuple[Callable[[int, int], Layout], ...] = (contiguous, zigzag, striped)
NAMED = (*LAYOUTS, cyclic)


def named(kind: str, name: str, choices: Sequence[str]) -> str:
    """``name`` if it is one of ``choices``, else a ValueError that lists them and names the nearest."""
    if isinstance(name, str) and name in choices:
        return name
    near = difflib.get_close_matches(str(name), choices, 1, 0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{kind}={shown(name)} is unknown: choose from {', '.join(choices)}{hint}")
