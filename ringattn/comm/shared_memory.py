"""The transport between processes of one machine: memory they share instead of gloo's sockets, which copy every
byte twice through the kernel on the very cores that compute. Two ranks are joined by a Unix socket, over which
only notes pass; a batch's tensors for one peer are copied into an arena that the peer has mapped too."""

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
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.process_group import ProcessGroupTransport
from ringattn.comm.transport import Done, Parcels, Pending, Transport, check_batch, in_vain

LARGEST_NOTE = 1 << 17  # bytes: 16,000 tensors of one batch for one peer
CLOSED = "its connection is closed: the process has ended or dropped its context"


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
    two arenas a peer are enough. A dead peer shows at once, by its closed socket, and a missed deadline closes the
    connection with the silent peer for good.

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
            try:
                for rank in range(self.rank):
                    peers[rank] = _Peer(self._call(rank, start))
                while len(peers) < self.world_size - 1:
                    listener.settimeout(self._left(start))
                    caller, _ = listener.accept()
                    caller.settimeout(self._left(start))
                    peers[int(caller.recv(16))] = _Peer(caller)
            except (OSError, ValueError) as error:
                missing = {r: str(error) for r in range(self.world_size) if r != self.rank and r not in peers}
                raise in_vain(self._who("connecting"), start, self.timeout, missing) from error
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
            if tensor.device.type != "cpu":
                raise ValueError(
                    f"{what}: the tensors are on '{tensor.device.type}', but group '{self.name}' moves tensors on "
                    "['cpu'] only; start it with init_process_group('cpu:gloo,cuda:nccl'), or use "
                    "ringattn.Loopback for ranks on one GPU"
                )
        debts = []
        for rank in sorted({rank for _, rank in (*sends, *recvs)}):
            peer = self._peers[rank]
            answers = peer.sent
            lost = peer.send([tensor for tensor, to in sends if to == rank and tensor.numel()])
            tensors = peer.expect([tensor for tensor, source in recvs if source == rank and tensor.numel()])
            debts.append(_Debt(rank, peer, tensors, answers, lost))
        return _Batch(self._who(what), self.timeout, debts) if debts else Done()


@dataclass(slots=True)
class _Debt:
    """What a peer owes one batch: that it has sent `tensors` in all and answered `answers` notes in all. `failed`
    says why it never will."""

    rank: int
    peer: _Peer
    tensors: int
    answers: int
    failed: str | None

    def open(self) -> bool:
        """Whether something is owed that may still come."""
        if self.peer.why is None:
            return self.peer.received < self.tensors or self.peer.answered < self.answers
        if self.peer.received < self.tensors:
            self.failed = self.failed or self.peer.why
        return False


@dataclass(slots=True)
class _Batch:
    """One batch under way."""

    who: str
    timeout: float
    debts: list[_Debt]

    def wait(self) -> None:
        """See `Pending`."""
        start = time.monotonic()
        while owing := [debt for debt in self.debts if debt.open()]:
            left = start + self.timeout - time.monotonic()
            if left > 0:
                poll = select.poll()
                peers = {debt.peer.listen(poll): debt.peer for debt in owing}
                for number, _ in poll.poll(1000 * left):
                    peers[number].read()
                continue
            for debt in owing:
                debt.failed = f"nothing came within {self.timeout} s"
                debt.peer.close(debt.failed)
        failed = {debt.rank: debt.failed for debt in self.debts if debt.failed}
        if failed:
            raise in_vain(self.who, start, self.timeout, failed)


@dataclass(slots=True)
class _Arena:
    """Memory of the sender that its peer has mapped; `busy` until the peer has answered."""

    memory: Tensor
    busy: bool = False


class _Peer:
    """The connection with one peer. Counts since its beginning: notes `sent` to it and of those `answered`, tensors
    `received`. `why` says why it is closed."""

    def __init__(self, connection: socket.socket) -> None:
        self.sent = self.answered = self.received = 0
        self.why: str | None = None
        self._socket = connection
        self._socket.settimeout(None)
        self._arenas: list[_Arena] = []
        self._mapped: dict[int, Tensor] = {}
        self._arrived: deque[tuple[Tensor, int | None]] = deque()  # and the arena of which it is the last
        self._expected: deque[Tensor] = deque()

    def listen(self, poll: select.poll) -> int:
        """Registers the socket for reading; its number."""
        poll.register(self._socket, select.POLLIN)
        return self._socket.fileno()

    def close(self, why: str) -> None:
        """Nothing more goes to this peer or comes from it."""
        self.why = self.why or why
        self._socket.close()

    def send(self, tensors: Sequence[Tensor]) -> str | None:
        """Copies tensors into an arena and tells the peer; why that failed, or None."""
        if not tensors or self.why:
            return self.why if tensors else None
        sizes = [tensor.nbytes for tensor in tensors]
        number, handle = self._free_arena(_offsets(sizes)[-1])
        memory = self._arenas[number].memory
        for tensor, size, offset in zip(tensors, sizes, _offsets(sizes), strict=False):
            memory[offset : offset + size].copy_(_bytes(tensor))
        note = struct.pack(f"<{1 + len(sizes)}q", number, *sizes)
        assert len(note) <= LARGEST_NOTE, f"{len(sizes)} tensors of one batch for one peer"
        try:
            socket.send_fds(self._socket, [note], [] if handle is None else [handle])
        except OSError:
            self.close(CLOSED)
            return self.why
        finally:
            if handle is not None:
                os.close(handle)
        self._arenas[number].busy = True
        self.sent += 1
        return None

    def _free_arena(self, size: int) -> tuple[int, int | None]:
        """The number of an arena that is not in use, and the handle of its memory if the peer has yet to map it."""
        free = [number for number, arena in enumerate(self._arenas) if not arena.busy]
        for number in free:
            if self._arenas[number].memory.numel() >= size:
                return number, None
        handle = os.memfd_create("ringattn")  # freed with its last user, whatever becomes of the processes
        os.ftruncate(handle, size)
        arena = _Arena(_map(handle, size))
        if not free:
            self._arenas.append(arena)
            return len(self._arenas) - 1, handle
        self._arenas[free[0]] = arena
        return free[0], handle

    def expect(self, tensors: Sequence[Tensor]) -> int:
        """Queues tensors to be filled; how many will then have been received in all."""
        self._expected += tensors
        self._deliver()
        return self.received + len(self._expected)

    def read(self) -> None:
        """Takes in all notes that have come."""
        while self.why is None:
            try:
                # not recv_fds, which drops its flags
                note, attached, _, _ = self._socket.recvmsg(LARGEST_NOTE, socket.CMSG_LEN(4), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                note = b""
            if not note:
                self.close(CLOSED)
                return
            number, *sizes = struct.unpack(f"<{len(note) // 8}q", note)
            if not sizes:
                self._arenas[number].busy = False
                self.answered += 1
                continue
            offsets = _offsets(sizes)
            if attached:
                (handle,) = struct.unpack("i", attached[0][2][:4])
                self._mapped[number] = _map(handle, offsets[-1])
                os.close(handle)
            for i, (size, offset) in enumerate(zip(sizes, offsets, strict=False)):
                last = number if i == len(sizes) - 1 else None
                self._arrived.append((self._mapped[number][offset : offset + size], last))
            self._deliver()

    def _deliver(self) -> None:
        """Fills expected tensors in order, and answers a note when its last tensor is taken."""
        while self._expected and self._arrived and self.why is None:
            expected, (found, last) = self._expected[0], self._arrived[0]
            if expected.nbytes != found.numel():
                self.close(f"it sent {found.numel()} bytes where {expected.nbytes} were expected")
                return
            _bytes(expected).copy_(found)
            self._expected.popleft(), self._arrived.popleft()
            self.received += 1
            if last is not None:
                try:
                    self._socket.send(struct.pack("<q", last))
                except OSError:  # it has sent all it wanted to and is gone; reading tells
                    continue


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Where tensors of these sizes begin in an arena, each on a cache line, and where the last one ends."""
    return list(accumulate((-(-size // 64) * 64 for size in sizes), initial=0))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _map(handle: int, size: int) -> Tensor:
    with torch.inference_mode(False):  # later calls that train use it too
        return torch.frombuffer(mmap.mmap(handle, size), dtype=torch.uint8)
