"""Ranks whose messages take as long as a topology says: nodes and their links, on one machine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection

import numpy as np

from ringattn.comm.calls import CallLog
from ringattn.comm.label import Label
from ringattn.comm.transport import Board, Parcels, Pending, Transport
from ringattn.planning.topology import Topology


class SlowLinks:
    """A transport that hands messages on to another one and holds back their arrival.

    Every rank has a card for each level of the topology, which takes one message behind the other, those that it sends
    and those that it receives at the same time. ``wait()`` returns when the cards are done with the batch and the
    latency has passed; the rank sleeps meanwhile. What the other transport takes comes on top where it is slower.

    Args:
        transport: moves the messages.
        topology: the links; ``ranks_per_node`` neighbours are a node.
    """

    def __init__(self, transport: Transport, topology: Topology) -> None:
        self.transport, self.topology = transport, topology
        self.name, self.blind = transport.name, transport.blind
        self.rank, self.world_size, self.timeout = transport.rank, transport.world_size, transport.timeout
        self._free: dict[tuple[bool, int], float] = {}  # when the cards have time, by direction and level

    @property
    def log(self) -> CallLog:
        """See `Voters`."""
        return self.transport.log

    @property
    def board(self) -> Board:
        """See `Voters`."""
        return self.transport.board

    def warn(self, label: Label) -> None:
        """See `Voters`."""
        self.transport.warn(label)

    def heed(self, among: Collection[int] | None = None) -> None:
        """See `Voters`."""
        self.transport.heed(among)

    def check_open(self) -> None:
        """See `Transport`."""
        self.transport.check_open()

    def post(self, sends: Parcels, recvs: Parcels, what: str) -> Pending:
        """See `Transport`."""
        due = max(self._taken(True, sends), self._taken(False, recvs))
        return _Held(self.transport.post(sends, recvs, what), due)

    def _taken(self, out: bool, parcels: Parcels) -> float:
        """When the cards are done with messages of one direction."""
        nbytes, now, due = Counter[int](), time.monotonic(), 0.0
        for tensor, peer in parcels:
            nbytes[int(self.topology.level(np.array([self.rank]), np.array([peer]))[0])] += tensor.nbytes
        for level, size in nbytes.items():
            link = self.topology.links[level]
            free = max(now, self._free.get((out, level), 0.0)) + size / link.bytes_per_second
            self._free[out, level] = free
            due = max(due, free + link.latency)
        return due


class _Held:
    """Messages that must not be there before they are due."""

    def __init__(self, pending: Pending, due: float) -> None:
        self.pending, self.due = pending, due

    def wait(self) -> None:
        """See `Pending`."""
        self.pending.wait()
        time.sleep(max(self.due - time.monotonic(), 0.0))
