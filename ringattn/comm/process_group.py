"""The transport over `torch.distributed`: gloo between CPUs, NCCL between GPUs. One batch of transfers is one
`batch_isend_irecv`; the group's own store serves for agreement; there are no threads of our own."""

import hashlib
import itertools
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from ringattn.comm.transport import Done, Parcels, PeerError, Pending, check_batch, check_device, in_vain

Answer = TypeVar("Answer")
_Transfer = tuple[Callable[..., Any], Tensor, int]  # isend or irecv, what, with whom


class ProcessGroupTransport:
    """Moves tensors between the ranks of a process group.

    Construction is collective over the group: a small all-reduce on each device type brings the communicators
    up before the first transfer needs them, and hands every rank the same fresh number, which keeps the store
    keys of two transports on one group apart.

    Deadlines: over gloo every wait ends within `timeout` seconds, with `PeerError` if a peer is dead or
    silent; at a missed deadline gloo closes the group's connections, and the group stays failed. Over NCCL
    a wait only orders the current CUDA stream behind the transfer and returns at once, without a host
    synchronisation: there the deadline is the group's own watchdog (`timeout=` of `init_process_group` or
    `new_group`), which ends the process.

    Args:
        group: a process group this rank belongs to (of a 1-D DeviceMesh: `mesh.get_group()`).
        timeout: seconds, the deadline on every wait.

    Raises:
        ValueError: `group` is not a group of this rank's, or `timeout` is not positive.
        PeerError: not every rank of the group constructed its transport in time.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float = 60.0) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                f"group is {group!r}: it must be a process group that this rank is in; call "
                "init_process_group first, make the transport on the group's own ranks only, and of a "
                "DeviceMesh take mesh.get_group()"
            )
        if timeout <= 0:
            raise ValueError(f"timeout is {timeout} seconds: it must be positive")
        self.rank: int = dist.get_rank(group)
        self.world_size: int = dist.get_world_size(group)
        self.name: str = group.group_name
        self.timeout = timeout
        self.calls = itertools.count()
        self._group = group
        self._devices = _devices(group)
        # The group's own store: every kind of group has one, registered beside its name.
        store = dist.PrefixStore("ringattn", distributed_c10d._get_process_group_store(group))
        number = store.add("transports", 1) if self.rank == 0 else 0
        self._store = dist.PrefixStore(str(self._meet(number)), store)

    def _meet(self, number: int) -> int:
        """Initialises the communicators, and spreads rank 0's `number`."""
        total = number
        for device in self._devices.values():
            numbers = torch.tensor([number], dtype=torch.int64, device=device)
            try:
                work = dist.all_reduce(numbers, group=self._group, async_op=True)
                _wait(work, self.timeout, device)
                total = int(numbers.item())
            except RuntimeError as error:
                raise self._absent(error) from error
        return total

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
            work = dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self._group, async_op=True)
            _wait(work, self.timeout, bounds.device)
        except RuntimeError as error:
            raise self._absent(error) from error
        return bool(bounds.sum() == 0)

    def post(self, sends: Parcels, recvs: Parcels, what: str) -> Pending:
        """See `Transport`. Raises ValueError for tensors on a device the group cannot move."""
        check_batch(self, sends, recvs)
        # An empty tensor has nothing to move, and both of its ends know that.
        transfers: list[_Transfer] = [(dist.isend, tensor, peer) for tensor, peer in sends if tensor.numel()]
        transfers += [(dist.irecv, tensor, peer) for tensor, peer in recvs if tensor.numel()]
        if not transfers:
            return Done()
        for _, tensor, _ in transfers:
            check_device(tensor, self._devices, self.name, what)
        who = f"{what}: rank {self.rank} of group '{self.name}'"
        return _Batch(who, self.timeout, self._group, transfers)

    def publish(self, key: str, value: str) -> None:
        """See `Transport`."""
        self._ask(lambda: self._store.set(key, value))

    def lookup(self, key: str) -> str | None:
        """See `Transport`."""
        # get() alone would block on an absent key
        return self._ask(lambda: self._store.get(key).decode() if self._store.check([key]) else None)

    def count(self, key: str) -> int:
        """See `Transport`."""
        return self._ask(lambda: self._store.add(key, 1))

    def await_key(self, key: str, timeout: float) -> bool:
        """See `Transport`."""

        def present() -> bool:
            try:
                self._store.wait([key], timedelta(seconds=timeout))
            except dist.DistNetworkError:
                raise
            except RuntimeError:  # a timeout: TCPStore and FileStore differ in the class
                return False
            return True

        return self._ask(present)

    def forget(self, key: str) -> None:
        """See `Transport`."""
        try:
            self._ask(lambda: self._store.delete_key(key))
        except NotImplementedError:
            return

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        try:
            return question()
        except dist.DistError as error:
            raise PeerError(
                f"rank {self.rank}: the store of group '{self.name}' does not answer, the process that hosts "
                f"it may have died ({error})"
            ) from error


class _Batch:
    """One batch under way. It holds the tensors, which must outlive the transfers."""

    def __init__(self, who: str, timeout: float, group: dist.ProcessGroup, transfers: list[_Transfer]) -> None:
        self._who = who
        self._timeout = timeout
        self._errors: dict[int, RuntimeError] = {}  # by peer
        self._under_way: list[tuple[list[dist.Work], list[_Transfer]]] = []
        for part in _parts(transfers):
            try:
                works = dist.batch_isend_irecv(
                    [dist.P2POp(move, tensor, group=group, group_peer=peer) for move, tensor, peer in part]
                )
                self._under_way.append((works, part))
            except RuntimeError as error:  # a connection known to be broken; wait() reports it
                self._blame(part, error)

    def wait(self) -> None:
        """See `Pending`; over NCCL it orders the current stream and does not block the host."""
        start = time.monotonic()
        for works, part in self._under_way:
            try:
                for work in works:
                    _wait(work, self._timeout - (time.monotonic() - start), part[0][1].device)
            except RuntimeError as error:
                self._blame(part, error)
        self._under_way = []
        if self._errors:
            # gloo's texts start with a source line and end with advice
            texts = {peer: re.sub(r"^\[\S*\] ", "", str(e)).split(". ")[0] for peer, e in self._errors.items()}
            raise in_vain(self._who, start, self._timeout, texts) from next(iter(self._errors.values()))

    def _blame(self, part: list[_Transfer], error: RuntimeError) -> None:
        for _, _, peer in part:
            self._errors.setdefault(peer, error)


def _parts(transfers: list[_Transfer]) -> list[list[_Transfer]]:
    """On CUDA the batch is started as one, so that NCCL fuses it; on the CPU torch would start its transfers
    one by one in any case, and doing so here tells which of them failed."""
    on_cpu = [[transfer] for transfer in transfers if transfer[1].device.type == "cpu"]
    fused = [transfer for transfer in transfers if transfer[1].device.type != "cpu"]
    return [*on_cpu, fused] if fused else on_cpu


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
