"""Ring: a relay, from rank to rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ringattn.geometry.spans import Ints, columns
from ringattn.planning.plan import Plan
from ringattn.planning.schedules.base import Flow, Schedule, Step, Transfer, messages, own_step, split
from ringattn.planning.schedules.relay import Relays


def ring(plan: Plan, rank: int, cut: int = 1) -> list[Step]:
    """A relay with strides of ``cut`` ranks: step ``t`` holds what is left of the blocks of ``cut`` owners, those
    ``(t - 1) * cut + 1`` to ``t * cut`` ranks before. They come from their owners at step 1, then from ``cut`` ranks
    before, and lie in global order.

    A hop carries only keys that its receiver or someone behind it on the same stride needs, and the relay of a block
    ends at the last rank that needs any. dK/dV follow their block from step to step; keys that nobody behind needs
    leave it at once and go straight home. Buffers: two steps of K/V, two of gradients.
    """
    relay = _Ring(plan, cut)
    steps = [own_step(plan, rank)]
    for t in range(1, -(-(plan.world_size - 1) // cut) + 1):
        keys, kv = relay.arrivals(rank, t)
        steps.append(Step(keys, kv, relay.departures(rank, t)))
    while len(steps) > 1 and not (steps[-1].keys or steps[-1].kv or steps[-1].grads):
        steps.pop()
    return steps


class _Ring:
    """What passes with strides of ``cut`` ranks. A lane is the part of an owner's ranks that are a whole number of
    strides apart, and a place on it is how far a rank lies behind the owner."""

    def __init__(self, plan: Plan, cut: int) -> None:
        world, needs = plan.world_size, plan.world_needs
        distance = (needs[:, 0] - needs[:, 1]) % world
        self.world, self.cut = world, cut
        self.relays = Relays(needs[:, 1] * cut + (distance - 1) % cut, distance, needs[:, 2:], world)

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
        minus = self.relays.minus
        grads = [Transfer(rank, after, o, spans) for o, spans in zip(owners.tolist(), passed, strict=True)]
        grads += [
            Transfer(before, rank, (rank - d) % world, spans)
            for d, spans in zip(next_hops.tolist(), coming, strict=True)
        ]
        grads += [Transfer(rank, o, o, s) for o, s in zip(owners.tolist(), minus(held, passed), strict=True)]
        grads += [
            Transfer((rank + d) % world, rank, rank, spans)
            for d, spans in zip(hops.tolist(), minus(own, handed), strict=True)
        ]
        return tuple(t for t in grads if len(t.spans))

    def contents(self, owners: Ints, hops: Ints) -> list[Ints]:
        """For each (owner, hop) the spans on their way at that hop."""
        return self.relays.carried(owners * self.cut + (hops - 1) % self.cut, hops)

    def _buffer(self, rank: int, t: int) -> tuple[tuple[int, Ints], ...]:
        hops = self.hops(t)
        owners = (rank - hops) % self.world
        rows = [
            columns(0, owner, spans) for owner, spans in zip(owners.tolist(), self.contents(owners, hops), strict=True)
        ]
        return tuple((int(part[0, 1]), part[:, 2:]) for part in split(*messages(np.concatenate(rows))))

    def _source(self, rank: int, owner: int, t: int) -> int:
        return owner if t == 1 else (rank - self.cut) % self.world


def _cuts(plan: Plan, kv_heads: int) -> Sequence[int]:
    return range(max(plan.world_size - 1, 1), 0, -1)


def _buffers(plan: Plan, cut: int, kv_heads: int) -> int:
    steps = 2 if cut < plan.world_size - 1 else 1
    return steps * cut * int(plan.k_layout.sizes.max(initial=0)) * kv_heads


def _turn(hops: Ints, cut: int) -> Ints:
    return -(-hops // cut)


def _flow(plan: Plan, cut: int) -> Flow:
    """Blocks come from their owners at the first step and then from ``cut`` ranks before; what a hop carries is at most
    what the ranks behind on its stride need, each counted, up to the shard."""
    world, needs = plan.world_size, plan.world_needs
    hops, steps = (needs[:, 0] - needs[:, 1]) % world, -(-(world - 1) // cut)
    wanted = np.zeros((world, steps * cut), np.int64)
    np.add.at(wanted, (needs[:, 1], hops - 1), needs[:, 3])
    behind = wanted.reshape(world, steps, cut)[:, ::-1].cumsum(1)[:, ::-1].reshape(world, -1)
    owner, hop = np.nonzero(behind)
    carried = np.minimum(behind[owner, hop], plan.k_layout.sizes[owner])
    src = np.where(hop < cut, owner, (owner + hop + 1 - cut) % world)
    return Flow(columns(src, (owner + hop + 1) % world, carried), -(-int(hops.max(initial=0)) // cut))


RING = Schedule("ring", ring, _cuts, _buffers, _turn, _flow, on_lattice=True)
