"""An assignment: which ranks compute which documents together, micro-batch by micro-batch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringattn.arguments.values import integer


@dataclass(frozen=True)
class Part:
    """A group of ranks and the documents that it computes together in one micro-batch.

    ranks: neighbours, as a range.
    documents: indices into the batch, rising: the order in which they are packed. Empty: these ranks are idle.
    lengths: tokens of each of these documents.
    seconds: what the micro-batch takes the group, estimated.
    """

    ranks: range
    documents: tuple[int, ...]
    lengths: tuple[int, ...]
    seconds: float

    @property
    def seqlen(self) -> int:
        """Tokens of the pack."""
        return sum(self.lengths)

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        """Where documents begin and end in the pack, for :func:`documents`."""
        return tuple(itertools.accumulate(self.lengths, initial=0))


@dataclass(frozen=True)
class Assignment:
    """A batch of documents given to groups of ranks. Made by :func:`assign`; equal on all ranks, printable.

    world: the number of ranks.
    micro_batches: each is a partition of the ranks into parts, by rank. Every document is in one part of one of them.
    """

    world: int
    micro_batches: tuple[tuple[Part, ...], ...]

    def of(self, rank: int) -> tuple[Part, ...]:
        """The rank's part of each micro-batch, in order; as many on all ranks, idle ones (no documents) included.

        Raises ``ValueError`` for a rank outside of the world.
        """
        rank = integer("rank", rank, 0, self.world - 1)
        return tuple(next(part for part in parts if rank in part.ranks) for parts in self.micro_batches)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Those with documents, in order."""
        return tuple(part for parts in self.micro_batches for part in parts if part.documents)

    @cached_property
    def finish(self) -> NDArray[Any]:
        """Seconds after which each rank is done, ``[world]``, if a group starts a part once its last member is free,
        and no group waits for another."""
        free = np.zeros(self.world)
        for part in self.parts:
            members = slice(part.ranks.start, part.ranks.stop)
            free[members] = free[members].max() + part.seconds
        return free

    @property
    def seconds(self) -> float:
        """What the batch takes the slowest rank, estimated."""
        return float(self.finish.max())

    @property
    def idle(self) -> float:
        """The part of all ranks' time that they wait: for members of their groups, and for the slowest at the end."""
        busy = sum(len(part.ranks) * part.seconds for part in self.parts)
        return max(1 - busy / (self.world * self.seconds), 0.0) if self.seconds else 0.0

    def describe(self) -> str:
        """What each micro-batch computes, on groups of which sizes."""
        documents, tokens = sum(len(p.documents) for p in self.parts), sum(p.seqlen for p in self.parts)
        first = (
            f"{_counted(documents, 'document')} of {_counted(tokens, 'token')} over {_counted(self.world, 'rank')} in "
            f"{_counted(len(self.micro_batches), 'micro-batch', 'es')}: {self.seconds:.4g} s an attention call, "
            f"{self.idle:.1%} of it idle (estimates)"
        )
        return "\n".join([first, *(f"    {n}: {_by_size(parts)}" for n, parts in enumerate(self.micro_batches))])

    __str__ = describe


def _by_size(parts: tuple[Part, ...]) -> str:
    """One size of group after the other, the largest first."""
    words, busy = [], [part for part in parts if part.documents]
    for size in sorted({len(part.ranks) for part in busy}, reverse=True):
        groups = [part for part in busy if len(part.ranks) == size]
        documents, most = sum(len(g.documents) for g in groups), max(-(-g.seqlen // size) for g in groups)
        words.append(
            f"{len(groups)} x {_counted(size, 'rank')} ({_counted(documents, 'document')}, at most "
            f"{_counted(most, 'token')} a rank)"
        )
    idle = sum(len(part.ranks) for part in parts if not part.documents)
    return ", ".join(words + ([f"{_counted(idle, 'rank')} idle"] if idle else []))


def _counted(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"
