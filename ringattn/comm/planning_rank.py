"""A rank that plans for a world that it cannot talk to: contexts on it plan, shard and describe, and whatever would
move a tensor or compare anything with another rank says so at once."""

from __future__ import annotations

from collections.abc import Collection
from typing import NoReturn

from ringattn.arguments.values import deadline, integer, shown
from ringattn.comm.calls import CallLog
from ringattn.comm.label import Label
from ringattn.comm.transport import Done, Parcels, Pending


class PlanningRank:
    """The transport of a place in a world, without that world: for looking at plans of any number of ranks, and for
    processes that cut batches and must not touch the group's connections.

    Args:
        rank: the place, from 0 to ``world_size - 1``.
        world_size: number of ranks, at least 1. The only rank of a world of one has nobody to miss, and computes.
        timeout: seconds, what contexts on it take for the transport's deadline.
        device: what contexts on it plan for: "cpu", or a GPU's name, as its driver gives it.

    Raises:
        ValueError: one of them is out of its range.
    """

    name = "planning"
    blind = frozenset[str]()

    def __init__(self, rank: int, world_size: int, timeout: float = 60.0, device: str = "cpu") -> None:
        self.world_size = integer("world_size", world_size, 1)
        self.rank = integer("rank", rank, 0, self.world_size - 1)
        if not isinstance(device, str):
            raise ValueError(f"device={shown(device)}: must be 'cpu' or the name of a GPU, as 'NVIDIA H100'")
        self.device = device
        self.timeout = deadline("timeout", timeout)
        self.log = CallLog(self.rank)

    def post(self, sends: Parcels, recvs: Parcels, what: str) -> Pending:
        """Legal for an empty batch only."""
        if sends or recvs:
            self._refuse(f"move the tensors of {what}")
        return Done()

    def check_open(self) -> None:
        """There is no group that could be destroyed."""

    def warn(self, label: Label) -> None:
        """There is nobody to tell."""

    def heed(self, among: Collection[int] | None = None) -> None:
        """There is nobody to listen to."""

    @property
    def board(self) -> PlanningRank:
        """See `Voters`."""
        return self

    def publish(self, key: str, value: str) -> None:
        """Refused, like all that ranks compare notes with."""
        self._refuse()

    def lookup(self, key: str) -> str | None:
        """Refused."""
        self._refuse()

    def count(self, key: str) -> int:
        """Refused."""
        self._refuse()

    def await_key(self, key: str, timeout: float) -> bool:
        """Refused."""
        self._refuse()

    def forget(self, key: str) -> None:
        """Refused."""
        self._refuse()

    def _refuse(self, what: str = "compare anything with the other ranks") -> NoReturn:
        raise RuntimeError(
            f"rank {self.rank} of {self.world_size} is a PlanningRank, which plans for ranks that it cannot talk to: "
            f"its contexts shard and describe, but cannot {what}, as attention(), unshard() and roll() do; for these "
            "make the context on the ranks' process group, or on a transport of ringattn.Loopback"
        )
