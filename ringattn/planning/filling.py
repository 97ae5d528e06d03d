"""Filling groups of ranks with documents, once it is settled how many ranks each document gets.

Sizes go from the largest to the smallest, so that small groups fill what large ones leave; the documents of one size
from the longest to the shortest, each to the group that is free first (longest processing time first).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ringattn.geometry.spans import Ints
from ringattn.planning.assignment import Assignment, Part
from ringattn.planning.spread import Batch


@dataclass(slots=True)
class _Open:
    """A part while it is filled."""

    start: int
    size: int
    number: int  # of its micro-batch
    device: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    documents: list[int] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Filled:
    """Parts in the order in which they were opened, and when the last one ends."""

    parts: list[_Open]
    seconds: float

    def assignment(self, batch: Batch) -> Assignment:
        """With what nobody computes as idle parts."""
        micro_batches: list[list[_Open]] = [[] for _ in range(1 + max(part.number for part in self.parts))]
        for part in self.parts:
            micro_batches[part.number].append(part)
        return Assignment(batch.world, tuple(tuple(_partition(parts, batch)) for parts in micro_batches))


def _partition(parts: list[_Open], batch: Batch) -> Iterator[Part]:
    at = 0
    for part in sorted(parts, key=lambda part: part.start):
        if part.start > at:
            yield Part(range(at, part.start), (), (), 0.0)
        at = part.start + part.size
        documents = sorted(part.documents)
        lengths = tuple(batch.lengths[documents].tolist())
        yield Part(range(part.start, at), tuple(documents), lengths, part.seconds)
    if at < batch.world:
        yield Part(range(at, batch.world), (), (), 0.0)


def fill(batch: Batch, sizes: Ints, limit: float = np.inf) -> Filled | None:
    """Documents in groups of the given sizes (indices into `Batch.sizes`); None once it is known to end after the
    limit."""
    free, numbers = np.zeros(batch.world), np.zeros(batch.world, np.int64)
    parts: list[_Open] = []
    order = np.argsort(-batch.device[np.arange(len(sizes)), sizes], kind="stable")
    for size in np.unique(sizes)[::-1].tolist():
        documents = order[sizes[order] == size]
        groups = _starts(batch, int(batch.sizes[size]))[:, None] + np.arange(batch.sizes[size])
        soonest = np.argsort(free[groups].max(1), kind="stable")[: len(documents)]
        groups = groups[soonest]
        line = _Line(groups[:, 0].tolist(), free[groups].max(1).tolist(), numbers[groups].max(1).tolist())
        line.take(batch, size, documents)
        if max(line.ends) >= limit:
            return None
        used = np.array([bool(of) for of in line.parts])
        free[groups[used]] = np.array(line.ends)[used, None]
        numbers[groups[used]] = np.array([of[-1].number + 1 for of in line.parts if of])[:, None]
        parts += [part for of in line.parts for part in of]
    return Filled(parts, float(free.max()))


@dataclass(eq=False)
class _Line:
    """Groups of one size: their first ranks, when they are free, their next micro-batches, and the parts opened."""

    starts: list[int]
    ends: list[float]
    firsts: list[int]
    parts: list[list[_Open]] = field(init=False)

    def take(self, batch: Batch, size: int, documents: Ints) -> None:
        """Each document goes to the group that is free first, into its first part that has room."""
        ranks, host, queued = int(batch.sizes[size]), float(batch.host[size]), batch.terms.rates.queued
        room, self.parts = ranks * batch.memory, [[] for _ in self.starts]
        heap = [(end, group) for group, end in enumerate(self.ends)]
        heapq.heapify(heap)
        tokens, seconds = batch.lengths[documents].tolist(), batch.device[documents, size].tolist()
        for document, held, taken in zip(documents.tolist(), tokens, seconds, strict=True):
            end, group = heap[0]
            for part in self.parts[group]:
                if part.tokens + held <= room:
                    break
            else:
                part = _Open(self.starts[group], ranks, self.firsts[group] + len(self.parts[group]))
                self.parts[group].append(part)
            before, part.device = part.seconds, part.device + taken
            part.seconds = max(part.device, host) if queued else part.device + host
            part.tokens += held
            part.documents.append(document)
            heapq.heapreplace(heap, (end + part.seconds - before, group))
        for end, group in heap:
            self.ends[group] = end


def _starts(batch: Batch, size: int) -> Ints:
    """First ranks of the groups of one size: beside each other in each node, the larger ones at its beginning and the
    smaller at its end, so that both fit; beyond a node, of whole nodes."""
    if size > batch.node:
        return np.arange(0, batch.world - size + 1, size)
    starts = []
    for first in range(0, batch.world, batch.node):
        ranks = min(batch.node, batch.world - first)
        left = 0 if 2 * size > batch.node else ranks % size
        starts.append(np.arange(first + left, first + ranks - size + 1, size))
    return np.concatenate(starts)
