"""The transport between processes of one machine: memory they share instead of gloo's sockets, which copy every
byte twice through the kernel on the very cores that compute. Two ranks are joined by a Unix socket, over which
only notes pass; a batch's tensors for one peer are copied into an arena that the peer has mapped too. A note is the
number of an arena and the sizes of the tensors in it; the number alone is the answer, that they have been taken."""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import time
import uuid
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.process_group import ProcessGroupTransport
from ringattn.comm.transport import Done, Parcels, Pending, Transport, by_peer, check_batch, check_device, in_vain

TENSORS_OF_A_NOTE = 1000  # notes must fit a socket's buffer
CLOSED = "its connection is closed: the process has ended, dropped its context, or gave up waiting for this rank"


def transport_over(group: dist.ProcessGroup, timeout: float) -> Transport:
    """Shared memory where the group moves CPU tensors only and all its ranks run on one Linux machine, else the
    group's own engine. Collective; raises like `ProcessGroupTransport`."""
    engine = ProcessGroupTransport(group, timeout)
    if engine.devices == {"cpu"} and engine.world_size > 1 and engine.same_everywhere(_machine()):
        return SharedMemoryTransport(engine) if _machine() else engine
    return engine


def _machine() -> str:
    """What processes have in common that reach each other's Unix sockets: the kernel and the network namespace."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    try:
        return f"{boot.read_text().strip()} {namespace.readlink()}" if hasattr(os, "memfd_create") else ""
    except OSError:
        return ""


class SharedMemoryTransport:
    """Moves CPU tensors between the ranks of `store`, which are processes of one Linux machine.

    Construction is collective. Sends are taken out of their tensors when they are posted; receives are filled in
    `wait()`, which returns only when the peers have taken what earlier batches sent them: no rank runs ahead, and
    two arenas a peer are enough. A dead peer shows at once, by its closed socket (or at the deadline, while a forked
    child of it lives on), and a missed deadline closes the connection with the silent peer for good.

    Args:
        store: the transport through which the ranks agree; rank, name and timeout are taken from it.

    Raises:
        PeerError: a rank did not come within the deadline.
    """

    def __init__(self, store: Transport) -> None:
        self.rank, self.world_size = store.rank, store.world_size
        self.name, self.timeout, self.calls = store.name, store.timeout, store.calls
        self.publish, self.lookup, self.count = store.publish, store.lookup, store.count
        self.await_key, self.forget = store.await_key, store.forget
        self._peers = self._connect()

    def _connect(self) -> dict[int, _Peer]:
        """Every rank calls the ranks before it and is called by those behind it."""
        start, peers = time.monotonic(), dict[int, _Peer]()
        address = f"\0ringattn-{uuid.uuid4().hex}"  # abstract: leaves nothing in any folder
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(address)
            listener.listen(self.world_size)
            self.publish(f"socket {self.rank}", address[1:])
            missing = [0]
            try:
                for rank in range(self.rank):
                    missing = [rank]
                    peers[rank] = _Peer(self._call(rank, start))
                while missing := [r for r in range(self.rank + 1, self.world_size) if r not in peers]:
                    listener.settimeout(self._left(start))
                    caller, _ = listener.accept()
                    caller.settimeout(self._left(start))
                    rank = int(caller.recv(16) or -1)  # -1: it called, and died
                    peers[rank] = _Peer(caller)
            except OSError as error:
                reasons = dict.fromkeys(missing, str(error))
                raise in_vain(self._who("connecting"), start, self.timeout, reasons) from error
        return peers

    def _call(self, rank: int, start: float) -> socket.socket:
        if not self.await_key(f"socket {rank}", self._left(start)):
            raise TimeoutError("it has published no socket")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(self._left(start))
        connection.connect(f"\0{self.lookup(f'socket {rank}')}")
        connection.send(str(self.rank).encode())
        return connection

    def _left(self, start: float) -> float:
        return max(start + self.timeout - time.monotonic(), 0.001)

    def _who(self, what: str) -> str:
        return f"{what}: rank {self.rank} of group '{self.name}'"

    def post(self, sends: Parcels, recvs: Parcels, what: str) -> Pending:
        """See `Transport`. Raises ValueError for tensors that are not in the CPU's memory."""
        check_batch(self, sends, recvs)
        for tensor, _ in (*sends, *recvs):
            check_device(tensor, {"cpu"}, self.name, what)
        out, back = by_peer(sends), by_peer(recvs)
        debts = []
        for rank in sorted(out.keys() | back.keys()):
            peer = self._peers[rank]
            answers = peer.sent if rank in out else 0
            peer.send(out.get(rank, []))
            tensors = peer.expect(back[rank]) if rank in back else 0
            debts.append(_Debt(rank, peer, tensors, answers, rank in out))
        return _Batch(self._who(what), self.timeout, debts, list(self._peers.values())) if debts else Done()


@dataclass(slots=True)
class _Debt:
    """What a peer owes one batch: that it has sent `tensors` in all and answered `answers` notes in all. `sends` says
    whether the batch sends to it, `failed` why it failed the batch."""

    rank: int
    peer: _Peer
    tensors: int
    answers: int
    sends: bool
    failed: str | None = None

    def settle(self) -> bool:
        """Whether nothing is owed any more, or what is owed can no longer come."""
        lacking = self.peer.received < self.tensors
        if self.peer.why is None:
            return not (lacking or self.peer.outbox or self.peer.answered < self.answers)
        if lacking or (self.sends and self.peer.undelivered):
            self.failed = self.failed or self.peer.why
        return True


@dataclass(slots=True)
class _Batch:
    """One batch under way, and all peers of the rank: while it waits it serves them all."""

    who: str
    timeout: float
    debts: list[_Debt]
    peers: list[_Peer]

    def wait(self) -> None:
        """See `Pending`."""
        start = time.monotonic()
        while owing := [debt for debt in self.debts if not debt.settle()]:
            left = start + self.timeout - time.monotonic()
            if left > 0:
                _serve([peer for peer in self.peers if peer.why is None], left)
                continue
            for debt in owing:
                debt.failed = f"nothing came within {self.timeout} s"
                debt.peer.close(debt.failed)
        failed = {debt.rank: debt.failed for debt in self.debts if debt.failed}
        if failed:
            raise in_vain(self.who, start, self.timeout, failed)


def _serve(peers: list[_Peer], seconds: float) -> None:
    """Waits until a socket is ready, then sends and takes in what can be."""
    poll = select.poll()
    for peer in peers:
        poll.register(peer.socket, select.POLLIN | (select.POLLOUT if peer.outbox else 0))
    ready = {number for number, _ in poll.poll(min(1000 * seconds, 1e6))}
    for peer in peers:
        if peer.socket.fileno() in ready:
            peer.flush()
            peer.read()


@dataclass(slots=True)
class _Arena:
    """Memory of the sender that its peer has mapped; `busy` until the peer has answered."""

    memory: Tensor
    busy: bool = False


class _Peer:
    """The connection with one peer. Counts since its beginning: notes `sent` to it and of those `answered`, tensors
    `received`. `why` says why it is closed, and `undelivered` that tensors for it were then lost; `outbox` holds notes
    that its socket has no room for, with the handle of an arena that the peer has yet to map."""

    def __init__(self, connection: socket.socket) -> None:
        self.sent = self.answered = self.received = 0
        self.why: str | None = None
        self.undelivered = False
        self.socket = connection
        self.outbox: deque[tuple[bytes, int | None]] = deque()
        self._arenas: list[_Arena] = []
        self._mapped: dict[int, Tensor] = {}
        self._arrived: deque[tuple[Tensor, int | None]] = deque()  # and the arena of which it is the last
        self._expected: deque[Tensor] = deque()
        connection.setblocking(False)

    def close(self, why: str) -> None:
        """Nothing more goes to this peer or comes from it, but for what has arrived."""
        if self.why is None:
            self.why = why
            while self.outbox:
                note, handle = self.outbox.popleft()
                self.undelivered |= len(note) > len(_note(0))  # more than an answer
                if handle is not None:
                    os.close(handle)
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)  # also for children that have inherited it
            self.socket.close()

    def __del__(self) -> None:
        self.close("dropped")

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Copies tensors into arenas and tells the peer."""
        self.read()  # answers free arenas
        for first in range(0, len(tensors), TENSORS_OF_A_NOTE):
            part = tensors[first : first + TENSORS_OF_A_NOTE]
            if self.why is not None:
                self.undelivered = True
                return
            offsets, total = _offsets([tensor.nbytes for tensor in part])
            number, handle = self._free_arena(total)
            arena = self._arenas[number]
            for tensor, offset in zip(part, offsets, strict=True):
                arena.memory[offset : offset + tensor.nbytes].copy_(_bytes(tensor))
            arena.busy = True
            self.sent += 1
            self.outbox.append((_note(number, *(tensor.nbytes for tensor in part)), handle))
            self.flush()

    def flush(self) -> None:
        """Sends the notes for which the socket has room."""
        while self.outbox and self.why is None:
            note, handle = self.outbox[0]
            attached = [] if handle is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", handle))]
            try:
                self.socket.sendmsg([note], attached)
            except BlockingIOError:
                return
            except OSError:  # gone, but what it sent before may still lie here
                self.read()
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

    def expect(self, tensors: Sequence[Tensor]) -> int:
        """Queues tensors to be filled; how many will then have been received in all."""
        self._expected += tensors
        last = self.received + len(self._expected)
        self._deliver()
        return last

    def read(self) -> None:
        """Takes in all notes that have come."""
        while self.why is None:
            try:
                # not recv_fds, which drops its flags
                note, attached, flags, _ = self.socket.recvmsg(8 + 8 * TENSORS_OF_A_NOTE, socket.CMSG_LEN(4))
            except BlockingIOError:
                return
            except ConnectionResetError:  # it has left something unread; what it sent is still to come
                continue
            if not note:
                self.close(CLOSED)
                return
            number, *sizes = struct.unpack(f"<{len(note) // 8}q", note)
            if not sizes:
                self._arenas[number].busy = False
                self.answered += 1
                continue
            offsets, total = _offsets(sizes)
            try:
                self._remember(number, total, attached, flags)
            except OSError as error:
                self.close(f"its memory could not be mapped: {error}")
                return
            parts = [self._mapped[number][offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
            self._arrived += [(part, None) for part in parts[:-1]]
            self._arrived.append((parts[-1], number))
            self._deliver()

    def _remember(self, number: int, size: int, attached: list[tuple[int, int, bytes]], flags: int) -> None:
        """Maps an arena whose handle came with a note."""
        if flags & socket.MSG_CTRUNC:
            raise OSError("this process is out of file handles")
        if attached:
            (handle,) = struct.unpack("i", attached[0][2][:4])
            try:
                self._mapped[number] = _map(handle, size)
            finally:
                os.close(handle)

    def _deliver(self) -> None:
        """Fills expected tensors in order, and answers a note when its last tensor is taken."""
        while self._expected and self._arrived:
            expected, (found, last) = self._expected[0], self._arrived[0]
            if expected.nbytes != found.numel():
                self.close(CLOSED)
                self.why = f"it sent {found.numel()} bytes where {expected.nbytes} were expected"  # also if it has left
                self._arrived.clear()
                return
            _bytes(expected).copy_(found)
            self._expected.popleft(), self._arrived.popleft()
            self.received += 1
            if last is not None and self.why is None:
                self.outbox.append((_note(last), None))
                self.flush()


def _note(*numbers: int) -> bytes:
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
