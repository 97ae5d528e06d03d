"""What a transport is: it moves tensors between the ranks of one group, and has a board on which they can compare
notes. It knows nothing of masks, plans or kernels, so the same ring runs over
processes, threads or a world of one."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ringattn.comm.calls import CallLog, PeerError
from ringattn.comm.label import Label

Parcels = Sequence[tuple[Tensor, int]]  # tensors with the group rank each goes to or comes from


class Homeward(NamedTuple):
    """A message with what was computed of others: gradients and partial results. Where a transport has two lanes it
    takes the other one; it is so at both of its ends."""

    tensor: Tensor
    rank: int


class Pending(Protocol):
    """Transfers under way."""

    def wait(self) -> None:
        """Returns when every receive has arrived and every send may be overwritten.

        Raises:
            PeerError: a peer is dead or has failed, or the transport's deadline has passed.
            CallMismatch: a peer is at another call.
        """


class Board(Protocol):
    """A small key/value store that the ranks of one group share: what they leave each other there needs no message."""

    def publish(self, key: str, value: str) -> None:
        """Stores `value` under `key`, for every rank to see."""

    def lookup(self, key: str) -> str | None:
        """The value under `key`, None if there is none."""

    def count(self, key: str) -> int:
        """Adds one to the number under `key` (absent = 0), atomically, and returns the new number."""

    def await_key(self, key: str, timeout: float) -> bool:
        """Blocks until `key` is there; False if `timeout` seconds pass first."""

    def forget(self, key: str) -> None:
        """Frees `key`, which no rank will use again. A store that cannot may keep it."""


class Voters(Protocol):
    """The ranks of one group, and how they can agree.

    Attributes:
        rank: this rank, counted within the group.
        world_size: ranks in the group.
        timeout: seconds, the deadline on every wait.
        log: which call this rank is at.
    """

    rank: int
    world_size: int
    timeout: float
    log: CallLog

    @property
    def board(self) -> Board:
        """Where they leave each other notes."""

    def warn(self, label: Label) -> None:
        """Tells every rank, without waiting, of a failure, or that this rank waits for them in an agreement: what waits
        there, in `wait()` or `agree()`, hears and checks it."""

    def heed(self, among: Collection[int] | None = None) -> None:
        """Raises if a rank has warned of a failure of this epoch, or one of these (None: of all) is known to be dead.
        One that has ended well looks the same."""


@runtime_checkable
class Transport(Voters, Protocol):
    """What moves tensors between the ranks of one group.

    Attributes:
        name: equal on all ranks of the group, different from other groups' names.
        blind: types of device between which transfers carry no label, so that ranks have to compare their logs.
    """

    name: str
    blind: frozenset[str]

    def post(self, sends: Parcels, recvs: Parcels, what: str) -> Pending:
        """Starts one batch of transfers, in the given order, and returns at once.

        Args:
            sends: contiguous tensors with the group rank each goes to; not to be written before `wait()`.
            recvs: contiguous tensors with the group rank each comes from; not to be read before `wait()`.
                Between two ranks, the n-th receive of an epoch takes the n-th send, of the same dtype and number of
                elements, if their labels fit. An empty batch is legal, a transfer from a rank to itself is not.
            what: names the batch, alike at both of its ends ("forward step 3").
        """

    def check_open(self) -> None:
        """Raises RuntimeError if the ranks' group has been destroyed."""


@runtime_checkable
class Allocator(Protocol):
    """A transport with memory of its own, from which messages leave without a copy. It moves any other tensor too."""

    def allocate(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory for ``size`` numbers on a device whose tensors it moves."""


def empty(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory, as later calls can use that train."""
    with torch.inference_mode(False):
        return torch.empty(size, dtype=dtype, device=device)


def check_batch(transport: Transport, sends: Parcels, recvs: Parcels) -> None:
    """Asserts what every transport asks of a batch."""
    for tensor, peer in (*sends, *recvs):
        assert tensor.is_contiguous(), f"transfers take contiguous tensors, not strides {tensor.stride()}"
        assert 0 <= peer < transport.world_size, f"rank {peer} is not in a group of {transport.world_size}"
        assert peer != transport.rank, f"rank {peer} cannot send to itself"


def check_device(tensor: Tensor, devices: Collection[str], name: str, what: str) -> None:
    """Raises ValueError for a tensor on a device whose tensors the group `name` does not move."""
    if tensor.device.type not in devices:
        raise ValueError(
            f"{what}: the tensors are on '{tensor.device.type}', but group '{name}' moves tensors on "
            f"{sorted(devices)} only (gloo has no GPU transfers); start it with "
            "init_process_group('cpu:gloo,cuda:nccl'), or use ringattn.Loopback for ranks on one GPU"
        )


def by_peer(parcels: Parcels) -> dict[int, list[Tensor]]:
    """Tensors by the rank they go to or come from; empty ones have nothing to move, and both ends know that."""
    peers: dict[int, list[Tensor]] = {}
    for tensor, rank in parcels:
        if tensor.numel():
            peers.setdefault(rank, []).append(tensor)
    return peers


def name_ranks(ranks: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` as "ranks 0-2, 5": short also when a thousand ranks are meant."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    noun = "rank" if len(set(ranks)) == 1 else "ranks"
    return f"{noun} {', '.join('-'.join(map(str, run)) for run in runs)}"


def in_vain(who: str, start: float, timeout: float, reasons: dict[int, str]) -> PeerError:
    """The error of a rank that has waited since `start` (`time.monotonic`) for the ranks in `reasons`."""
    texts = "; ".join(f"rank {rank}: {text}" for rank, text in sorted(reasons.items()))
    return PeerError.of_wait(
        f"{who} waited {time.monotonic() - start:.1f} s (deadline {timeout} s) for {name_ranks(list(reasons))} in vain "
        f"({texts})"
    )


class Done:
    """Nothing left to wait for."""

    def wait(self) -> None:
        """Returns at once."""


class Solo:
    """The transport of a world of one rank, for `group=None`: there is nobody to send to."""

    name = "solo"
    blind = frozenset[str]()

    def __init__(self, timeout: float = 60.0) -> None:
        self.rank, self.world_size = 0, 1
        self.timeout = timeout
        self.log = CallLog(0)
        self._store: dict[str, str] = {}

    def post(self, sends: Parcels, recvs: Parcels, what: str) -> Pending:
        """Legal for an empty batch only."""
        assert not sends and not recvs, f"{what}: a world of one rank has no transfers"
        return Done()

    def check_open(self) -> None:
        """One rank needs no group."""

    def warn(self, label: Label) -> None:
        """There is nobody to tell."""

    def heed(self, among: Collection[int] | None = None) -> None:
        """There is nobody to listen to."""

    @property
    def board(self) -> Solo:
        """See `Voters`."""
        return self

    def publish(self, key: str, value: str) -> None:
        """See `Board`."""
        self._store[key] = value

    def lookup(self, key: str) -> str | None:
        """See `Transport`."""
        return self._store.get(key)

    def count(self, key: str) -> int:
        """See `Transport`."""
        number = int(self._store.get(key, "0")) + 1
        self._store[key] = str(number)
        return number

    def await_key(self, key: str, timeout: float) -> bool:
        """Does not block: nobody else could publish."""
        return key in self._store

    def forget(self, key: str) -> None:
        """See `Transport`."""
        self._store.pop(key, None)
