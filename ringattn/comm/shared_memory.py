"""The transport between processes of one machine: memory they share instead of gloo's sockets, which copy every
byte twice through the kernel on the very cores that compute."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.board import GroupBoard
from ringattn.comm.connection import Connection
from ringattn.comm.handshake import connect
from ringattn.comm.label import Label
from ringattn.comm.process_group import ProcessGroupTransport
from ringattn.comm.shared_block import SharedBlock
from ringattn.comm.transport import Done, Parcels, Pending, Transport, by_peer, check_batch, check_device, in_vain

# Seconds that a rank waits without sleep where it has a core for itself: ranks that share their work evenly wait for a
# few milliseconds, and a core that slept takes as long to be as fast as before.
AWAKE = 0.02


def transport_over(group: dist.ProcessGroup, timeout: float, communicators: int = 0) -> Transport:
    """Shared memory where the group moves CPU tensors only and all its ranks run on one Linux machine, else the
    group's own engine. Collective; takes and raises what `ProcessGroupTransport` does."""
    engine = ProcessGroupTransport(group, timeout, communicators)
    if engine.devices == {"cpu"} and engine.world_size > 1 and engine.same_everywhere(machine()):
        return SharedMemoryTransport(engine) if machine() else engine
    return engine


def machine() -> str:
    """What processes have in common that reach each other's Unix sockets: the kernel and the network namespace."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    try:
        return f"{boot.read_text().strip()} {namespace.readlink()}" if hasattr(os, "memfd_create") else ""
    except OSError:
        return ""


class SharedMemoryTransport:
    """Moves CPU tensors between the ranks of `store`, which are processes of one Linux machine.

    Construction is collective. A message out of memory of `allocate` is copied once: its receiver has mapped that
    memory, and takes the message when it posts the receive, or waits for it. Any other tensor is copied when its send
    is posted, and again by the receiver. `wait()` returns only when the peers have taken what is not copied before, and
    all that earlier batches sent: no rank runs ahead, and two arenas a peer are enough. A dead peer shows at once, by
    its closed socket (or at the deadline, while a forked child of it lives on). Outside of calls, where messages have
    no labels, a missed deadline closes the connection with the silent peer for good.

    Args:
        engine: the transport of the same group through which the ranks agree; it ends with that group.

    Raises:
        PeerError: a rank did not come within the deadline.
    """

    blind = frozenset[str]()

    def __init__(self, engine: ProcessGroupTransport) -> None:
        self.rank, self.world_size = engine.rank, engine.world_size
        self.name, self.timeout, self.log = engine.name, engine.timeout, engine.log
        self._board = engine.board
        self._peers = {rank: Connection(found, self.log) for rank, found in connect(engine).items()}
        self.awake = AWAKE if _a_core_each() else 0.0
        engine.at_end(self._peers.clear)

    @property
    def board(self) -> GroupBoard:
        """See `Voters`."""
        return self._board

    def check_open(self) -> None:
        """See `Transport`."""
        self._board.check_open()

    def allocate(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Allocator`. Raises OSError where there is no memory left to share, or no file handle."""
        if device.type != "cpu":  # its messages are refused
            return torch.empty(size, dtype=dtype, device=device)
        return SharedBlock.make(size, dtype)

    def post(self, sends: Parcels, recvs: Parcels, what: str) -> Pending:
        """See `Transport`. Raises ValueError for tensors that are not in the CPU's memory."""
        check_batch(self, sends, recvs)
        for tensor, _ in (*sends, *recvs):
            check_device(tensor, {"cpu"}, self.name, what)
        self.check_open()
        self.log.check()
        out, back, label = by_peer(sends), by_peer(recvs), self.log.label(what)
        debts = []
        for rank in sorted(out.keys() | back.keys()):
            peer = self._peers[rank]
            answers = peer.send(out.get(rank, []), label)
            tensors = peer.expect(back[rank], label) if rank in back else 0
            debts.append(_Debt(rank, peer, tensors, answers if rank in out else 0, rank in out))
        who = f"{what}: rank {self.rank} of group '{self.name}'"
        return _Batch(who, self, label, debts, list(self._peers.values())) if debts else Done()

    def warn(self, label: Label) -> None:
        """See `Transport`."""
        for peer in self._peers.values():
            peer.warn(label)

    def heed(self, among: Collection[int] | None = None) -> None:
        """See `Transport`."""
        _serve([peer for peer in self._peers.values() if peer.why is None], 0.0)
        self.log.check()
        gone = {rank: peer.why for rank, peer in self._peers.items() if peer.why is not None}
        gone = {rank: why for rank, why in gone.items() if among is None or rank in among}
        if gone:
            raise in_vain(f"rank {self.rank} of group '{self.name}'", time.monotonic(), self.timeout, gone)


@dataclass(slots=True)
class _Debt:
    """What a peer owes one batch: that it has sent `tensors` in all and answered `answers` notes in all. `sends` says
    whether the batch sends to it, `failed` why it failed the batch."""

    rank: int
    peer: Connection
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
    transport: SharedMemoryTransport
    label: Label
    debts: list[_Debt]
    peers: list[Connection]

    def wait(self) -> None:
        """See `Pending`."""
        start, timeout, log = time.monotonic(), self.transport.timeout, self.transport.log
        while owing := [debt for debt in self.debts if not debt.settle()]:
            log.check()
            strangers = [debt.peer.stranger for debt in owing]
            strangers += [peer.of_another_call(self.label) for peer in self.peers]
            for stranger in strangers:
                if stranger is not None:
                    raise log.mismatch(self.label, stranger)
            left = start + timeout - time.monotonic()
            if left > 0:
                _serve([peer for peer in self.peers if peer.why is None], left, self.transport.awake)
                continue
            for debt in owing:
                debt.failed = f"nothing came within {timeout} s"
                if not self.label.number:
                    debt.peer.close(debt.failed)
            break
        failed = {debt.rank: debt.failed for debt in self.debts if debt.failed}
        if failed:
            log.check()  # it may have said why, before it went
            raise in_vain(self.who, start, timeout, failed)


def _serve(peers: list[Connection], seconds: float, awake: float = 0.0) -> None:
    """Waits until a socket is ready, at first ``awake``, then sends and takes in what can be."""
    poll = select.poll()
    for peer in peers:
        poll.register(peer.socket, select.POLLIN | (select.POLLOUT if peer.outbox else 0))
    until = time.monotonic() + min(awake, seconds)
    while not (ready := poll.poll(0)) and time.monotonic() < until:
        os.sched_yield()  # to whoever else wants this core
    numbers = {number for number, _ in ready or poll.poll(min(1000 * seconds, 1e6))}
    for peer in peers:
        if peer.socket.fileno() in numbers:
            peer.flush()
            peer.read()


def _a_core_each() -> bool:
    """Whether this machine has a core for every rank on it."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or dist.get_world_size())
    return ranks <= len(os.sched_getaffinity(0))
