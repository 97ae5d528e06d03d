"""Schedules: the order in which K/V reaches a rank and gradients come home, as data.

A schedule is a function from a plan and a rank to that rank's list of steps. A step names the keys
present while it computes, the transfers that brought them (posted before the step ahead of it
computes) and the gradient transfers that follow it. Steps of equal index belong together on all
ranks. Step 0 is always the rank's own shard. A new schedule is one function plus its place in
``SCHEDULES``.

Gradients *follow* their block along a relay (ring) or *return* straight to the owner (exchange).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ringattn.bands import Intervals, Ints, expand
from ringattn.layouts import Frame
from ringattn.plan import Plan, merge_spans


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
    """One rank's step: ``keys`` are (owner, spans) in the order they lie in the buffer."""

    keys: tuple[tuple[int, Ints], ...]
    kv: tuple[Transfer, ...] = ()
    grads: tuple[Transfer, ...] = ()

    @property
    def frame(self) -> Frame:
        return Frame(np.concatenate([s for _, s in self.keys] or [np.empty((0, 3), np.int64)]))


def own_step(plan: Plan, rank: int) -> Step:
    return Step(((rank, plan.k_layout.frame(rank).spans),))


def exchange(plan: Plan, rank: int) -> list[Step]:
    """Every rank receives just the spans its mask needs, in one step; partial dK/dV return to the owners.

    Buffers: the needed foreign K/V once, and their gradients once.
    """
    rows, message = _messages(plan.world_needs)
    mine, served = rows[:, 0] == rank, rows[:, 1] == rank
    arriving = [(int(part[0, 1]), part[:, 2:]) for part in _split(rows[mine], message[mine])]
    kv = [Transfer(owner, rank, owner, spans) for owner, spans in arriving]
    kv += [Transfer(rank, int(part[0, 0]), rank, part[:, 2:]) for part in _split(rows[served], message[served])]
    if not kv:
        return [own_step(plan, rank)]
    grads = tuple(Transfer(t.dst, t.src, t.owner, t.spans) for t in kv)
    return [own_step(plan, rank), Step(tuple(arriving), tuple(kv), grads)]


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


def ring(plan: Plan, rank: int) -> list[Step]:
    """A relay: at step ``t`` a rank holds what is left of the block of rank ``rank - t``.

    A hop carries only keys that its receiver or someone behind it needs, and the relay of a block ends
    where nobody behind needs it. The fp32 gradient of a key follows the key, and from the last rank
    that needs the key it goes straight home. Buffers: two K/V blocks and two gradient blocks.
    """
    world = plan.world_size
    relay = _Relay(plan)
    nxt, prev = (rank + 1) % world, (rank - 1) % world
    hops = np.arange(1, world + 1)
    held = relay.contents((rank - hops) % world, hops)  # what this rank holds at step t
    passed = relay.contents((rank - hops) % world, hops + 1)  # what it hands on after step t
    own = relay.contents(np.full(world, rank), hops)  # what is out there of its own shard at step t
    homes = relay.minus(held, passed), relay.minus(own, [*own[1:], own[-1][:0]])
    steps = [own_step(plan, rank)]
    for t in range(1, world):
        owner, source = (rank - t) % world, (rank - t + 1) % world
        sent = own[0] if t == 1 else passed[t - 2]
        kv = (Transfer(prev, rank, owner, held[t - 1]), Transfer(rank, nxt, source, sent))
        grads = (
            Transfer(rank, nxt, owner, passed[t - 1]),
            Transfer(prev, rank, (owner - 1) % world, held[t]),
            Transfer(rank, owner, owner, homes[0][t - 1]),
            Transfer((rank + t) % world, rank, rank, homes[1][t - 1]),
        )
        keys = ((owner, held[t - 1]),) if len(held[t - 1]) else ()
        steps.append(Step(keys, _real(kv), _real(grads)))
    while len(steps) > 1 and not (steps[-1].keys or steps[-1].kv or steps[-1].grads):
        steps.pop()
    return steps


def _real(transfers: tuple[Transfer, ...]) -> tuple[Transfer, ...]:
    return tuple(t for t in transfers if len(t.spans))


class _Relay:
    """What a relay carries: the union of the needs of all ranks at least ``hop`` behind the owner."""

    def __init__(self, plan: Plan) -> None:
        world, needs = plan.world_size, plan.world_needs
        distance = (needs[:, 0] - needs[:, 1]) % world
        order = np.lexsort((-distance, needs[:, 1]))
        self.world = world
        self.spans = needs[order, 2:]
        # One lattice for all hops, so that what a hop carries is a part of what the hop before carried.
        self.step = int(np.lcm.reduce(needs[:, 4], initial=1))
        self._key = needs[order, 1] * world + (world - 1 - distance[order])

    def contents(self, owners: Ints, hops: Ints) -> list[Ints]:
        """For each (owner, hop) the spans on their way at that hop."""
        first = np.searchsorted(self._key, owners * self.world, "left")
        last = np.searchsorted(self._key, owners * self.world + np.maximum(self.world - hops, 0), "left")
        group, within = expand(last - first)
        merged = merge_spans(group, self.spans[first[group] + within], self.step)
        edges = np.searchsorted(merged[:, 0], np.arange(len(owners) + 1))
        return [merged[a:b, 1:] for a, b in itertools.pairwise(edges)]

    def minus(self, a: list[Ints], b: list[Ints]) -> list[Ints]:
        """Pair by pair the spans of ``a`` that are not in ``b``."""
        return [self._minus(x, y) if len(y) else x for x, y in zip(a, b, strict=True)]

    def _minus(self, x: Ints, y: Ints) -> Ints:
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


SCHEDULES: tuple[Callable[[Plan, int], list[Step]], ...] = (ring, exchange)
