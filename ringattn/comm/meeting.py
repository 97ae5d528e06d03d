"""The meeting: how the ranks of a process group come to the transport that their contexts use.

Contexts of one group with one deadline share a transport, and with it the count of calls: ranks that call two contexts
in different orders are then at different calls, which their messages tell. Ranks meet whenever they make a context;
what one of them refuses before it comes, all do.
"""

from __future__ import annotations

from collections.abc import Collection
from types import TracebackType
from weakref import WeakKeyDictionary

import torch.distributed as dist

from ringattn.comm.agreement import agree
from ringattn.comm.board import GroupBoard
from ringattn.comm.calls import CallLog, CallMismatch, PeerError
from ringattn.comm.label import Label
from ringattn.comm.shared_memory import transport_over
from ringattn.comm.transport import Transport

_NEW = "a new one"
# By deadline and number of communicators.
_known: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[float, int], tuple[int, Transport]]] = WeakKeyDictionary()


class Meeting(GroupBoard):
    """One meeting of a group's ranks, which each rank counts. What raises between `with` and `transport()` on one rank
    raises on all that come. ``apart``: which ranks were told what, where they have not all been ``told`` the same."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.log = CallLog(self.rank)
        self._number = self.count(f"meetings of rank {self.rank}")
        self._refused = f"meeting {self._number} refused"
        self._over, self._given_up = self.world_size == 1, False
        self._seconds = self.timeout = 0.0
        self.apart = ""

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and not self._over:
            self.log.text = "a new context"
            self.publish(self._refused, self.log.failure(error).pack().hex())

    def give_up(self) -> None:
        """Waits no more for ranks that have not come, from another thread."""
        self._given_up = True
        self.timeout = 0.0

    def transport(self, timeout: float, communicators: int = 0, told: str = "") -> Transport:
        """The transport of all ranks' contexts, made if they have none that all can go on with. Collective. ``told``:
        what else the ranks compare, see ``apart``.

        Raises:
            PeerError: a rank did not come within ``timeout`` seconds.
            CallMismatch: (a ValueError) transfers of this group were left without their other ends, or ranks differ in
                the number of ``communicators`` (see `ProcessGroupTransport`).
        """
        known, kind = _known.setdefault(self.group, {}), (timeout, communicators)
        made, shared = known.get(kind, (0, None))
        if shared is not None and shared.log.group_lost:
            raise CallMismatch(str(shared.log.lost))
        place = None if shared is None else shared.log.place
        self._seconds = self.timeout = timeout
        if self._given_up:
            self.timeout = 0.0
        place = _NEW if place is None else f"that of meeting {made}, {place}"
        if self._all_at(place, communicators, told) == _NEW or shared is None:
            shared = transport_over(self.group, timeout, communicators)
            known[kind] = self._number, shared
        return shared

    def _all_at(self, place: str, communicators: int, told: str) -> str:
        """Waits for all ranks; the place, if all are at it."""
        meeting, number = f"meeting {self._number}", {"Options.communicators": str(communicators)}
        try:
            agree(self, meeting, {"transport": place, **number, "told": told})
        except CallMismatch:  # in one of them; all ranks are here
            self.apart = self._differ(f"{meeting}, told", {"told": told})
            if self._differ(f"{meeting}, transport", {"transport": place, **number}):
                agree(self, f"{meeting}, communicators", number)
                place = _NEW
        except PeerError as error:
            raise PeerError(
                f"rank {self.rank} of {self.world_size}: not every rank of group '{self.name}' made its context within "
                f"{self._seconds} s ({error})"
            ) from error
        finally:
            self._over = True
        return place

    def _differ(self, call: str, facts: dict[str, str]) -> str:
        """In what the ranks differ, in words; empty where they do not."""
        try:
            agree(self, call, facts)
        except CallMismatch as error:
            return "; ".join(line.strip() for line in str(error).splitlines()[1:])
        return ""

    def warn(self, label: Label) -> None:
        """Nobody has to be told that this rank waits: none can be at a later place."""

    def heed(self, among: Collection[int] | None = None) -> None:
        """Raises what a rank has refused."""
        refused = self.lookup(self._refused)
        if refused is not None:
            self.log.hear(Label.unpack(bytes.fromhex(refused)))
            self.log.check()
