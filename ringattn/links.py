"""Measuring the links between ranks, for ``Options.topology``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.arguments.values import integer
from ringattn.comm import together, told
from ringattn.planning.topology import FASTEST, Topology
from ringattn.planning.topology import Link as Wire
from ringattn.runtime.joining import Group, join
from ringattn.runtime.link import Link
from ringattn.runtime.settings import Options

PINGS, STREAMS = 21, 5  # exchanges of one number, and of a stream; the first of each is not counted
MESSAGE, MESSAGES = 1 << 20, 4  # numbers (fp32) of a message, and messages of a stream


def measure_links(group_or_mesh: Group, *, ranks_per_node: int | None = None) -> Topology:
    """The links inside of nodes and between them, measured over the group's own transport: a call of all its ranks.

    Level by level, every rank sends to the rank behind it and receives from the one before, all at the same time, as
    in a ring: inside of a node to its neighbour, between nodes to the rank of the same place on the next node. The
    latency is the median time of an exchange of four bytes, the rate that of 4 messages of 4 MiB each beyond it. Of
    either the slowest rank counts, so that all ranks return the same. A rank sends some 80 MB on each level and holds
    32 MiB meanwhile, on its GPU where the group moves tensors of GPUs (NCCL; not run there yet).

    Args:
        group_or_mesh: as of a :class:`ContextParallel`: two ranks or more.
        ranks_per_node: neighbours in the group that share a node; None is what the launcher has told, and one node for
            all ranks where it has not. Alike on all ranks.

    Returns:
        A :class:`Topology` for ``Options.topology``; ``inter`` is None where there is one node.

    Raises:
        ValueError: ``ranks_per_node`` does not divide the ranks, or differs between them; a group of one rank.
        PeerError: a rank did not come.
    """
    return measure_each(group_or_mesh, ranks_per_node)[0]


def measure_each(group_or_mesh: Group, ranks_per_node: int | None) -> tuple[Topology, tuple[Wire | None, Wire | None]]:
    """:func:`measure_links`, and what this rank alone has measured inside of its node and to the next one, None where
    there is no such link. A rank has at most two neighbours on each level, so the time does not grow with the ranks,
    but for the comparison at the end, of as many exchanges as their number has binary digits."""
    shared = join(group_or_mesh, Options)
    link, world = shared.link, shared.link.transport.world_size
    with told(link.transport, "measure_links"):
        if world == 1:
            raise ValueError("measure_links: a group of one rank has no links; give a group of several ranks")
        told_of = shared.nodes.ranks_per_node if shared.nodes else None
        size = (told_of or world) if ranks_per_node is None else ranks_per_node
        size = min(integer("ranks_per_node", size, 1, hint="; None is what the launcher tells"), world)
        if world % size:
            raise ValueError(
                f"ranks_per_node={size} does not divide the {world} ranks of the group: give one that does"
            )
    with together(link.transport, "measure_links"):
        device = _device(link)
        what = {"measured": "links", "ranks per node": str(size)}
        link.begin("measure_links", ("measure_links", size), lambda: what, device)
        found = [_level(link, level, device) for level in _levels(link.transport.rank, world, size)]
        slowest = _slowest(link, torch.tensor(found, dtype=torch.float64, device=device))
        link.finish(device)
    own = _wire(found[0]) if size > 1 else None, _wire(found[1]) if size < world else None
    inside, between = map(_wire, slowest)
    if size in (1, world):
        return Topology(between if size == 1 else inside, None, size if size == 1 else None), own
    return Topology(inside, between, size), own


def _device(link: Link) -> str:
    return "cuda" if "cuda" in link.transport.blind and torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class _Level:
    """Whom a rank sends to and receives from; itself where the level has no links."""

    name: str
    after: int
    before: int


def _levels(rank: int, world: int, size: int) -> Iterator[_Level]:
    first = rank - rank % size
    yield _Level("inside", first + (rank + 1) % size, first + (rank - 1) % size)
    yield _Level("between", (rank + size) % world, (rank - size) % world)


def _level(link: Link, level: _Level, device: str) -> tuple[float, float]:
    """Seconds of a message of no size, and those beyond it of a byte."""
    if level.after == link.transport.rank:
        return 0.0, 0.0
    late = _median(link, level, (1, 1), PINGS, device)
    taken = _median(link, level, (MESSAGES, MESSAGE), STREAMS, device)
    return late, max(taken - late, 0.0) / (4 * MESSAGES * MESSAGE)


def _median(link: Link, level: _Level, shape: tuple[int, int], times: int, device: str) -> float:
    """Seconds of one exchange of so many messages and numbers each."""
    seconds, place = [], torch.device(device)
    out, into = (_buffer(link, f"measured {way}", shape, place) for way in ("out", "in"))
    for number in range(times):
        _synchronize(device)
        start = time.perf_counter()
        sends, recvs = [(row, level.after) for row in out], [(row, level.before) for row in into]
        link.transport.post(sends, recvs, f"links {level.name}, {shape[1]} numbers, {number}").wait()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _buffer(link: Link, slot: str, shape: tuple[int, int], device: torch.device) -> Tensor:
    link.workspace.reserve(slot, shape[0] * shape[1], torch.float32, device)
    return link.workspace.view(slot, shape, torch.float32, device).zero_()


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _slowest(link: Link, found: Tensor) -> list[tuple[float, float]]:
    """The largest numbers of any rank, by as many exchanges as the world has binary digits."""
    transport, away = link.transport, 1
    while away < transport.world_size:
        to, source = (transport.rank + away) % transport.world_size, (transport.rank - away) % transport.world_size
        theirs = torch.empty_like(found)
        transport.post([(found, to)], [(theirs, source)], f"links, {away} ranks away").wait()
        found, away = torch.maximum(found, theirs), 2 * away
    return [(late, byte) for late, byte in found.tolist()]


def _wire(found: tuple[float, float]) -> Wire:
    late, byte = found
    return Wire(1 / max(byte, 1 / FASTEST), late)
