"""The connection with one other process of this machine: a Unix socket for notes, and blocks of memory for tensors.

The receiver maps the sender's blocks. A tensor that lies in one (a buffer of a workspace) is sent as it lies, any other
is copied into an arena, a block of this connection. A note says in which block tensors lie, where and of which sizes,
with the label of their batch; the block's number alone is the answer, that they have been taken, and a label alone is a
warning.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from typing import NamedTuple
from weakref import WeakSet, ref

import torch
from torch import Tensor

from ringattn.comm.calls import TORN, CallLog, PeerError
from ringattn.comm.ends import whole
from ringattn.comm.label import LABEL_BYTES, Label
from ringattn.comm.shared_block import SharedBlock, map_block

TENSORS_OF_A_NOTE = 1000  # notes must fit a socket's buffer
CLOSED = "its connection is closed: the process has ended, dropped its context, or gave up waiting for this rank"
_NO_BLOCK = -1  # in place of a block's number
Piece = tuple[int, int]  # where a tensor begins in a block, and its bytes


@dataclass(slots=True)
class _Given:
    """A block whose handle the peer has, and how many notes about it are yet to be answered."""

    block: ref[SharedBlock]
    unanswered: int = 0


class _Note(NamedTuple):
    """What waits for room in the socket, and the handle of a block that the peer has yet to map."""

    packed: bytes
    handle: int | None = None
    mail: bool = False  # it announces tensors


class _Arrival(NamedTuple):
    """A tensor that has come, and the block of whose note it is the last."""

    memory: Tensor
    last: int | None
    label: Label


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
        self._given: list[_Given] = []
        self._arenas: dict[int, Tensor] = {}
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

    @whole
    def send(self, tensors: Sequence[Tensor], label: Label) -> int:
        """Tells the peer of tensors, and copies those that lie in no block. How many notes the peer must have answered
        in all before these tensors may be written, or more are copied."""
        if self.torn:
            raise PeerError(f"a message of {label.text} on a connection that is {TORN}")
        self.read()  # answers free arenas
        answers = self.sent
        for block, run in groupby(tensors, SharedBlock.of):
            for part in _parts(list(run)):
                if self.why is not None:
                    self.undelivered = True
                    return answers
                number, handle, pieces = self._copied(part) if block is None else self._in_place(block, part)
                self._given[number].unanswered += 1
                self.sent += 1
                packed = _pack(number, len(pieces), *chain.from_iterable(pieces)) + label.pack()
                self.outbox.append(_Note(packed, handle, mail=True))
                self.flush()
                answers = answers if block is None else self.sent
        return answers

    def warn(self, label: Label) -> None:
        """Tells the peer what concerns it without any tensors."""
        if self.torn:  # what waits may have gone already
            self._empty()
        self.outbox.append(_Note(_pack(_NO_BLOCK) + label.pack()))
        self.flush()

    @whole
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

    def _in_place(self, block: SharedBlock, tensors: Sequence[Tensor]) -> tuple[int, int | None, list[Piece]]:
        """The number of their block, its handle if the peer has yet to map it, and where they lie."""
        pieces = [(int(tensor.storage_offset()) * tensor.itemsize, tensor.nbytes) for tensor in tensors]
        return *self._give(block), pieces

    def _copied(self, tensors: Sequence[Tensor]) -> tuple[int, int | None, list[Piece]]:
        """The same of copies of them."""
        pieces, total = _side_by_side([tensor.nbytes for tensor in tensors])
        memory = self._free_arena(total)
        for tensor, (start, size) in zip(tensors, pieces, strict=True):
            memory[start : start + size].copy_(_bytes(tensor))
        block = SharedBlock.of(memory)
        assert block is not None, "an arena is a block"
        number, handle = self._give(block)
        block.seal()
        self._arenas[number] = memory
        return number, handle, pieces

    def _free_arena(self, size: int) -> Tensor:
        """One of which all notes have been answered, or a new one in its place."""
        free = [number for number in self._arenas if not self._given[number].unanswered]
        for number in free:
            if self._arenas[number].numel() >= size:
                return self._arenas[number]
        if free:
            del self._arenas[free[0]]
        return SharedBlock.make(size)

    def _give(self, block: SharedBlock) -> tuple[int, int | None]:
        """The number of a block, and its handle if the peer has yet to map it. It may have been that of one that is
        gone."""
        for number, given in enumerate(self._given):
            if given.block() is block:
                return number, None
        gone = (n for n, given in enumerate(self._given) if given.block() is None and not given.unanswered)
        number = next(gone, len(self._given))
        self._given[number : number + 1] = [_Given(ref(block))]
        assert block.handle is not None, "only an arena is sealed, and this peer has it"
        return number, os.dup(block.handle)

    @whole
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
        return found if found.rivals(label) else None

    @whole
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
            if self.torn and number != _NO_BLOCK:
                continue
            if len(note) == _INTEGER.size:
                self._given[number].unanswered -= 1
                self.answered += 1
            elif number == _NO_BLOCK:
                self._log.hear(Label.unpack(note[_INTEGER.size :]))
            else:
                self._arrive(number, note, attached, flags)

    def _arrive(self, number: int, note: bytes, attached: list[tuple[int, int, bytes]], flags: int) -> None:
        """Takes in a note of tensors in block ``number``."""
        (count,) = _INTEGER.unpack_from(note, _INTEGER.size)
        numbers = struct.unpack_from(f"<{2 * count}q", note, 2 * _INTEGER.size)
        label = Label.unpack(note[(2 + 2 * count) * _INTEGER.size :])
        try:
            self._remember(number, attached, flags)
        except OSError as error:
            if error.errno is None:  # a signal's handler has raised it
                raise
            self.close(f"its memory could not be mapped: {error}")
            return
        if label.epoch < self._epoch:
            self._answer(number)
            return
        memory = self._mapped[number]
        parts = [memory[start : start + size] for start, size in zip(numbers[::2], numbers[1::2], strict=True)]
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

    def _answer(self, block: int | None) -> None:
        if block is not None and self.why is None:
            self.outbox.append(_Note(_pack(block)))
            self.flush()

    def _remember(self, number: int, attached: list[tuple[int, int, bytes]], flags: int) -> None:
        """Maps a block whose handle came with a note."""
        if flags & socket.MSG_CTRUNC:
            raise OSError(errno.EMFILE, "this process is out of file handles")
        if attached:
            (handle,) = struct.unpack("i", attached[0][2][:4])
            try:
                self._mapped[number] = map_block(handle)
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
_LONGEST_NOTE = _INTEGER.size * (2 + 2 * TENSORS_OF_A_NOTE) + LABEL_BYTES


def _pack(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


def _parts(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Those of one note each."""
    return [tensors[first : first + TENSORS_OF_A_NOTE] for first in range(0, len(tensors), TENSORS_OF_A_NOTE)]


def _side_by_side(sizes: Sequence[int]) -> tuple[list[Piece], int]:
    """Where tensors of these sizes lie in an arena, each from a cache line on, and where the last one ends."""
    *starts, total = accumulate((-(-size // 64) * 64 for size in sizes), initial=0)
    return list(zip(starts, sizes, strict=True)), total


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
