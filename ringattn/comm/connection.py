"""The connection with one other process of this machine: a Unix socket for notes, and arenas for tensors.

An arena is memory of the sender that the receiver has mapped too. A note says which arena holds tensors and of which
sizes, with the label of their batch; the arena's number alone is the answer, that they have been taken, and a label
alone is a warning.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from ringattn.comm.calls import LABEL_BYTES, TORN, CallLog, Label, PeerError

TENSORS_OF_A_NOTE = 1000  # notes must fit a socket's buffer
CLOSED = "its connection is closed: the process has ended, dropped its context, or gave up waiting for this rank"
P = ParamSpec("P")
Result = TypeVar("Result")
_NO_ARENA = -1  # in place of an arena's number


@dataclass(slots=True)
class _Arena:
    """Memory of the sender that its peer has mapped; `busy` until the peer has answered."""

    memory: Tensor
    busy: bool = False


class _Note(NamedTuple):
    """What waits for room in the socket, and the handle of an arena that the peer has yet to map."""

    packed: bytes
    handle: int | None = None
    mail: bool = False  # it announces tensors


class _Arrival(NamedTuple):
    """A tensor that has come, and the arena of which it is the last."""

    memory: Tensor
    last: int | None
    label: Label


def _whole(step: Callable[Concatenate[Connection, P], Result]) -> Callable[Concatenate[Connection, P], Result]:
    """A step after which both ends count alike: what is raised in the middle of it (by a signal's handler, at any
    place) leaves the connection torn."""

    @wraps(step)
    def watched(self: Connection, *args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return step(self, *args, **kwargs)
        except BaseException:
            self.torn = self._log.torn = True
            raise

    return watched


_open: WeakSet[Connection] = WeakSet()


def _close_inherited() -> None:
    """In a forked child, which would hold the sockets open when its parent dies."""
    for connection in list(_open):
        connection.close("a child's copy")


os.register_at_fork(after_in_child=_close_inherited)


class Connection:
    """Counts since its beginning: notes `sent` and of those `answered`, tensors `received`. `why` says why it is
    closed, and `undelivered` that tensors for the peer were then lost; `torn`: the ends do not count alike any more, so
    that only warnings are sent and taken in; `stranger` is the label of a message of another call than the one that was
    expected."""

    def __init__(self, connection: socket.socket, log: CallLog) -> None:
        self.sent = self.answered = self.received = 0
        self.torn = False
        self.why: str | None = None
        self.undelivered = False
        self.stranger: Label | None = None
        self.socket = connection
        self.outbox: deque[_Note] = deque()
        self._log, self._epoch = log, log.epoch
        self._arenas: list[_Arena] = []
        self._mapped: dict[int, Tensor] = {}
        self._arrived: deque[_Arrival] = deque()
        self._expected: deque[tuple[Tensor, Label]] = deque()
        connection.setblocking(False)
        _open.add(self)

    def close(self, why: str) -> None:
        """Nothing more goes to this peer or comes from it, but for what has arrived."""
        if self.why is None:
            self.why = why
            self.undelivered |= any(note.mail for note in self.outbox)
            self._empty()
            with suppress(OSError):
                if not self._log.in_child:
                    self.socket.shutdown(socket.SHUT_RDWR)  # also for children that have inherited it
            self.socket.close()

    def __del__(self) -> None:
        self.close("dropped")

    def _empty(self) -> None:
        while self.outbox:
            note = self.outbox.popleft()
            if note.handle is not None:
                os.close(note.handle)

    @_whole
    def send(self, tensors: Sequence[Tensor], label: Label) -> None:
        """Copies tensors into arenas and tells the peer."""
        if self.torn:
            raise PeerError(f"a message of {label.text} on a connection that is {TORN}")
        self.read()  # answers free arenas
        packed = label.pack()
        for first in range(0, len(tensors), TENSORS_OF_A_NOTE):
            part = tensors[first : first + TENSORS_OF_A_NOTE]
            if self.why is not None:
                self.undelivered = True
                return
            sizes = [tensor.nbytes for tensor in part]
            offsets, total = _offsets(sizes)
            number, handle = self._free_arena(total)
            arena = self._arenas[number]
            for tensor, offset in zip(part, offsets, strict=True):
                arena.memory[offset : offset + tensor.nbytes].copy_(_bytes(tensor))
            arena.busy = True
            self.sent += 1
            self.outbox.append(_Note(_pack(number, len(part), *sizes) + packed, handle, mail=True))
            self.flush()

    def warn(self, label: Label) -> None:
        """Tells the peer what concerns it without any tensors."""
        if self.torn:  # what waits may have gone already
            self._empty()
        self.outbox.append(_Note(_pack(_NO_ARENA) + label.pack()))
        self.flush()

    @_whole
    def flush(self) -> None:
        """Sends the notes for which the socket has room."""
        while self.outbox and self.why is None:
            packed, handle, _ = self.outbox[0]
            attached = [] if handle is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", handle))]
            try:
                self.socket.sendmsg([packed], attached)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno is None:  # a signal's handler has raised it
                    raise
                self.read()  # gone, but what it sent before may still lie here
                self.close(CLOSED)
                return
            self.outbox.popleft()
            if handle is not None:
                os.close(handle)

    def _free_arena(self, size: int) -> tuple[int, int | None]:
        """The number of an arena that is not in use, and the handle of its memory if the peer has yet to map it."""
        free = [number for number, arena in enumerate(self._arenas) if not arena.busy]
        for number in free:
            if self._arenas[number].memory.numel() >= size:
                return number, None
        handle = os.memfd_create("ringattn")  # freed with its last user, whatever becomes of the processes
        try:
            os.ftruncate(handle, size)
            arena = _Arena(_map(handle, size))
        except OSError:
            os.close(handle)
            raise
        if not free:
            self._arenas.append(arena)
            return len(self._arenas) - 1, handle
        self._arenas[free[0]] = arena
        return free[0], handle

    @_whole
    def expect(self, tensors: Sequence[Tensor], label: Label) -> int:
        """Queues tensors to be filled; how many will then have been received in all."""
        self._leave_old_epochs()
        self._expected += [(tensor, label) for tensor in tensors]
        last = self.received + len(self._expected)
        self._deliver()
        return last

    def of_another_call(self, label: Label) -> Label | None:
        """The label of what has come first, where it is of another call of the same number, whether or not this rank
        expects anything of the peer."""
        found = self._arrived[0].label if self._arrived else label
        return found if found[:2] == label[:2] and found.chain != label.chain else None

    @_whole
    def read(self) -> None:
        """Takes in all notes that have come."""
        self._leave_old_epochs()
        while self.why is None:
            try:
                # not recv_fds, which drops its flags
                note, attached, flags, _ = self.socket.recvmsg(_LONGEST_NOTE, socket.CMSG_LEN(4))
            except BlockingIOError:
                return
            except ConnectionResetError:  # it has left something unread; what it sent is still to come
                continue
            if not note:
                self.close(CLOSED)
                return
            (number,) = _INTEGER.unpack_from(note)
            if self.torn and number != _NO_ARENA:
                continue
            if len(note) == _INTEGER.size:
                self._arenas[number].busy = False
                self.answered += 1
            elif number == _NO_ARENA:
                self._log.hear(Label.unpack(note[_INTEGER.size :]))
            else:
                self._arrive(number, note, attached, flags)

    def _arrive(self, number: int, note: bytes, attached: list[tuple[int, int, bytes]], flags: int) -> None:
        """Takes in a note of tensors in arena ``number``."""
        (count,) = _INTEGER.unpack_from(note, _INTEGER.size)
        sizes = struct.unpack_from(f"<{count}q", note, 2 * _INTEGER.size)
        label = Label.unpack(note[(2 + count) * _INTEGER.size :])
        offsets, total = _offsets(sizes)
        try:
            self._remember(number, total, attached, flags)
        except OSError as error:
            if error.errno is None:  # a signal's handler has raised it
                raise
            self.close(f"its memory could not be mapped: {error}")
            return
        if label.epoch < self._epoch:
            self._answer(number)
            return
        memory = self._mapped[number]
        parts = [memory[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
        lasts = [None] * (count - 1) + [number]
        self._arrived += [_Arrival(part, last, label) for part, last in zip(parts, lasts, strict=True)]
        self._deliver()

    def _leave_old_epochs(self) -> None:
        """Forgets what belongs to calls that have failed."""
        if self._epoch == self._log.epoch:
            return
        self._epoch, self.stranger = self._log.epoch, None
        self._expected.clear()
        while self._arrived and self._arrived[0].label.epoch < self._epoch:
            self._answer(self._arrived.popleft().last)

    def _answer(self, arena: int | None) -> None:
        if arena is not None and self.why is None:
            self.outbox.append(_Note(_pack(arena)))
            self.flush()

    def _remember(self, number: int, size: int, attached: list[tuple[int, int, bytes]], flags: int) -> None:
        """Maps an arena whose handle came with a note."""
        if flags & socket.MSG_CTRUNC:
            raise OSError(errno.EMFILE, "this process is out of file handles")
        if attached:
            (handle,) = struct.unpack("i", attached[0][2][:4])
            try:
                self._mapped[number] = _map(handle, size)
            finally:
                os.close(handle)

    def _deliver(self) -> None:
        """Fills expected tensors in order, and answers a note when its last tensor is taken."""
        while self._expected and self._arrived:
            (expected, label), found = self._expected[0], self._arrived[0]
            if not label.fits(found.label):
                self.stranger = found.label
                return
            if expected.nbytes != found.memory.numel():
                self.close(CLOSED)
                # also if it has left
                self.why = f"it sent {found.memory.numel()} bytes where {expected.nbytes} were expected"
                self._arrived.clear()
                return
            _bytes(expected).copy_(found.memory)
            self._expected.popleft(), self._arrived.popleft()
            self.received += 1
            self._answer(found.last)


_INTEGER = struct.Struct("<q")
_LONGEST_NOTE = _INTEGER.size * (2 + TENSORS_OF_A_NOTE) + LABEL_BYTES


def _pack(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


def _offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where tensors of these sizes begin in an arena, each on a cache line, and where the last one ends."""
    *offsets, total = accumulate((-(-size // 64) * 64 for size in sizes), initial=0)
    return offsets, total


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _map(handle: int, size: int) -> Tensor:
    with torch.inference_mode(False):  # later calls that train use it too
        return torch.frombuffer(mmap.mmap(handle, size), dtype=torch.uint8)
