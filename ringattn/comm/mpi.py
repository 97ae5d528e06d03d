"""The transport over MPI: between the ranks of an mpi4py communicator, over whatever fabric their MPI knows.

MPI moves large messages only while somebody is inside one of its calls, and wakes nobody: who waits here asks again and
again, with a deadline, and takes in whatever has come from anyone. Its one-sided operations and its error handling
differ between implementations, so none of that is used: the ranks' board is a store that rank 0 hosts.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.arguments.values import deadline, shown
from ringattn.comm.board import StoreBoard
from ringattn.comm.calls import CallLog, PeerError
from ringattn.comm.deaths import Deaths, neighbourhood
from ringattn.comm.label import Label
from ringattn.comm.shared_memory import AWAKE, machine
from ringattn.comm.transport import Done, Parcels, Pending, by_peer, check_batch, in_vain

try:
    from mpi4py import MPI

    from ringattn.comm.mpi_peer import NOTES, Debt, Held, MPIPeer
except ImportError as error:
    raise ImportError(
        f"MPITransport wants mpi4py and an MPI library ({error}); pip install 'ringattn[mpi]' brings both, pip install "
        "mpi4py takes the machine's own"
    ) from error

CARD = 2048  # bytes in which a rank introduces itself
PAUSE = 0.05  # seconds between two looks for ranks that have ended


@cache
def _key() -> int:
    """Under which a communicator keeps what must live as long as it does."""
    return MPI.Comm.Create_keyval()


def transport_of(comm: MPI.Intracomm, timeout: float) -> MPITransport:
    """The transport of a communicator's contexts, which ends with it, made if it has none that can go on. Collective
    where it is made; takes and raises what `MPITransport` does."""
    known = comm.Get_attr(_key()) if comm != MPI.COMM_NULL else None
    if not isinstance(known, MPITransport) or known.log.lost is not None:
        known = MPITransport(comm, timeout)
        comm.Set_attr(_key(), known)
    return known


class MPITransport(StoreBoard):
    """Moves tensors between the ranks of an mpi4py communicator, out of the memory where they lie into that where they
    are to lie. CUDA tensors too, where the MPI is CUDA-aware: it does not know streams, so the host waits for the
    current one before each batch.

    Construction is collective over the communicator, of which a duplicate is made: messages never meet the user's. It
    is kept until MPI ends. Every wait ends within `timeout` seconds, with `PeerError` if a peer is dead or silent; the
    end of a process of this machine shows at once. Where ``mpiexec`` ends a job with its first dead process, as it does
    unless told otherwise, nobody is left to raise. Outside of calls, where messages have no labels, no tensors go to a
    peer any more that has missed a deadline.

    MPI must allow calls from several threads, one at a time: backward may run in another, and so may what warns.

    Args:
        comm: an intracommunicator that this rank is in.
        timeout: seconds, the deadline on every wait.

    Raises:
        ValueError: `comm` is none, `timeout` is no deadline, or MPI's thread level is too low.
        PeerError: not every rank made its transport in time.
    """

    blind = frozenset[str]()

    def __init__(self, comm: MPI.Intracomm, timeout: float = 60.0) -> None:
        self.timeout = deadline("timeout", timeout)
        _check(comm)
        self.rank, self.world_size = comm.Get_rank(), comm.Get_size()
        self.log = CallLog(self.rank)
        self._devices = {"cpu", "cuda"} if _cuda_aware() else {"cpu"}
        self._comm = self._duplicate(comm)
        cards, self._store = self._meet()
        self.name: str = cards[0]["name"]
        self.machines = tuple(card["machine"] for card in cards)  # by rank
        self._peers = {
            rank: MPIPeer(self._comm, rank, self.log) for rank in range(self.world_size) if rank != self.rank
        }
        self._epoch = self.log.epoch
        self._arriving: list[tuple[MPIPeer, Held]] = []  # notes
        self._under_way: list[Debt] = []  # of batches, of calls that have failed too
        # what MPI may read or write when nobody holds this transport any more
        kept = self._under_way, self._arriving, *(peer.held for peer in self._peers.values())
        self._comm.Set_attr(_key(), kept)
        among = neighbourhood()
        near = {rank: int(card["process"]) for rank, card in enumerate(cards) if among and card["among"] == among}
        self._deaths = Deaths({rank: process for rank, process in near.items() if rank != self.rank})
        self._look_after = 0.0  # by the clock
        here = [int(card["cores"], 16) for card in cards if card["machine"] == cards[self.rank]["machine"]]
        self._awake = AWAKE if len(here) <= _all_of(here).bit_count() else 0.0

    @property
    def board(self) -> MPITransport:
        """See `Voters`."""
        return self

    @property
    def _open_store(self) -> dist.Store:
        return self._store

    def check_open(self) -> None:
        """See `Transport`."""
        if MPI.Is_finalized():
            raise RuntimeError(f"MPI has been finalized, and group '{self.name}' ended with it")

    def post(self, sends: Parcels, recvs: Parcels, what: str) -> Pending:
        """See `Transport`. Raises ValueError for tensors on a device whose memory MPI cannot reach."""
        check_batch(self, sends, recvs)
        self._check_devices([tensor for tensor, _ in (*sends, *recvs)], what)
        self.check_open()
        self.log.check()
        out, back, label = by_peer(sends), by_peer(recvs), self.log.label(what)
        if not out and not back:
            return Done()
        self.serve()
        batch = _Batch(f"{what}: rank {self.rank} of group '{self.name}'", self, label, [])
        for rank in sorted(out.keys() | back.keys()):
            sent, expected = out.get(rank, []), back.get(rank, [])
            debt = Debt(self._peers[rank], Held([*sent, *expected]))
            batch.debts.append(debt)
            self._under_way.append(debt)  # before anything moves: an interrupt must not free what is under way
            if sent:
                debt.peer.send(sent, label, debt)
            if expected:
                debt.peer.expect(expected, label, debt)
        return batch

    def warn(self, label: Label) -> None:
        """See `Transport`."""
        for peer in self._peers.values():
            peer.warn(label)

    def heed(self, among: Collection[int] | None = None) -> None:
        """See `Transport`."""
        self.serve()
        self.log.check()
        gone = {rank: peer.why for rank, peer in self._peers.items() if peer.why is not None}
        gone = {rank: why for rank, why in gone.items() if among is None or rank in among}
        if gone:
            raise in_vain(f"rank {self.rank} of group '{self.name}'", time.monotonic(), self.timeout, gone)

    def serve(self) -> None:
        """Takes in the notes that have come from anyone, and looks now and then who is no more."""
        if self._epoch != self.log.epoch:
            self._epoch = self.log.epoch
            for peer in self._peers.values():
                peer.leave_old_epochs()
            self._under_way[:] = [debt for debt in self._under_way if not debt.peer.over(debt.held)]
        try:
            self._take_in()
        except BaseException:  # a note may be lost
            self.log.torn = True
            for peer in self._peers.values():
                peer.torn = True
            raise
        if time.monotonic() > self._look_after:
            self._look_after = time.monotonic() + PAUSE
            for rank in self._deaths.ended():
                self._peers[rank].close("its process has ended")

    def done(self, debts: Sequence[Debt]) -> None:
        """What MPI has nothing more to do with."""
        self._under_way[:] = [debt for debt in self._under_way if debt not in debts]

    def pause(self, waited: float) -> None:
        """Lets others have the core, after so many seconds without news: at first only if they want it. Ranks that
        share cores sleep at once."""
        if waited < self._awake:
            os.sched_yield()
        else:
            time.sleep(min(0.001, 0.00002 + (waited - self._awake) / 50))

    def strangers(self, label: Label) -> list[Label | None]:
        """Labels of other calls than the one of ``label`` that have come from anyone."""
        return [peer.of_another_call(label) for peer in self._peers.values()]

    def _take_in(self) -> None:
        status = MPI.Status()
        while (message := self._next(status)) is not None:
            held = Held([bytearray(status.Get_count(MPI.BYTE))])
            self._arriving.append((self._peers[status.Get_source()], held))
            held.requests.append(message.Irecv(held.memory[0]))
        late: set[MPIPeer] = set()
        for peer, held in self._arriving:  # those of one peer in their order
            if peer in late or not peer.over(held):
                late.add(peer)
            else:
                peer.take(bytes(held.memory[0]))
        self._arriving[:] = [(peer, held) for peer, held in self._arriving if peer in late]

    def _next(self, status: MPI.Status) -> MPI.Message | None:
        try:
            return self._comm.Improbe(MPI.ANY_SOURCE, NOTES, status)
        except MPI.Exception:  # of somebody
            for peer in self._peers.values():
                try:
                    if (message := self._comm.Improbe(peer.rank, NOTES, status)) is not None:
                        return message
                except MPI.Exception as error:
                    peer.close(f"MPI says: {error}")
            return None

    def _check_devices(self, tensors: Sequence[Tensor], what: str) -> None:
        """Raises ValueError for a device whose memory MPI cannot reach; where it can, waits for the current stream."""
        for device in {tensor.device for tensor in tensors}:
            if device.type not in self._devices:
                why = "CUDA tensors over an MPI that is not CUDA-aware" if device.type == "cuda" else "not its memory"
                raise ValueError(
                    f"{what}: the tensors are on '{device.type}', but group '{self.name}' moves tensors on "
                    f"{sorted(self._devices)} only ({why}); take a process group with NCCL, or an MPI that was built "
                    "with CUDA"
                )
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    def _duplicate(self, comm: MPI.Intracomm) -> MPI.Intracomm:
        copy, request = comm.Idup()
        self._meet_until(request)
        copy.Set_errhandler(MPI.ERRORS_RETURN)
        return copy

    def _meet(self) -> tuple[list[dict[str, str]], dist.TCPStore]:
        """The cards of all ranks, and the store that rank 0 hosts."""
        limit = timedelta(seconds=self.timeout)
        card = {"machine": machine() or socket.gethostname(), "cores": _cores()}
        card |= {"process": str(os.getpid()), "among": neighbourhood()}
        store: dist.TCPStore | None = None
        if self.rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
            card |= {"host": socket.gethostname(), "port": str(store.port), "name": f"mpi-{uuid.uuid4().hex[:12]}"}
        mine, all_cards = bytearray(json.dumps(card).encode().ljust(CARD)), bytearray(CARD * self.world_size)
        self._comm.Set_attr(_key(), (mine, all_cards))  # MPI may write to them after the deadline
        self._meet_until(self._comm.Iallgather(mine, all_cards))
        cards = [json.loads(all_cards[at : at + CARD]) for at in range(0, len(all_cards), CARD)]
        if store is None:
            host = "127.0.0.1" if card["machine"] == cards[0]["machine"] else cards[0]["host"]
            store = self._reach(host, int(cards[0]["port"]), limit)
        self._meet_until(self._comm.Ibarrier())  # rank 0 may drop its own at once
        return cards, store

    def _reach(self, host: str, port: int, limit: timedelta) -> dist.TCPStore:
        try:
            return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
        except dist.DistError as error:
            raise PeerError(
                f"rank {self.rank} of {self.world_size}: the store that rank 0 hosts at {host}:{port} cannot be "
                f"reached ({error}); machines must know each other's host names, and let ranks connect"
            ) from error

    def _meet_until(self, request: MPI.Request) -> None:
        start = time.monotonic()
        while not request.Test():
            if time.monotonic() - start > self.timeout:
                raise PeerError(
                    f"rank {self.rank} of {self.world_size}: not every rank of the MPI communicator made its transport "
                    f"within {self.timeout} s"
                )
            time.sleep(0.0005)


@dataclass(slots=True, eq=False)
class _Batch:
    """One batch under way."""

    who: str
    transport: MPITransport
    label: Label
    debts: list[Debt]
    error: Exception | None = None
    over: bool = False

    def wait(self) -> None:
        """See `Pending`."""
        if self.error is not None:
            raise self.error
        if self.over:
            return
        try:
            self._wait()
        except Exception as error:
            self.error = error
            raise
        self.over = True
        self.transport.done(self.debts)

    def _wait(self) -> None:
        transport, log, start = self.transport, self.transport.log, time.monotonic()
        while owing := [debt for debt in self.debts if not debt.settle()]:
            log.check()
            for stranger in (*(debt.peer.stranger for debt in owing), *transport.strangers(self.label)):
                if stranger is not None:
                    raise log.mismatch(self.label, stranger)
            waited = time.monotonic() - start
            if waited > transport.timeout:
                self._give_up(owing)
                break
            transport.serve()
            transport.pause(waited)
        failed = {debt.peer.rank: debt.failed for debt in self.debts if debt.failed is not None}
        if failed:
            transport.serve()
            log.check()  # it may have said why
            raise in_vain(self.who, start, transport.timeout, failed)

    def _give_up(self, owing: Sequence[Debt]) -> None:
        for debt in owing:
            debt.failed = f"nothing came within {self.transport.timeout} s"
            if not self.label.number:
                debt.peer.close(debt.failed)


def _check(comm: object) -> None:
    """Raises ValueError where no transport can be made of it."""
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise ValueError(
            f"comm={shown(comm)}: must be an mpi4py intracommunicator that this rank is in, such as MPI.COMM_WORLD"
        )
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise ValueError("comm is given while MPI is not at work; call MPI.Init() before, and MPI.Finalize() after")
    levels = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled"}
    level = MPI.Query_thread()
    if level in levels:
        raise ValueError(
            f"MPI runs with thread level '{levels[level]}', and MPITransport needs 'serialized' or 'multiple', since "
            "backward and warnings may come from other threads; set mpi4py.rc.thread_level = 'serialized' before "
            "mpi4py.MPI is imported for the first time"
        )


def _cuda_aware() -> bool:
    """Whether the MPI library says that it takes pointers to GPUs' memory, by a call that MPICH and Open MPI have."""
    ask = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return ask is not None and bool(ask())


def _cores() -> str:
    """The cores that this process may use, a bit each."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return f"{sum(1 << core for core in cores):x}"


def _all_of(cores: Sequence[int]) -> int:
    """Those of any process."""
    union = 0
    for of_one in cores:
        union |= of_one
    return union
