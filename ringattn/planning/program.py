"""Programs: all that one rank does in a call, forward and backward, turn by turn, as data.

The loops only walk the turns of a program, and whoever wants to know what a call computes, moves or holds reads them.
Nothing is decided later: which rows of which buffer a message takes or fills, what is copied and what is added where,
which launches run on which heads, what tells a first write from a sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from functools import cached_property
from itertools import chain
from typing import NamedTuple

from ringattn.geometry.frames import Frame
from ringattn.geometry.spans import Ints
from ringattn.geometry.tiles import Tiles
from ringattn.planning.launches import Launch, Stacking
from ringattn.planning.stages import ALL, Heads
from ringattn.planning.wanted import ALL_WANTED, Wanted


class Sums(NamedTuple):
    """Of dq, and of dk and dv: whether anything is added to a row that was written before."""

    queries: bool
    keys: bool


class Row(Enum):
    """What a row of a buffer holds of one token, for all batch rows. Its value is the kind of message it travels as."""

    KV = "kv"  # K and V of KV heads, in the dtype of the inputs
    GRAD = "grad"  # dK and dV of KV heads, in that of the accumulators, as all that follow
    DK = "dk"  # one of them alone, where the other is not wanted
    DV = "dv"
    Q = "q"  # q of all query heads, in the dtype of the inputs
    PARTIAL = "partial"  # the result for a query: out, and lse in two numbers
    QUERY = "query"  # all that backward reads of a query: q, dout, out, lse, delta, dlse
    DQ = "dq"  # dq of all query heads

    @property
    def kept(self) -> bool:
        """Whether numbers are in the dtype of the inputs."""
        return self in (Row.KV, Row.Q)

    @property
    def keys(self) -> bool:
        """Whether rows are of KV heads, not of query heads."""
        return self is Row.KV or self.gradient

    @property
    def gradient(self) -> bool:
        """Whether rows are gradients of keys."""
        return self in (Row.GRAD, Row.DK, Row.DV)

    @property
    def homeward(self) -> bool:
        """Whether rows are computed of keys or queries that came from elsewhere, and on their way home."""
        return self.gradient or self in (Row.PARTIAL, Row.DQ)

    def width(self, head_dim: int, v_head_dim: int) -> int:
        """Numbers of one head."""
        return {
            Row.KV: head_dim + v_head_dim, Row.GRAD: head_dim + v_head_dim, Row.DK: head_dim, Row.DV: v_head_dim,
            Row.Q: head_dim, Row.DQ: head_dim,
            Row.PARTIAL: v_head_dim + 2, Row.QUERY: head_dim + 2 * v_head_dim + 3,
        }[self]  # fmt: skip


@dataclass(frozen=True)
class Buffer:
    """Rows of one kind and of some heads. Buffers of one ``slot`` take the same memory, one after the other."""

    slot: str
    row: Row
    rows: int
    heads: Heads = ALL


@dataclass(frozen=True)
class Copy:
    """Rows of one place and the rows of another that they are written or added to, pairs of slices. None in place of a
    buffer is the rank's own: K and V, their gradients, q, its result or its gradient, as the other's rows are."""

    source: Buffer | None
    target: Buffer | None
    pairs: tuple[tuple[slice, slice], ...]

    @property
    def row(self) -> Row:
        buffer = self.source or self.target
        assert buffer is not None, "one of the two is a buffer"
        return buffer.row

    @property
    def heads(self) -> Heads:
        buffer = self.source or self.target
        assert buffer is not None, "one of the two is a buffer"
        return buffer.heads


@dataclass(frozen=True)
class Parcel:
    """A message: one run of a buffer's rows, to or from a peer. ``spans``: their global positions, ``[n, 3]``."""

    peer: int
    buffer: Buffer
    rows: slice
    spans: Ints = field(compare=False)

    @property
    def tokens(self) -> Fraction:
        """A token whose heads travel in parts counts once in all."""
        return Fraction(self.rows.stop - self.rows.start, self.buffer.heads.parts)


@dataclass(frozen=True, eq=False)
class Work:
    """Tiles that are computed, in ``launches``, on ``heads``. None is the rank's own: ``keys`` and ``queries`` its
    shard, ``grads`` the gradients of its shard, ``result`` its result (backward: dq). Of keys or queries that came from
    elsewhere, ``grads`` and ``result`` are None where their gradients are not wanted."""

    tiles: Tiles
    launches: tuple[Launch, ...]
    q_frame: Frame
    k_frame: Frame
    heads: Heads = ALL
    keys: Buffer | None = None
    grads: Buffer | None = None
    queries: Buffer | None = None
    result: Buffer | None = None


@dataclass(frozen=True)
class Turn:
    """One turn of a loop, in this order: ``copies`` before messages are posted, ``sends`` and ``recvs`` posted, buffers
    filled with zeros, ``work``, the messages waited for, ``adds`` (of partial results: merged)."""

    copies: tuple[Copy, ...] = ()
    sends: tuple[Parcel, ...] = ()
    recvs: tuple[Parcel, ...] = ()
    zeros: tuple[Buffer, ...] = ()
    work: tuple[Work, ...] = ()
    adds: tuple[Copy, ...] = ()

    def __bool__(self) -> bool:
        return any(vars(self).values())

    @property
    def launches(self) -> list[Launch]:
        """The kernel calls of all its work."""
        return [launch for work in self.work for launch in work.launches]

    @property
    def own(self) -> Work | None:
        """The work on the rank's own queries."""
        return next((work for work in self.work if work.queries is None), None)


@dataclass(frozen=True)
class Program:
    """What one rank does for one mask: the turns of both loops, which index n belongs together on all ranks.

    ``blank``: some query rows are not written whole by a fresh launch first, so the result starts from the identity.
    ``zeros``: the same of the own dq, and of the own dk and dv, which then start as zeros; ``sums``: what is added up.
    ``alone``: no rank needs anything of another. What it was compiled from: ``schedule``, ``cut``, ``travel``,
    ``stacking``, ``wanted``.
    """

    rank: int
    q_frame: Frame
    k_frame: Frame
    forward: tuple[Turn, ...]
    backward: tuple[Turn, ...]
    blank: bool
    zeros: tuple[bool, bool]
    sums: Sums
    alone: bool
    schedule: str
    cut: int
    travel: bool
    stacking: Stacking
    wanted: Wanted = ALL_WANTED

    @cached_property
    def buffers(self) -> tuple[Buffer, ...]:
        """All buffers of both loops, each once."""
        found: dict[Buffer, None] = {}
        for turn in chain(self.forward, self.backward):
            ends = (end for copy in (*turn.copies, *turn.adds) for end in (copy.source, copy.target))
            posted = (parcel.buffer for parcel in (*turn.sends, *turn.recvs))
            used = (b for work in turn.work for b in (work.keys, work.grads, work.queries, work.result))
            found |= dict.fromkeys(b for b in chain(ends, posted, turn.zeros, used) if b is not None)
        return tuple(found)

    @cached_property
    def merges(self) -> bool:
        """Whether a row of the result is merged with another."""
        own = [work for turn in self.forward for work in turn.work if work.queries is None]
        return self.travel or not all(launch.fresh for work in own for launch in work.launches)

    @property
    def calls(self) -> int:
        """Kernel calls of one forward pass."""
        return sum(len(turn.launches) for turn in self.forward)

    @property
    def two_turns(self) -> bool:
        """Whether the backward pass computes its own shard in two turns."""
        return any(work.keys is None and work.heads.parts == 2 for turn in self.backward for work in turn.work)

    def tokens(self, row: Row, sent: bool = False) -> int:
        """Tokens received, or sent, by one kind of message, in one pass."""
        turns = self.backward if row.gradient or row in (Row.QUERY, Row.DQ) else self.forward
        parcels = (parcel for turn in turns for parcel in (turn.sends if sent else turn.recvs))
        return int(sum((parcel.tokens for parcel in parcels if parcel.buffer.row is row), Fraction()))
