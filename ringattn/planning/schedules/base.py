"""What a schedule is: the order in which K/V reaches a rank and gradients come home, as data.

A schedule gives, for a plan and a rank, that rank's list of steps. A step names the keys present while it
computes, the KV heads it computes, the transfers that brought the keys (posted before the step ahead of it
computes) and the gradient transfers that follow it. Steps of equal index belong together on all ranks.
Step 0 needs no transfer. A schedule has one number to choose, its ``cut`` (hops of a step, chunks of heads),
and states the buffers that a cut takes.

Gradients *follow* their block along a relay (ring; double ring: on each node) or *return* straight to the owner
(exchange, gather).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ringattn.geometry.frames import Frame
from ringattn.geometry.spans import Ints, columns
from ringattn.planning.plan import Plan


@dataclass(frozen=True, eq=False)
class Transfer:
    """``spans`` (global key positions, ``[n, 3]``) of ``owner``'s shard go from rank ``src`` to ``dst``. ``apart``: so
    many turns earlier than the one before its step (K/V from their owner), or later than the one behind it (gradients
    on their way home)."""

    src: int
    dst: int
    owner: int
    spans: Ints
    apart: int = 0

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


@dataclass(frozen=True, eq=False)
class Flow:
    """What a schedule moves in a pass, and behind what it hides.

    moved: rows (src, dst, tokens) of K/V, a message each, of all heads or of one chunk. steps: batches of messages.
    exposed: the part of a rank's transfers that nothing hides. hider: the rest hides behind all of a rank's work, or
    behind that on its own shard. copied: tokens that each rank copies into a buffer of its own.
    """

    moved: Ints
    steps: int
    exposed: float = 0.0
    hider: Literal["all", "own"] = "all"
    copied: Ints | int = 0


@dataclass(frozen=True)
class Schedule:
    """steps: ``(plan, rank, cut)`` to the rank's steps. cuts: ``(plan, kv_heads)`` to the cuts worth trying, the
    preferred first. buffers: ``(plan, cut, kv_heads)`` to the key rows of one head that its K/V buffers hold at
    most on any rank (gradients take as many, in fp32).

    What its cost follows from: turn: ``(hops, cut)`` to the step in which keys are computed whose owner is so many
    ranks before. flow: ``(plan, cut)`` to what moves. by_heads: whether the cut is chunks of heads, each of which makes
    all calls. on_lattice: whether keys of different steps are cut to their common multiple. by_nodes: whether it is for
    several nodes of several ranks each.
    """

    name: str
    steps: Callable[[Plan, int, int], list[Step]]
    cuts: Callable[[Plan, int], Iterable[int]]
    buffers: Callable[[Plan, int, int], int]
    turn: Callable[[Ints, int], Ints]
    flow: Callable[[Plan, int], Flow]
    by_heads: bool = False
    on_lattice: bool = False
    by_nodes: bool = False

    def fit(self, plan: Plan, kv_heads: int, room: int) -> int | None:
        """The preferred cut whose buffers hold at most ``room`` rows of one head; None where none does."""
        fitting = (cut for cut in self.cuts(plan, kv_heads) if self.buffers(plan, cut, kv_heads) <= room)
        return next(fitting, None)


def room_of(plan: Plan, kv_heads: int, shards: int) -> int:
    """Rows of one head in so many of the largest shard's K/V."""
    return shards * int(plan.k_layout.sizes.max(initial=0)) * kv_heads


def straight(plan: Plan) -> Ints:
    """Rows (src, dst, tokens): the messages that bring every need straight from its owner."""
    rows, message = messages(plan.world_needs)
    first = np.flatnonzero(np.diff(message, prepend=0))
    tokens = np.add.reduceat(rows[:, 3], first) if len(first) else rows[:, 3]
    return columns(rows[first, 1], rows[first, 0], tokens)


def own_step(plan: Plan, rank: int) -> Step:
    return Step(((rank, plan.k_layout.frame(rank).spans),))


def returned(kv: tuple[Transfer, ...]) -> tuple[Transfer, ...]:
    return tuple(Transfer(t.dst, t.src, t.owner, t.spans) for t in kv)


def messages(needs: Ints) -> tuple[Ints, Ints]:
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


def split(rows: Ints, message: Ints) -> list[Ints]:
    if not len(rows):
        return []
    return np.split(rows, np.flatnonzero(np.diff(message)) + 1)


def collected(needs: Ints, rank: int) -> tuple[tuple[tuple[int, Ints], ...], tuple[Transfer, ...]]:
    """What lies in the rank's buffer when all of ``needs`` (rank, owner, span) are collected, and the transfers of
    which the rank is an end."""
    rows, message = messages(needs)
    mine, served = rows[:, 0] == rank, (rows[:, 1] == rank) & (rows[:, 0] != rank)
    keys = tuple((int(part[0, 1]), part[:, 2:]) for part in split(rows[mine], message[mine]))
    kv = [Transfer(owner, rank, owner, spans) for owner, spans in keys if owner != rank]
    kv += [Transfer(rank, int(part[0, 0]), rank, part[:, 2:]) for part in split(rows[served], message[served])]
    return keys, tuple(kv)
