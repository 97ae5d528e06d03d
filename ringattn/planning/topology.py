"""Topology: the links between ranks, level by level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringattn.arguments.values import integer, number, shown
from ringattn.geometry.spans import Ints

# A token always takes some time to arrive, or every layout would cost the same to move; and costs stay finite.
SLOWEST, FASTEST, LONGEST = 1.0, 1e18, 1e6


@dataclass(frozen=True)
class Link:
    """What a rank sends and, at the same time, receives over one level.

    bytes_per_second: of one rank, each way.
    latency: seconds that a message takes beyond its bytes, on its way and to be packed.
    """

    bytes_per_second: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        limits = {"bytes_per_second": (SLOWEST, FASTEST), "latency": (0.0, LONGEST)}
        for name, (least, most) in limits.items():
            object.__setattr__(self, name, number(f"Link.{name}", getattr(self, name), least, most))


@dataclass(frozen=True)
class Topology:
    """Which ranks of a context share a node, and the links inside of nodes and between them.

    intra: between ranks of one node.
    inter: between nodes; None is the same as inside.
    ranks_per_node: ranks of a context on one node, neighbours in its group; None: all of them.
    """

    intra: Link
    inter: Link | None = None
    ranks_per_node: int | None = None

    def __post_init__(self) -> None:
        for name, link in (("intra", self.intra), ("inter", self.inter)):
            if not isinstance(link, Link) and (link is not None or name == "intra"):
                raise ValueError(f"Topology.{name}={shown(link)}: must be a ringattn.Link(bytes_per_second, latency)")
        if self.ranks_per_node is not None:
            ranks = integer("Topology.ranks_per_node", self.ranks_per_node, 1, hint="; None is one node for all ranks")
            object.__setattr__(self, "ranks_per_node", ranks)
        elif self.inter is not None:
            raise ValueError(
                f"Topology.inter={self.inter} with ranks_per_node=None, which is one node, and no message goes between "
                "nodes: ranks_per_node must say how many ranks a node has"
            )

    @property
    def links(self) -> tuple[Link, ...]:
        """By level, the links inside of a node first."""
        return self.intra, self.intra if self.inter is None else self.inter

    def flat(self, world_size: int) -> str:
        """Why so many ranks are not several whole nodes of several ranks each; empty where they are."""
        ranks = self.ranks_per_node
        if world_size == 1:
            return "it is one rank"
        if ranks is None:
            return f"no nodes are told apart among its {world_size} ranks"
        if ranks >= world_size:
            return f"its {world_size} ranks are on one node"
        if ranks == 1:
            return f"each of its {world_size} ranks is a node of its own"
        if world_size % ranks:
            return f"its {world_size} ranks are not whole nodes of {ranks}"
        return ""

    def among(self, members: Sequence[int]) -> Topology:
        """The links between some of the ranks, which rise. Where these are not as many neighbours on each node, all are
        as far from each other as nodes are."""
        if self.ranks_per_node is None:
            return self
        nodes = [rank // self.ranks_per_node for rank in members]
        counts = {nodes.count(node) for node in nodes}
        return replace(self, ranks_per_node=counts.pop()) if len(counts) == 1 else Topology(self.links[1])

    def level(self, src: Ints, dst: Ints) -> Ints:
        """The slowest level that a transfer from rank to rank crosses: 0 inside of a node, 1 between nodes."""
        if self.ranks_per_node is None:
            return np.zeros_like(src)
        return (src // self.ranks_per_node != dst // self.ranks_per_node).astype(np.int64)

    @property
    def fastest(self) -> float:
        """Seconds that a byte takes at least."""
        return 1.0 / max(link.bytes_per_second for link in self.links)

    def received(self, moved: Ints, world_size: int) -> tuple[int, int]:
        """The most that a rank receives inside of its node and from others, of messages (src, dst, amount)."""
        src, dst, amount = moved.T
        apart = self.level(src, dst)
        inside, between = (np.bincount(dst, amount * part, world_size).max(initial=0) for part in (1 - apart, apart))
        return int(inside), int(between)

    def seconds(self, moved: Ints, world_size: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """What messages (src, dst, amount) take each rank, by their bytes, one for each unit of the amount, and by
        their latencies: those that it receives or those that it sends, whichever take longer."""
        if not len(moved):
            return np.zeros(world_size), np.zeros(world_size)
        src, dst, amount = moved.T
        byte, latency = np.array([(1.0 / link.bytes_per_second, link.latency) for link in self.links]).T
        level = self.level(src, dst)
        times = byte[level] * amount, latency[level]
        taken, late = (np.maximum(*(np.bincount(end, time, world_size) for end in (src, dst))) for time in times)
        return taken, late
