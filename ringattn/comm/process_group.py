"""The transport over `torch.distributed`: gloo between CPUs, NCCL between GPUs. Between GPUs one batch of transfers
is fused to one on each lane; the group's own store serves for agreement; there are no threads of our own.

Between CPUs, two ranks that share a batch also exchange its labels, which they wait for first: a label is of one size
whatever call it comes from, so two calls can meet in it and be told apart. Tensors travel under a tag of their call.
"""

from __future__ import annotations

import hashlib
import re
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Collection
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.arguments.values import deadline
from ringattn.comm.board import GroupBoard
from ringattn.comm.calls import CallLog, PeerError
from ringattn.comm.label import LABEL_BYTES, Kind, Label
from ringattn.comm.lanes import Fused, Lane, Tensors, group_lane, open_lanes
from ringattn.comm.transport import Done, Homeward, Parcels, Pending, by_peer, check_batch, check_device, in_vain
from ringattn.comm.watch import Watch

PAUSE = 0.1  # seconds between two looks at what others have told
_CPU = torch.device("cpu")


class ProcessGroupTransport(GroupBoard):
    """Moves tensors between the ranks of a process group.

    Construction is collective over the group: a small all-reduce on each device type brings the communicators
    up before the first transfer needs them, and hands every rank the same fresh number, which keeps the store
    keys of two transports on one group apart.

    Deadlines: over gloo every wait ends within `timeout` seconds, with `PeerError` if a peer is dead or
    silent; at a missed deadline gloo closes the group's connections, and the group stays failed. Over NCCL
    a wait only orders the current CUDA stream behind the transfer and returns at once, without a host
    synchronisation: there the deadline is the group's own watchdog (`timeout=` of `init_process_group` or
    `new_group`), which ends the process; shortly before `timeout` seconds a thread says on stderr which transfer of
    which call is in vain (`watch`). Nor do its transfers carry labels (`blind`).

    The group is not kept alive: what the transport holds ends with it.

    Args:
        group: a process group this rank belongs to (of a 1-D DeviceMesh: `mesh.get_group()`).
        timeout: seconds, the deadline on every wait.
        communicators: 0, or how many of our own the transfers between GPUs travel on, one or two, on streams of high
            priority: two keep keys and queries apart from what is `Homeward`. The same on all ranks.

    Raises:
        ValueError: `group` is not a group of this rank's, or `timeout` is not positive.
        NotImplementedError: `communicators`, and the group's engine for GPUs is not NCCL.
        PeerError: not every rank of the group constructed its transport in time.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float = 60.0, communicators: int = 0) -> None:
        super().__init__(group)
        self.timeout = deadline("timeout", timeout)
        self.log = CallLog(self.rank)
        self._devices = _devices(group)
        # Only between CPUs; where the group moves none of their tensors, there too.
        self.blind = frozenset(self._devices) ^ {"cpu"}
        # What gloo may still read or write, of calls that have failed too.
        self._under_way: list[_Batch] = []
        self._kept: list[_Transfer] = []
        self._labels: dict[int, deque[_Transfer]] = {}  # still to come in this epoch, by peer
        self._labels_of = 0
        self._look_after = 0.0  # by the clock
        self._gone: dict[int, str] = {}  # peers whose connection is broken, and why
        self._number = self._meet(self.count("transports") if self.rank == 0 else 0)
        self.keep_apart(self._number)
        for held in (self._under_way, self._kept, self._labels):
            self.at_end(held.clear)
        self.lanes: list[Lane] = [group_lane]
        self.watch = Watch(self.timeout)
        self.at_end(self.watch.close)
        weakref.finalize(self, self.watch.close).atexit = False
        if communicators and self.blind:
            self.open_lanes(communicators, self._devices["cuda"])

    def _meet(self, number: int) -> int:
        """Initialises the communicators, and spreads rank 0's `number`."""
        total = number
        for device in self._devices.values():
            numbers = torch.tensor([number], dtype=torch.int64, device=device)
            try:
                work = dist.all_reduce(numbers, group=self.group, async_op=True)
                _wait(work, self.timeout, device)
                total = int(numbers.item())
            except RuntimeError as error:
                raise self._absent(error) from error
        return total

    def open_lanes(self, number: int, device: torch.device) -> None:
        """Makes as many communicators of our own, which end with the group, for messages without labels. Collective."""
        try:
            lanes = open_lanes(self.group, device, self._open_store, number)
        except NotImplementedError:
            raise
        except RuntimeError as error:
            raise self._absent(error) from error
        self.lanes[:] = lanes
        for lane in lanes:
            self.at_end(lane.close)

    def _absent(self, error: RuntimeError) -> PeerError:
        return PeerError(
            f"rank {self.rank} of {self.world_size}: not every rank of group '{self.name}' made its "
            f"transport within {self.timeout} s ({error})"
        )

    @property
    def devices(self) -> set[str]:
        """The types of device whose tensors the group moves."""
        return set(self._devices)

    def same_everywhere(self, text: str) -> bool:
        """Whether every rank asks with the same text. Collective; for groups that move CPU tensors."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
        bounds = torch.tensor([number, -number], device="cpu")
        try:
            work = dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.group, async_op=True)
            _wait(work, self.timeout, bounds.device)
        except RuntimeError as error:
            raise self._absent(error) from error
        return bool(bounds.sum() == 0)

    def post(self, sends: Parcels, recvs: Parcels, what: str) -> Pending:
        """See `Transport`. Raises ValueError for tensors on a device the group cannot move."""
        check_batch(self, sends, recvs)
        self.log.check()
        self.check_open()
        label = self.log.label(what)
        who = f"{what}: rank {self.rank} of group '{self.name}'"
        parts: list[_Labelled | Fused] = []
        for lane in (None, *self.lanes):
            out, back = (by_peer([p for p in parcels if self._lane(p) is lane]) for parcels in (sends, recvs))
            for tensor in (t for tensors in (*out.values(), *back.values()) for t in tensors):
                check_device(tensor, self._devices, self.name, what)
            if out or back:
                parts.append(_Labelled(self, label, out, back) if lane is None else Fused(self, lane, out, back))
        if not parts:
            return Done()
        batch = _Batch(who, self, parts)
        self._under_way.append(batch)  # before anything moves: an interrupt must not free what is under way
        for part in parts:
            part.start()
        return batch

    def _lane(self, parcel: tuple[Tensor, int]) -> Lane | None:
        """What a message travels on; None: with a label."""
        if parcel[0].device.type not in self.blind:
            return None
        return self.lanes[-1 if isinstance(parcel, Homeward) else 0]

    def done(self, batch: _Batch) -> None:
        """A batch whose tensors nobody writes to any more."""
        if batch in self._under_way:
            self._under_way.remove(batch)

    def tag(self, *of: int) -> int:
        """What tells the transfers of a call from those of others, and of other transports, on the same group."""
        return zlib.crc32(repr((self._number, *of)).encode()) & 0x7FFFFFFF

    def warn(self, label: Label) -> None:
        """See `Transport`. The store tells those that wait in an agreement, labels those that wait for messages."""
        packed = label.pack()
        if label.kind is Kind.FAILURE:
            self.publish(_failed(label.epoch), packed.hex())
        if "cpu" not in self._devices:
            return
        group = self.group
        for peer in (rank for rank in range(self.world_size) if rank != self.rank):
            note = _Transfer(_note(packed))
            self._kept.append(note)
            try:
                note.begin(group.send, peer, self.tag(label.epoch))
            except RuntimeError as error:  # it may be the one that has died
                self.lose(peer, error)

    def lose(self, peer: int, error: RuntimeError) -> str:
        """Notes that the connection with a peer is broken, for good; what to say of it."""
        # gloo's texts start with a source line and end with advice
        self._gone[peer] = text = re.sub(r"^\[\S*\] ", "", str(error)).split(". ")[0]
        self.log.lose(
            f"the connection of rank {self.rank} with rank {peer} is broken ({text}), and gloo mends none; make a new "
            "process group of the ranks that are alive, and a new context of it",
            group=True,
        )
        return text

    def expect_label(self, peer: int) -> None:
        """Makes room for the next label of a peer."""
        if self._labels_of != self.log.epoch:
            self._kept += [waiting for labels in self._labels.values() for waiting in labels]
            self._labels.clear()
            self._labels_of = self.log.epoch
        arriving = _Transfer(torch.zeros(LABEL_BYTES, dtype=torch.uint8))
        self._labels.setdefault(peer, deque()).append(arriving)
        arriving.begin(self.group.recv, peer, self.tag(self.log.epoch))

    def next_label(self, peer: int, deadline: float) -> Label:
        """Waits for the next label of a peer that is about tensors, and heeds the others."""
        while True:
            arriving = self._labels[peer][0]
            arriving.wait(deadline)
            self._labels[peer].popleft()
            label = Label.unpack(arriving.tensor.numpy().tobytes())
            if label.kind is Kind.TENSORS:
                return label
            self.log.hear(label)
            self.expect_label(peer)
            self.log.check()

    def heed(self, among: Collection[int] | None = None) -> None:
        """See `Transport`. Asks the store only now and then: it may be far, and serve many."""
        if time.monotonic() > self._look_after:
            packed = self.lookup(_failed(self.log.epoch))
            self._look_after = time.monotonic() + PAUSE
            if packed is not None:
                self.log.hear(Label.unpack(bytes.fromhex(packed)))
        self.log.check()
        gone = {rank: why for rank, why in self._gone.items() if among is None or rank in among}
        if gone:
            raise in_vain(f"rank {self.rank} of group '{self.name}'", time.monotonic(), self.timeout, gone)


class _Batch:
    """One batch under way. It holds the tensors, which must outlive the transfers."""

    def __init__(self, who: str, transport: ProcessGroupTransport, parts: list[_Labelled | Fused]) -> None:
        self._who, self._transport, self._parts = who, transport, parts
        self._failed: Exception | None = None

    def wait(self) -> None:
        """See `Pending`; over NCCL it orders the current stream and does not block the host."""
        if self._failed is not None:
            raise self._failed
        try:
            self._wait()
        except Exception as error:
            self._failed = error
            raise
        self._transport.done(self)

    def _wait(self) -> None:
        start, timeout = time.monotonic(), self._transport.timeout
        errors: dict[int, RuntimeError] = {}  # by peer
        for part in self._parts:
            errors |= part.wait(start + timeout)
        if errors:
            texts = {peer: self._transport.lose(peer, error) for peer, error in errors.items()}
            raise in_vain(self._who, start, timeout, texts) from next(iter(errors.values()))
        self._parts = []

    @property
    def works(self) -> list[dist.Work]:
        """Those for which no host waits."""
        return [work for part in self._parts if isinstance(part, Fused) for work in part.works]


class _Transfer:
    """A tensor that goes to a peer or comes from it between CPUs. Whoever needs it keeps it before it begins."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._work: list[dist.Work] = []

    def begin(self, move: Callable[..., dist.Work], peer: int, tag: int) -> None:
        """Starts it, with the group's send or recv."""
        # One step for Python, which no signal's handler comes between: what is started is kept.
        self._work.extend(map(move, ([self.tensor],), (peer,), (tag,)))

    def wait(self, deadline: float) -> None:
        """Waits until it is over; raises RuntimeError where it cannot be."""
        for work in self._work:
            _wait(work, deadline - time.monotonic(), _CPU)


class _Labelled:
    """The transfers between CPUs, started one by one, which tells which of them failed."""

    def __init__(self, transport: ProcessGroupTransport, label: Label, out: Tensors, back: Tensors) -> None:
        self.transport, self.label = transport, label
        self.peers = sorted(out.keys() | back.keys())
        self.notes = {peer: _Transfer(_note(label.pack())) for peer in self.peers}
        self.out, self.back = ({peer: [_Transfer(tensor) for tensor in of[peer]] for peer in of} for of in (out, back))
        self.errors: dict[int, RuntimeError] = {}

    def start(self) -> None:
        """Starts all of them, those of a broken connection in vain."""
        group, label = self.transport.group, self.label
        labels, tensors = self.transport.tag(label.epoch), self.transport.tag(label.epoch, label.course, label.chain)
        for peer in self.peers:
            try:
                self.transport.expect_label(peer)
                for transfer in self.out.get(peer, []):
                    transfer.begin(group.send, peer, tensors)
                for transfer in self.back.get(peer, []):
                    transfer.begin(group.recv, peer, tensors)
                self.notes[peer].begin(group.send, peer, labels)  # last: who has a label can count on the rest
            except RuntimeError as error:  # a connection known to be broken; wait() reports it
                self.errors[peer] = error

    def wait(self, deadline: float) -> dict[int, RuntimeError]:
        """The errors by peer; raises CallMismatch, or what a peer has failed with."""
        for peer in self.peers:
            if peer not in self.errors:
                self._meet(peer, deadline)
        for peer in self.peers:
            if peer not in self.errors:
                try:
                    for transfer in (self.notes[peer], *self.out.get(peer, []), *self.back.get(peer, [])):
                        transfer.wait(deadline)
                except RuntimeError as error:
                    self.errors[peer] = error
        return self.errors

    def _meet(self, peer: int, deadline: float) -> None:
        log = self.transport.log
        try:
            theirs = self.transport.next_label(peer, deadline)
        except RuntimeError as error:
            if log.broken or isinstance(error, PeerError):
                raise
            self.errors[peer] = error
            return
        if not theirs.fits(self.label):
            raise log.mismatch(self.label, theirs)


def _note(packed: bytes) -> Tensor:
    """A label as a tensor, all of one size."""
    return torch.frombuffer(bytearray(packed.ljust(LABEL_BYTES, b"\0")), dtype=torch.uint8)


def _failed(epoch: int) -> str:
    return f"failed in {epoch}"


def _wait(work: dist.Work, seconds: float, device: torch.device) -> None:
    """On the CPU blocks until the work is done; on CUDA orders the stream, where a timeout would block."""
    if device.type == "cpu":
        work.wait(timedelta(seconds=max(seconds, 0.001)))  # zero would mean no deadline
    else:
        work.wait()


def _devices(group: dist.ProcessGroup) -> dict[str, torch.device]:
    """A device of each type whose tensors the group moves: the CPU for gloo, the current GPU for NCCL."""
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    devices = {}
    if "cpu" in backends:
        devices["cpu"] = torch.device("cpu")
    if backends.get("cuda", "gloo") != "gloo" and torch.cuda.is_available():
        devices["cuda"] = torch.device("cuda", torch.cuda.current_device())
    return devices
