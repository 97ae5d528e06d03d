"""One rank of a world whose transfers take no time: it runs its whole program, every tile, merge and accumulation, and
what it computes is of no use but for its time."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ringattn.arguments.values import deadline, integer
from ringattn.comm.agreement import AGREED
from ringattn.comm.calls import CallLog
from ringattn.comm.label import Label
from ringattn.comm.transport import Done, Parcels, Pending, check_batch


class InstantRank:
    """The transport of one rank, alone in its process, for measuring what a ring costs beside its messages.

    Messages are not sent. A receive leaves its tensor as it is, but for the first time, when it is filled with random
    numbers: what a kernel reads then is neither NaN nor zeros, which processors may compute faster. Every agreement
    says that all ranks agree.

    Args:
        rank: the place, from 0 to ``world_size - 1``.
        world_size: number of ranks, at least 1.
        timeout: seconds; nothing waits.

    Raises:
        ValueError: one of them is out of its range.
    """

    name = "instant"
    blind = frozenset({"cuda"})  # as NCCL, over which a call ends without a word from the others

    def __init__(self, rank: int, world_size: int, timeout: float = 60.0) -> None:
        self.world_size = integer("world_size", world_size, 1)
        self.rank = integer("rank", rank, 0, self.world_size - 1)
        self.timeout = deadline("timeout", timeout)
        self.log = CallLog(self.rank)
        self._filled: dict[int, int] = {}  # bytes by address: a buffer takes messages of several lengths

    def post(self, sends: Parcels, recvs: Parcels, what: str) -> Pending:
        """See the class."""
        check_batch(self, sends, recvs)
        for tensor, _ in recvs:
            if tensor.is_floating_point() and self._filled.get(tensor.data_ptr(), 0) < tensor.nbytes:
                self._filled[tensor.data_ptr()] = tensor.nbytes
                with torch.no_grad():
                    tensor.normal_()
        return Done()

    def check_open(self) -> None:
        """There is no group that could be destroyed."""

    def warn(self, label: Label) -> None:
        """There is nobody to tell."""

    def heed(self, among: Collection[int] | None = None) -> None:
        """There is nobody to listen to."""

    @property
    def board(self) -> InstantRank:
        """See `Voters`."""
        return self

    def publish(self, key: str, value: str) -> None:
        """Nobody reads it."""

    def lookup(self, key: str) -> str | None:
        """The verdict of every agreement."""
        return AGREED

    def count(self, key: str) -> int:
        """The first to count."""
        return 1

    def await_key(self, key: str, timeout: float) -> bool:
        """The verdict is there already."""
        return True

    def forget(self, key: str) -> None:
        """Nothing is kept."""
