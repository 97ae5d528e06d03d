"""A link: what a rank moves messages with, the buffers they land in, the count of what moved, and the calls that it
begins together with the other ranks."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ringattn.comm import (
    TORN,
    Allocator,
    CallMismatch,
    PeerError,
    Pending,
    Subset,
    Transport,
    Unwaited,
    Watch,
    Watching,
    agree,
    empty,
)
from ringattn.geometry.spans import Ints, in_words
from ringattn.runtime.workspace import Workspace
from ringattn.version import VERSION

if TYPE_CHECKING:
    from ringattn.runtime.timeline import Timeline

REMEMBERED, OF_A_SUBSET = 4096, 64  # kinds of calls that all ranks, or some, have compared


NOTHING: Mapping[str, str] = MappingProxyType({})
SHOWN = 320  # characters of a call in a text
WIDEST = 90  # characters of a fact in a text


class Moved(NamedTuple):
    """Bytes of one kind of message."""

    kind: str
    sent: int
    received: int

    @staticmethod
    def of(kind: str, sends: Sequence[tuple[Tensor, int]], recvs: Sequence[tuple[Tensor, int]]) -> Moved:
        return Moved(kind, *(sum(tensor.nbytes for tensor, _ in side) for side in (sends, recvs)))


@dataclass
class Traffic:
    """Bytes sent and received so far, by kind of message, and the seconds the host stood waiting."""

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    wait_seconds: float = 0.0

    def count(self, moved: Sequence[Moved]) -> None:
        """Adds what a batch of messages moves."""
        for kind, sent, received in moved:
            self.sent[kind] += sent
            self.received[kind] += received


class Expected(NamedTuple):
    """A message that a rank waits for: from whom, of what kind, and of which positions, ``[n, 3]``."""

    peer: int
    kind: str
    spans: Ints


class Batch(Protocol):
    """Messages of one turn, with the name that both of their ends know, their bytes, and what those hold that are to
    come."""

    @property
    def what(self) -> str: ...
    @property
    def sends(self) -> Sequence[tuple[Tensor, int]]: ...
    @property
    def recvs(self) -> Sequence[tuple[Tensor, int]]: ...
    @property
    def moved(self) -> Sequence[Moved]: ...
    @property
    def expected(self) -> Sequence[Expected]: ...


class Messages(Protocol):
    """What a loop moves its messages through: a link, or what stands for one while the loop is captured."""

    workspace: Workspace

    def post(self, batch: Batch) -> Pending | None:
        """Starts the messages of a batch, if there are any."""

    def wait(self, pending: Pending) -> None:
        """Waits for messages that were started."""


class _Known(NamedTuple):
    """What the ranks have compared of a kind of call, in short and as a digest."""

    text: str
    digest: bytes


@dataclass
class _Common:
    """What the ranks have in common since an epoch began."""

    epoch: int = 0
    known: OrderedDict[Hashable, _Known] = field(default_factory=OrderedDict)
    sorts: set[Hashable] = field(default_factory=set)  # of calls, of which the ranks have compared one
    fresh: bool = False  # the call under way is the first of its signature
    draws: int = 0

    def remember(self, signature: Hashable, known: _Known, sort: Hashable, most: int) -> None:
        """Keeps what was compared; of the signatures the last."""
        self.known[signature] = known
        self.sorts |= {sort} - {None}
        if len(self.known) > most:
            self.known.popitem(last=False)


@dataclass(eq=False)
class Link:
    """What contexts share that follow each other. ``compare_every``: calls between two comparisons of all calls so far,
    where messages carry no label. ``communicators``: what `Options` asked for when the transport was made.
    ``profiling``: the timeline of the profile that is open, if one is, for the links of all subsets."""

    transport: Transport
    compare_every: int = 64
    communicators: int = 0
    workspace: Workspace = field(init=False)
    traffic: Traffic = field(default_factory=Traffic)
    profiling: list[Timeline] = field(default_factory=list)
    _common: _Common = field(default_factory=_Common)
    _posted: Batch | None = None  # what is waited for next, unless it was posted past this link
    _watch: Watch | None = None  # of transfers for which no host waits

    def __post_init__(self) -> None:
        transport = self.transport
        self.workspace = Workspace(transport.allocate if isinstance(transport, Allocator) else empty)
        self._watch = transport.watch if isinstance(transport, Watching) and transport.blind else None

    def among(self, members: Sequence[int]) -> Link:
        """What contexts of some of the ranks share. Buffers and the count of what moved are those of all."""
        some = Subset(self.transport, members)
        link = Link(some, self.compare_every, self.communicators, self.traffic, self.profiling)
        link.workspace, link._watch = self.workspace, self._watch
        return link

    @property
    def timeline(self) -> Timeline | None:
        """What calls take in this link's place while a profile is open."""
        return self.profiling[0].at(self) if self.profiling else None

    def post(self, batch: Batch) -> Pending | None:
        """See :class:`Messages`."""
        if not (batch.sends or batch.recvs):
            return None
        self.traffic.count(batch.moved)
        self._posted = batch
        pending = self.transport.post(batch.sends, batch.recvs, batch.what)
        if self._watch is not None and isinstance(pending, Unwaited):
            self._watch.add(pending.works, partial(self._in_vain, batch, self._call))
        return pending

    def wait(self, pending: Pending) -> None:
        """See :class:`Messages`. Its time counts as the host's."""
        start, batch, self._posted = time.perf_counter(), self._posted, None
        try:
            pending.wait()
        except PeerError as error:
            if error.waited:
                error.args = (f"{error}; {self._in_vain(batch, self._call)}",)
            raise
        self.traffic.wait_seconds += time.perf_counter() - start

    @property
    def _call(self) -> str:
        return f"call {self.transport.log.number}, {self.transport.log.text}"

    def _in_vain(self, batch: Batch | None, call: str) -> str:
        """In which call, and for what, this rank waits."""
        named = self.transport.members if isinstance(self.transport, Subset) else range(self.transport.world_size)
        expected = batch.expected if batch is not None else ()
        parts = [f"{kind} of {in_words(spans)} from rank {named[peer]}" for peer, kind, spans in expected[:4]]
        more = [f"{len(expected) - 4} more messages"] if len(expected) > 4 else []
        what = f" expects {', '.join(parts + more)}" if parts else ""
        turn = f"{batch.what} of " if batch is not None else ""
        said = call if len(call) <= SHOWN else f"{call[:SHOWN]}..."
        return f"rank {named[self.transport.rank]}{what} in {turn}{said}{self.transport.log.hint}"

    def begin(
        self,
        name: str,
        signature: Hashable,
        facts: Callable[[], dict[str, str]],
        device: str,
        own: Mapping[str, str] = NOTHING,
        *,
        sort: Hashable = None,
        label: str = "",
    ) -> None:
        """Begins a call on all ranks.

        At the first call of a ``sort`` (shapes and dtypes, whatever the lengths, masks and layouts) the ranks compare
        on their board the facts that the call's signature stands for. Every later one is compared by its messages,
        which carry a digest of the facts, of the ``name`` and of what is this call's ``own`` (a seed); the first of
        a signature ends on all ranks together, so that there is a message in it. So new lengths and documents cost no
        word on the board, which is one for all ranks; nor do calls of a subset, of which there may be many. What is
        remembered follows from the order of calls alone, which is the same on all ranks. ``label`` is for texts alone.

        Raises:
            CallMismatch: (a ValueError) the facts differ between ranks.
            PeerError: a rank did not come.
        """
        transport, common = self.transport, self.common()
        if transport.world_size == 1:
            return
        log, known = transport.log, common.known.pop(signature, None)
        log.check_process()
        called = f"{name}; {label}" if label else name
        blind, common.fresh = device in transport.blind, known is None
        by_messages = self._by_messages(sort, blind)
        if known is None:
            known = self._compared(facts(), None if by_messages else {"call": name, **own}, called)
        common.remember(signature, known, sort, OF_A_SUBSET if isinstance(transport, Subset) else REMEMBERED)
        text = f"{called}{log.course.said}{_listed(own)}{known.text}"
        log.begin(text, known.digest + repr((name, dict(own))).encode(), not blind)
        if blind and common.fresh and by_messages:
            self._meet("begin")  # between CPUs, where messages have labels
        if blind and log.number % self.compare_every == 0:
            calls = {f"call {number}": text for number, text in log.course.recent}
            try:
                facts_so_far = {**calls, "all calls": f"digest {log.course.chain:x}"}
                agree(transport, log.ballot(), facts_so_far, f"the comparison of all calls up to {called}")
            except CallMismatch as error:
                error.apart = True  # calls since the last comparison have met others
                raise

    def _compared(self, facts: dict[str, str], own: dict[str, str] | None, called: str) -> _Known:
        """What a signature stands for; the ranks compare it on their board, beside what is this call's ``own``, unless
        that is None."""
        transport, log = self.transport, self.transport.log
        if log.epoch and not log.number:
            self._resume(called)
        if own is not None:
            compared = {"version": f"ringattn {VERSION}", **own, **facts}
            agree(transport, log.ballot(), compared, f"the first comparison of {called}")
        return _Known(_listed(facts), hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest())

    def _by_messages(self, sort: Hashable, blind: bool) -> bool:
        """Whether the first call of a signature is compared by its messages alone."""
        labelled = not (blind and "cpu" in self.transport.blind)
        return labelled and (isinstance(self.transport, Subset) or sort in self._common.sorts)

    def _resume(self, called: str) -> None:
        """After a call that failed, the ranks go on if it was the same one for all, and their connections are whole:
        else some have done more of the program than others, and what they would compute together next would not belong
        together. Where messages carry no label, nothing may be left of the call that failed either: a transfer without
        its other end would meet the next one.
        """
        log, blind = self.transport.log, self.transport.blind
        left = {"messages left of the call that failed": f"of {log.posted} batches"} if blind else {}
        failed = f"{log.failed}{', and ranks were at others' if log.apart else ''}"
        connections = TORN if log.torn else "whole"
        alike = {"calls made": str(log.course.made), "call that failed": failed, "connections": connections, **left}
        try:
            agree(self.transport, log.ballot(), alike, f"the first one after a call that failed, {called}")
            if log.torn:
                raise CallMismatch(f"the connections between the ranks are {TORN}")
            if log.apart:
                raise CallMismatch("the ranks were, or may have been, at different calls")
        except CallMismatch as error:
            group = "a new process group" if blind else "the group"
            log.lose(
                f"{error}\nThe ranks cannot go on after the call that failed, which was not the same one on all of "
                f"them or tore what connects them; make a new context of {group} where they are at the same place of "
                "the program again",
                group=bool(blind),
            )
            raise CallMismatch(str(log.lost)) from None

    def finish(self, device: str, needed: bool = True) -> None:
        """Ends a call: waits until every rank has done its part, so that no rank goes on from a call that fails on
        another (a dissemination barrier: Hensgen, Finkel and Manber 1988). Not where messages carry no label. A call
        in which no rank ``needed`` another waits for none, and looks what they have told; so does one of a subset,
        whose messages tell of its own ranks alone.
        """
        transport, log = self.transport, self.transport.log
        if device not in transport.blind:
            meets = needed or self._common.fresh
            if not meets or isinstance(transport, Subset):
                transport.heed()  # before all meet, so that what it raises is of this call on all of them
            if meets:
                self._meet("end")
        log.posted, log.finished = 0, True

    def _meet(self, where: str) -> None:
        """Waits until every rank is at this place of the call."""
        transport, (token, got) = self.transport, self._tokens
        rank, world = transport.rank, transport.world_size
        away = 1
        while away < world:
            to, source = (rank + away) % world, (rank - away) % world
            pending = transport.post([(token, to)], [(got, source)], f"{where}, {away} ranks away")
            try:
                pending.wait()
            except PeerError as error:
                if error.waited:
                    error.args = (f"{error}; {self._in_vain(None, f'the {where} of {self._call}')}",)
                raise
            away *= 2

    @cached_property
    def _tokens(self) -> tuple[Tensor, Tensor]:
        """What ranks send each other at the end of a call, and where it arrives."""
        with torch.inference_mode(False):  # later calls that train use it too
            return torch.zeros(1, dtype=torch.uint8, device="cpu"), torch.empty(1, dtype=torch.uint8, device="cpu")

    def draw(self, start: int) -> int:
        """The next number of a counter that counts alike on all ranks, mixed with ``start``."""
        common = self.common()
        common.draws += 1
        drawn = f"{start} {common.epoch} {common.draws - 1}{self.transport.log.course_of(self.transport.name).said}"
        return int.from_bytes(hashlib.blake2b(drawn.encode(), digest_size=8).digest(), "little") >> 2

    def common(self) -> _Common:
        """What ranks have in common by now. After a call that failed on some, that is nothing any more."""
        epoch = self.transport.log.epoch
        if self._common.epoch != epoch:
            self._common = _Common(epoch)
            self.workspace.clear()  # what is left of a call may still write into its buffers
        return self._common


def _listed(facts: Mapping[str, str]) -> str:
    return "".join(f"; {fact} {_brief(value)}" for fact, value in facts.items())


def _brief(value: str) -> str:
    """What is long is told apart by a digest."""
    if len(value) <= WIDEST:
        return value
    return f"{value[:WIDEST]}... (digest {hashlib.sha256(value.encode()).hexdigest()[:8]})"
