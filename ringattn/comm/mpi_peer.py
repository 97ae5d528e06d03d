"""What goes between this rank and another one of an MPI communicator.

The tensors of a batch are sent as they lie, all under one tag, behind a note with their label and sizes. A receiver
asks MPI for tensors only when it has their note, and in the order of notes: MPI keeps the order of messages of one
sender and tag, so the n-th that is asked for is the n-th that was announced, and none ever fills the tensor of another
call.
What an epoch that failed has announced is received too, and dropped, so that no sender keeps it for ever.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

import torch
from mpi4py import MPI
from torch import Tensor

from ringattn.comm.calls import TORN, CallLog, PeerError
from ringattn.comm.ends import whole
from ringattn.comm.label import Kind, Label

NOTES, TENSORS = 0, 1  # tags
_INTEGER = struct.Struct("<q")


@dataclass(slots=True, eq=False)
class Held:
    """Memory that MPI reads or writes, for as long as its ``requests`` are not over."""

    memory: Sequence[Any]
    requests: list[MPI.Request] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Debt:
    """What a batch has under way with one peer. Of its receives, ``lacking`` are not announced yet; ``failed`` says why
    they, or what MPI was asked for, will not come to an end."""

    peer: MPIPeer
    held: Held
    lacking: int = 0
    failed: str | None = None

    def settle(self) -> bool:
        """Whether nothing is under way any more, or what is cannot come to an end."""
        over = not self.lacking and self.peer.over(self.held)
        if not over and self.peer.why is not None:
            self.failed = self.failed or self.peer.why
        return over or self.failed is not None


class _Expected(NamedTuple):
    """A tensor to be filled."""

    tensor: Tensor
    label: Label
    debt: Debt


class _Announced(NamedTuple):
    """The size of a tensor whose note has come, and its label."""

    size: int
    label: Label


class MPIPeer:
    """One peer. ``why`` says why no more goes to it, or comes from it but for what it has announced; ``torn``: the ends
    do not count alike any more, so that only warnings are sent and taken in; ``stranger`` is the label of a message of
    another call than the one that was expected."""

    def __init__(self, comm: MPI.Comm, rank: int, log: CallLog) -> None:
        self.rank = rank
        self.why: str | None = None
        self.torn = False
        self.stranger: Label | None = None
        self._comm, self._log, self._epoch = comm, log, log.epoch
        self._expected: deque[_Expected] = deque()
        self._announced: deque[_Announced] = deque()
        self.held: list[Held] = []  # notes, and what is dropped

    def close(self, why: str) -> None:
        """No more is sent to this peer, or hoped for from it; the first reason counts."""
        self.why = self.why or why

    @whole
    def send(self, tensors: Sequence[Tensor], label: Label, debt: Debt) -> None:
        """Sends tensors, which the debt holds, behind their note."""
        if self.why is None:
            if self.torn:
                raise PeerError(f"a message of {label.text} on a connection that is {TORN}")
            self._note(label, [tensor.nbytes for tensor in tensors])
            self._start(self._comm.Isend, [_memory(tensor) for tensor in tensors], TENSORS, debt.held.requests)
        debt.failed = self.why

    @whole
    def expect(self, tensors: Sequence[Tensor], label: Label, debt: Debt) -> None:
        """Queues tensors to be filled."""
        debt.lacking += len(tensors)
        self._expected += [_Expected(tensor, label, debt) for tensor in tensors]
        self._ask()

    def warn(self, label: Label) -> None:
        """Tells the peer what concerns it without any tensors."""
        self._note(label, [])

    @whole
    def take(self, note: bytes) -> None:
        """Takes in a note."""
        (count,) = _INTEGER.unpack_from(note)
        label = Label.unpack(note[(1 + count) * _INTEGER.size :])
        if label.kind is not Kind.TENSORS:
            self._log.hear(label)
        elif not self.torn:
            sizes = struct.unpack_from(f"<{count}q", note, _INTEGER.size)
            self._announced += [_Announced(size, label) for size in sizes]
            self._drop_old()
            self._ask()

    def of_another_call(self, label: Label) -> Label | None:
        """The label of what was announced first, where it is of another call of the same number, whether or not this
        rank expects anything of the peer."""
        found = self._announced[0].label if self._announced else label
        return found if found.rivals(label) else None

    @whole
    def leave_old_epochs(self) -> None:
        """Forgets what belongs to calls that have failed."""
        self._epoch, self.stranger = self._log.epoch, None
        self._expected.clear()
        self._drop_old()

    def over(self, held: Held) -> bool:
        """Whether MPI has done all that was asked."""
        try:
            return MPI.Request.Testall(held.requests)
        except MPI.Exception as error:
            self.close(f"MPI says: {error}")
            return False

    def _ask(self) -> None:
        """Asks MPI for the expected tensors that are announced."""
        while self._expected and self._announced and not self.torn:
            (tensor, label, debt), found = self._expected[0], self._announced[0]
            if not label.fits(found.label):
                self.stranger = found.label
                return
            if tensor.nbytes != found.size:
                self.close(f"it sent {found.size} bytes where {tensor.nbytes} were expected")
                self.torn = True
                return
            self._expected.popleft(), self._announced.popleft()
            self._start(self._comm.Irecv, [_memory(tensor)], TENSORS, debt.held.requests)
            debt.lacking -= 1

    def _drop_old(self) -> None:
        while self._announced and self._announced[0].label.epoch < self._epoch:
            size = self._announced.popleft().size
            scratch = torch.empty(size, dtype=torch.uint8, device="cpu")
            self._keep(self._comm.Irecv, scratch, _memory(scratch), TENSORS)

    def _note(self, label: Label, sizes: list[int]) -> None:
        packed = bytearray(struct.pack(f"<{1 + len(sizes)}q", len(sizes), *sizes) + label.pack())
        self._keep(self._comm.Isend, packed, packed, NOTES)

    def _keep(self, move: Callable[..., MPI.Request], owner: Any, buffer: Any, tag: int) -> None:
        """Starts what no batch waits for."""
        self.held[:] = [held for held in self.held if not self.over(held)]
        self.held.append(Held([owner]))
        self._start(move, [buffer], tag, self.held[-1].requests)

    def _start(self, move: Callable[..., MPI.Request], buffers: list[Any], tag: int, into: list[MPI.Request]) -> None:
        try:
            # One step for Python, which no signal's handler comes between: what is started is kept.
            into.extend(map(move, buffers, repeat(self.rank), repeat(tag)))
        except MPI.Exception as error:
            self.close(f"MPI says: {error}")


def _memory(tensor: Tensor) -> MPI.buffer:
    """A contiguous tensor as MPI sees it: bytes where they lie, of whatever dtype, on whatever device."""
    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)
