"""Subsets: some of the ranks of a transport as a transport of their own, over the connections that are there."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ringattn.comm.course import Course
from ringattn.comm.label import Label
from ringattn.comm.transport import Board, Homeward, Parcels, Pending, Transport, name_ranks


class Subset:
    """Moves tensors between some ranks of another transport, which must outlive it.

    Nothing is opened, and nothing is sent when it is made: any number of them cost a few numbers each. Its ranks count
    from 0, in the order of the whole; texts of errors name ranks as the whole does. What fails in it fails on all ranks
    of the whole, which are told at once.

    Args:
        whole: the transport of all ranks.
        members: those of them, rising, this rank among them, the same on all of them.
    """

    def __init__(self, whole: Transport, members: Sequence[int]) -> None:
        self.whole, self.members = whole, tuple(members)
        self.rank, self.world_size = self.members.index(whole.rank), len(self.members)
        self.timeout, self.blind = whole.timeout, whole.blind
        self.log = whole.log  # calls of one rank have one order
        among = name_ranks(self.members)
        self.name = f"{whole.name}, {among}"
        self.log.open(self.name, Course(self.members, f"; among {among}"))

    @property
    def board(self) -> Board:
        """See `Voters`: that of all ranks, on which agreements have names of their own."""
        return self.whole.board

    def warn(self, label: Label) -> None:
        """See `Voters`."""
        self.whole.warn(label)

    def heed(self, among: Collection[int] | None = None) -> None:
        """See `Voters`. Ranks that make no calls of the subset may end."""
        self.whole.heed([self.members[rank] for rank in (range(self.world_size) if among is None else among)])

    def check_open(self) -> None:
        """See `Transport`."""
        self.whole.check_open()

    def post(self, sends: Parcels, recvs: Parcels, what: str) -> Pending:
        """See `Transport`."""
        return self.whole.post(self._in_whole(sends), self._in_whole(recvs), what)

    def _in_whole(self, parcels: Parcels) -> Parcels:
        return [
            Homeward(parcel[0], self.members[parcel[1]])
            if isinstance(parcel, Homeward)
            else (parcel[0], self.members[parcel[1]])
            for parcel in parcels
        ]
