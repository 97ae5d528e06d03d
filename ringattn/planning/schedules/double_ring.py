"""Double ring: blocks cross to other nodes once, and pass from rank to rank inside of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ringattn.geometry.spans import Ints, columns
from ringattn.planning.plan import Plan
from ringattn.planning.schedules.base import Flow, Schedule, Step, Transfer, own_step
from ringattn.planning.schedules.relay import Relays

Keys = tuple[tuple[int, Ints], ...]


def double_ring(plan: Plan, rank: int, cut: int = 1) -> list[Step]:
    """A ring of nodes around the rings inside of them, after LoongTrain (arXiv 2406.18485), whose blocks pass from node
    to node where these come straight from their owners, as often. With ``m`` ranks a node, step
    ``i * m + j`` holds the block of the rank ``j`` places before on the node ``i`` nodes before. At ``j = 0`` it comes
    from its owner, which has the same place on its own node, so that every rank's card carries a part of what crosses;
    then from the rank before on the node.

    A block crosses to a node only with keys that someone there needs, and a hop inside carries only those that its
    receiver or someone behind it on the node needs. dK/dV follow their block inside of the node, and go straight home
    from the last rank there that needs it.

    ``cut``: parts in which a block crosses, one a step, so that it hides behind as many steps. Buffers: two steps of
    K/V, and of gradients, and one more of each where blocks cross in parts. On one node it is a ring.
    """
    rings = _Rings(plan, cut)
    steps = [own_step(plan, rank)]
    for t in range(1, plan.world_size):
        steps.append(Step(rings.keys(rank, t), tuple(rings.arrivals(rank, t)), tuple(rings.departures(rank, t))))
    while len(steps) > 1 and not (steps[-1].keys or steps[-1].kv or steps[-1].grads):
        steps.pop()
    return steps


class _Rings:
    """What passes inside of each node: one relay for every owner and node, from the owner's place on."""

    def __init__(self, plan: Plan, cut: int) -> None:
        self.size, self.nodes, self.cut = plan.node_size, plan.world_size // plan.node_size, cut
        needs = plan.world_needs
        lanes = needs[:, 1] * self.nodes + (needs[:, 0] // self.size - needs[:, 1] // self.size) % self.nodes
        self.relays = Relays(lanes, (needs[:, 0] - needs[:, 1]) % self.size, needs[:, 2:], self.size)

    def rank(self, rank: int, nodes: int, places: int) -> int:
        """The rank so many nodes and places behind another one, or before it."""
        node, place = divmod(rank, self.size)
        return (node + nodes) % self.nodes * self.size + (place + places) % self.size

    def carried(self, owner: int, i: int, j: int) -> Ints:
        """What comes of an owner's block to the rank ``i`` nodes and then ``j`` places behind it."""
        spans = self.relays.carried(np.array([owner * self.nodes + i]), np.array([j]))[0]
        return spans[np.argsort(spans[:, 0])]

    def ending(self, owner: int, i: int, j: int) -> Ints:
        """What of it nobody behind on the node needs."""
        return self.relays.minus([self.carried(owner, i, j)], [self.carried(owner, i, j + 1)])[0]

    def keys(self, rank: int, t: int) -> Keys:
        """The rank's buffer at step ``t``."""
        i, j = divmod(t, self.size)
        owner = self.rank(rank, -i, -j)
        spans = self.carried(owner, i, j)
        return ((owner, spans),) if len(spans) else ()

    def arrivals(self, rank: int, t: int) -> Iterable[Transfer]:
        """What fills the rank's buffer, and that of the rank it serves."""
        i, j = divmod(t, self.size)
        nodes, places = (0, 1) if j else (i, 0)
        for src, dst in ((self.rank(rank, -nodes, -places), rank), (rank, self.rank(rank, nodes, places))):
            for owner, spans in self.keys(dst, t):
                if j:
                    yield Transfer(src, dst, owner, spans)
                    continue
                parts = shares(spans, self.cut)
                for number, part in enumerate(parts):  # the last one in the turn before the step
                    yield Transfer(src, dst, owner, part, len(parts) - 1 - number)

    def departures(self, rank: int, t: int) -> Iterable[Transfer]:
        """Gradients after step ``t``: on with their block, then home; and those that come here, in the same order."""
        i, j = divmod(t, self.size)
        after, before = self.rank(rank, 0, 1), self.rank(rank, 0, -1)
        for src, dst in ((rank, after), (before, rank)):
            owner = self.rank(src, -i, -j)
            spans = self.carried(owner, i, j + 1)
            if len(spans):
                yield Transfer(src, dst, owner, spans)
        # Those of the last node have no steps left to hide behind, and those of the own one do not cross.
        cut = self.cut if j == self.size - 1 and 0 < i < self.nodes - 1 else 1
        for src, owner in ((rank, self.rank(rank, -i, -j)), (self.rank(rank, i, j), rank)):
            for number, part in enumerate(shares(self.ending(owner, i, j), cut)):
                yield Transfer(src, owner, owner, part, number)


def shares(spans: Ints, count: int) -> list[Ints]:
    """Spans cut in their order into at most so many runs of about as many tokens, none of them empty."""
    ends = np.cumsum(spans[:, 1])
    total = int(spans[:, 1].sum())
    bounds = np.unique(np.arange(count + 1) * total // count)
    parts = []
    for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        first, last = np.maximum(ends - spans[:, 1], low), np.minimum(ends, high)
        skipped = first - (ends - spans[:, 1])
        part = columns(spans[:, 0] + skipped * spans[:, 2], last - first, spans[:, 2])
        parts.append(part[last > first])
    return parts


def _cuts(plan: Plan, kv_heads: int) -> Sequence[int]:
    """A node's steps but the first, in which the block that crossed before is still read."""
    parts = plan.node_size - 1
    return (parts, 1) if parts > 1 and plan.node_size < plan.world_size else (1,)


def _buffers(plan: Plan, cut: int, kv_heads: int) -> int:
    return (2 + (cut > 1)) * int(plan.k_layout.sizes.max(initial=0)) * kv_heads


def _turn(hops: Ints, cut: int) -> Ints:
    """Every owner's keys are computed alone."""
    return hops


def _flow(plan: Plan, cut: int) -> Flow:
    """What a hop carries is at most what the ranks behind it on the node need, each counted, up to the shard."""
    size, world, needs = plan.node_size, plan.world_size, plan.world_needs
    wanted = np.zeros((world, world // size, size), np.int64)
    nodes_behind = (needs[:, 0] // size - needs[:, 1] // size) % (world // size)
    np.add.at(wanted, (needs[:, 1], nodes_behind, (needs[:, 0] - needs[:, 1]) % size), needs[:, 3])
    behind = wanted[:, :, ::-1].cumsum(2)[:, :, ::-1]
    behind[:, 0, 0] = 0  # the owner's own
    owner, i, j = np.nonzero(behind)
    carried = np.minimum(behind[owner, i, j], plan.k_layout.sizes[owner])
    node, place = (owner // size + i) % (world // size) * size, owner % size
    src = np.where(j > 0, node + (place + j - 1) % size, owner)
    steps = int((i * size + j).max(initial=0))
    return Flow(columns(src, node + (place + j) % size, carried), steps)


DOUBLE_RING = Schedule("double_ring", double_ring, _cuts, _buffers, _turn, _flow, on_lattice=True, by_nodes=True)
