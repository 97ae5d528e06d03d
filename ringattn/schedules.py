"""Schedules: the order in which K/V reaches a rank and gradients come home, as data.

A schedule gives, for a plan and a rank, that rank's list of steps. A step names the keys present while it
computes, the KV heads it computes, the transfers that brought the keys (posted before the step ahead of it
computes) and the gradient transfers that follow it. Steps of equal index belong together on all ranks.
Step 0 needs no transfer. A schedule has one number to choose, its ``cut`` (hops of a step, chunks of heads),
and states the buffers that a cut takes. A new schedule is one function plus its place in ``SCHEDULES``.

Gradients *follow* their block along a relay (ring) or *return* straight to the owner (exchange, gather).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ringattn.bands import Intervals, Ints, expand
from ringattn.layouts import Frame
from ringattn.plan import Plan, merge_spans

HEAD_CHUNKS = 4  # of a gather that room does not force to more: one computes while the next travels


@dataclass(frozen=True, eq=False)
class Transfer:
    """``spans`` (global key positions, ``[n, 3]``) of ``owner``'s shard go from rank ``src`` to ``dst``."""

    src: int
    dst: int
    owner: int
    spans: Ints

    @property
    def tokens(self) -> int:
        return int(self.spans[:, 1].sum())


@dataclass(frozen=True, eq=False)
class Step:
    """One rank's step: ``keys`` are (owner, spans) in the order they lie in the buffer, ``heads`` the chunk
    ``(i, n)`` of the KV heads. Keys of the rank's own beyond step 0 are copied into the buffer."""

    keys: tuple[tuple[int, Ints], ...]
    kv: tuple[Transfer, ...] = ()
    grads: tuple[Transfer, ...] = ()
    heads: tuple[int, int] = (0, 1)

    @property
    def frame(self) -> Frame:
        return Frame(np.concatenate([s for _, s in self.keys] or [np.empty((0, 3), np.int64)]))


@dataclass(frozen=True)
class Schedule:
    """steps: ``(plan, rank, cut)`` to the rank's steps. cuts: ``(plan, kv_heads)`` to the cuts worth trying, the
    preferred first. buffers: ``(plan, cut, kv_heads)`` to the key rows of one head that its K/V buffers hold at
    most on any rank (gradients take as many, in fp32)."""

    name: str
    steps: Callable[[Plan, int, int], list[Step]]
    cuts: Callable[[Plan, int], Iterable[int]]
    buffers: Callable[[Plan, int, int], int]

    def fit(self, plan: Plan, kv_heads: int, room: int) -> int | None:
        """The preferred cut whose buffers hold at most ``room`` rows of one head; None where none does."""
        fitting = (cut for cut in self.cuts(plan, kv_heads) if self.buffers(plan, cut, kv_heads) <= room)
        return next(fitting, None)


def two_shards(plan: Plan, kv_heads: int) -> int:
    """The room that is taken unless a limit is given: rows of one head in two shards of K/V."""
    return 2 * int(plan.k_layout.sizes.max(initial=0)) * kv_heads


def own_step(plan: Plan, rank: int) -> Step:
    return Step(((rank, plan.k_layout.frame(rank).spans),))


def exchange(plan: Plan, rank: int, cut: int = 1) -> list[Step]:
    """Every rank receives just the spans its mask needs, in one step; partial dK/dV return to the owners.

    Buffers: the needed foreign K/V once, and their gradients once. There is nothing to cut.
    """
    keys, kv = _collected(plan.world_needs, rank)
    if not kv:
        return [own_step(plan, rank)]
    return [own_step(plan, rank), Step(keys, kv, _returned(kv))]


def gather(plan: Plan, rank: int, cut: int = 1) -> list[Step]:
    """The rank's own keys and all it needs are collected in global order, a part of the KV heads at a time, the next
    heads travelling meanwhile: what a chunk of queries sees is one tile, and nothing is merged.

    ``cut``: chunks of the KV heads. Buffers: two chunks of own and needed K/V, and of their gradients.
    """
    table = plan.k_layout.table
    keys, kv = _collected(np.concatenate((plan.world_needs, table[:, [0, 0, 1, 2, 3]])), rank)
    if not kv:
        return [own_step(plan, rank)]
    chunk = Step(keys, kv, _returned(kv))
    return [Step(()), *(Step(chunk.keys, chunk.kv, chunk.grads, (i, cut)) for i in range(cut))]


def _collected(needs: Ints, rank: int) -> tuple[tuple[tuple[int, Ints], ...], tuple[Transfer, ...]]:
    """What lies in the rank's buffer when all of ``needs`` (rank, owner, span) are collected, and the transfers of
    which the rank is an end."""
    rows, message = _messages(needs)
    mine, served = rows[:, 0] == rank, (rows[:, 1] == rank) & (rows[:, 0] != rank)
    keys = tuple((int(part[0, 1]), part[:, 2:]) for part in _split(rows[mine], message[mine]))
    kv = [Transfer(owner, rank, owner, spans) for owner, spans in keys if owner != rank]
    kv += [Transfer(rank, int(part[0, 0]), rank, part[:, 2:]) for part in _split(rows[served], message[served])]
    return keys, tuple(kv)


def _returned(kv: tuple[Transfer, ...]) -> tuple[Transfer, ...]:
    return tuple(Transfer(t.dst, t.src, t.owner, t.spans) for t in kv)


def _messages(needs: Ints) -> tuple[Ints, Ints]:
    """Needs in the order they lie in the receiver's buffer, and the number of the message each is part of.

    Keys are packed in global order, so that what one query sees of several owners lies side by side; a
    message is a run of one owner. Strided spans interleave: there each owner is one message.
    """
    interleaved = bool((needs[:, 4] > 1).any())
    order = np.lexsort((needs[:, 2], needs[:, 1] if interleaved else np.zeros(len(needs)), needs[:, 0]))
    rows = needs[order]
    new = np.ones(len(rows), bool)
    new[1:] = (rows[1:, :2] != rows[:-1, :2]).any(1)
    return rows, np.cumsum(new)


def _split(rows: Ints, message: Ints) -> list[Ints]:
    if not len(rows):
        return []
    return np.split(rows, np.flatnonzero(np.diff(message)) + 1)


def ring(plan: Plan, rank: int, cut: int = 1) -> list[Step]:
    """A relay with strides of ``cut`` ranks: step ``t`` holds what is left of the blocks of ``cut`` owners, those
    ``(t - 1) * cut + 1`` to ``t * cut`` ranks before. They come from their owners at step 1, then from ``cut`` ranks
    before, and lie in global order.

    A hop carries only keys that its receiver or someone behind it on the same stride needs, and the relay of a block
    ends at the last rank that needs any. dK/dV follow their block from step to step; keys that nobody behind needs
    leave it at once and go straight home. Buffers: two steps of K/V, two of gradients.
    """
    relay = _Relay(plan, cut)
    steps = [own_step(plan, rank)]
    for t in range(1, -(-(plan.world_size - 1) // cut) + 1):
        keys, kv = relay.arrivals(rank, t)
        steps.append(Step(keys, kv, relay.departures(rank, t)))
    while len(steps) > 1 and not (steps[-1].keys or steps[-1].kv or steps[-1].grads):
        steps.pop()
    return steps


class _Relay:
    """What a relay with strides of ``cut`` carries: the union of the needs of all ranks that lie at least ``hop``
    behind the owner and a whole number of strides from that hop."""

    def __init__(self, plan: Plan, cut: int) -> None:
        world, needs = plan.world_size, plan.world_needs
        distance = (needs[:, 0] - needs[:, 1]) % world
        lane = needs[:, 1] * cut + (distance - 1) % cut
        order = np.lexsort((-distance, lane))
        self.world, self.cut = world, cut
        self.spans = needs[order, 2:]
        # One lattice for all hops, so that what a hop carries is a part of what the hop before carried.
        self.step = int(np.lcm.reduce(needs[:, 4], initial=1))
        self._key = lane[order] * world + (world - 1 - distance[order])

    def hops(self, t: int) -> Ints:
        """How far the blocks of step ``t`` are from their owners."""
        return np.arange((t - 1) * self.cut + 1, min(t * self.cut, self.world - 1) + 1)

    def arrivals(self, rank: int, t: int) -> tuple[tuple[tuple[int, Ints], ...], tuple[Transfer, ...]]:
        """The rank's buffer at step ``t``, and the transfers that fill it and those of the ranks it serves."""
        keys = self._buffer(rank, t)
        kv = [Transfer(self._source(rank, owner, t), rank, owner, spans) for owner, spans in keys]
        receivers = (rank + (self.hops(1) if t == 1 else np.array([self.cut]))) % self.world
        for receiver in receivers.tolist():
            for owner, spans in self._buffer(receiver, t):
                if self._source(receiver, owner, t) == rank:
                    kv.append(Transfer(rank, receiver, owner, spans))
        return keys, tuple(kv)

    def departures(self, rank: int, t: int) -> tuple[Transfer, ...]:
        """Gradients after step ``t``: on with their blocks, then home; and those that come here, in the same order."""
        hops, world, cut = self.hops(t), self.world, self.cut
        after, before, owners = (rank + cut) % world, (rank - cut) % world, (rank - hops) % world
        held, passed = self.contents(owners, hops), self.contents(owners, hops + cut)
        own, handed = self.contents(np.full(len(hops), rank), hops), self.contents(np.full(len(hops), rank), hops + cut)
        next_hops = hops[hops + cut < world] + cut
        coming = self.contents((rank - next_hops) % world, next_hops)
        grads = [Transfer(rank, after, o, spans) for o, spans in zip(owners.tolist(), passed, strict=True)]
        grads += [
            Transfer(before, rank, (rank - d) % world, spans)
            for d, spans in zip(next_hops.tolist(), coming, strict=True)
        ]
        grads += [Transfer(rank, o, o, s) for o, s in zip(owners.tolist(), self._minus(held, passed), strict=True)]
        grads += [
            Transfer((rank + d) % world, rank, rank, spans)
            for d, spans in zip(hops.tolist(), self._minus(own, handed), strict=True)
        ]
        return tuple(t for t in grads if len(t.spans))

    def contents(self, owners: Ints, hops: Ints) -> list[Ints]:
        """For each (owner, hop) the spans on their way at that hop."""
        lane = (owners * self.cut + (hops - 1) % self.cut) * self.world
        first = np.searchsorted(self._key, lane, "left")
        last = np.searchsorted(self._key, lane + np.maximum(self.world - hops, 0), "left")
        group, within = expand(last - first)
        merged = merge_spans(group, self.spans[first[group] + within], self.step)
        edges = np.searchsorted(merged[:, 0], np.arange(len(owners) + 1))
        return [merged[a:b, 1:] for a, b in itertools.pairwise(edges)]

    def _buffer(self, rank: int, t: int) -> tuple[tuple[int, Ints], ...]:
        hops = self.hops(t)
        owners = (rank - hops) % self.world
        rows = [
            np.column_stack((np.full((len(spans), 2), (0, owner)), spans))
            for owner, spans in zip(owners.tolist(), self.contents(owners, hops), strict=True)
        ]
        return tuple((int(part[0, 1]), part[:, 2:]) for part in _split(*_messages(np.concatenate(rows))))

    def _source(self, rank: int, owner: int, t: int) -> int:
        return owner if t == 1 else (rank - self.cut) % self.world

    def _minus(self, a: list[Ints], b: list[Ints]) -> list[Ints]:
        """Pair by pair the spans of ``a`` that are not in ``b``."""
        return [self._without(x, y) if len(y) else x for x, y in zip(a, b, strict=True)]

    def _without(self, x: Ints, y: Ints) -> Ints:
        parts = []
        for residue in np.unique(x[:, 0] % self.step).tolist():
            runs = [self._runs(spans[spans[:, 0] % self.step == residue]) for spans in (x, y)]
            left = runs[0].intersect(runs[1].complement()).bounds
            start, length = left[:, 0] * self.step + residue, left[:, 1] - left[:, 0]
            parts.append(np.stack((start, length, np.full_like(start, self.step)), 1))
        return np.concatenate(parts or [x])

    def _runs(self, spans: Ints) -> Intervals:
        start = spans[:, 0] // self.step
        return Intervals(np.stack((start, start + spans[:, 1]), 1))


def _ring_cuts(plan: Plan, kv_heads: int) -> Sequence[int]:
    return range(max(plan.world_size - 1, 1), 0, -1)


def _ring_buffers(plan: Plan, cut: int, kv_heads: int) -> int:
    steps = 2 if cut < plan.world_size - 1 else 1
    return steps * cut * int(plan.k_layout.sizes.max(initial=0)) * kv_heads


def _exchange_buffers(plan: Plan, cut: int, kv_heads: int) -> int:
    return int(plan.received.max(initial=0)) * kv_heads


def _gather_cuts(plan: Plan, kv_heads: int) -> Sequence[int]:
    return range(min(HEAD_CHUNKS, kv_heads), kv_heads + 1)


def _gather_buffers(plan: Plan, cut: int, kv_heads: int) -> int:
    rows = int((plan.received + plan.k_layout.sizes).max(initial=0))
    return rows * min(2 * -(-kv_heads // cut), kv_heads)


SCHEDULES: tuple[Schedule, ...] = (
    Schedule("ring", ring, _ring_cuts, _ring_buffers),
    Schedule("exchange", exchange, lambda plan, kv_heads: (1,), _exchange_buffers),
    Schedule("gather", gather, _gather_cuts, _gather_buffers),
)


def by_name(name: str) -> Schedule:
    return next(schedule for schedule in SCHEDULES if schedule.name == name)
