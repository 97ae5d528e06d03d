"""A timeline: what a rank does when, written down while a profile is open.

A `Timeline` stands in a link's place. Every call passes the same points, whatever measures it: it begins; in each turn
rows are copied, messages posted, tiles computed, messages waited for, and what came is added; it ends. A clock is read
at each of them, so that the stretches of a call follow each other without a gap. The loops know nothing of it: where a
turn begins, adds and ends is told by what is put among its copies and adds.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ringattn.comm import Pending, told
from ringattn.planning import program as planned
from ringattn.runtime.capture import Found, Walk
from ringattn.runtime.link import NOTHING, Batch, Link
from ringattn.runtime.prepared import Prepared, Turn, Turns
from ringattn.runtime.profile import ADDS, COMPUTE, COPIES, POST, WAIT, Piece, Profile, ProfiledCall, Stretch
from ringattn.runtime.wire import Own
from ringattn.runtime.workspace import Workspace


@contextmanager
def profiled(link: Link, rank: int) -> Iterator[Profile]:
    """Writes down the calls that are made through a link. ``rank``: what this one is called by those who look at it.

    Raises:
        ValueError: a profile of the link is open already.
    """
    with told(link.transport, "profile()"):
        if link.profiling:
            raise ValueError(
                "a profile of this context, or of one with which it shares its link, is open already: leave its "
                "`with` first"
            )
        timeline = Timeline(link)
        link.profiling.append(timeline)
    profile = Profile(rank)
    try:
        yield profile
    finally:
        link.profiling.clear()
        profile.close(timeline.calls())


class Clock(Protocol):
    """What reads the time of a device."""

    def read(self) -> Any:
        """A moment."""

    def nanoseconds(self, moments: list[Any]) -> list[int]:
        """Moments since 1970. Called once, with all that were read in their order."""


class HostClock:
    """Never goes back, and is the same for all processes of a machine."""

    def __init__(self) -> None:
        self._zero = time.time_ns() - time.perf_counter_ns()

    def read(self) -> int:
        """See `Clock`."""
        return self._zero + time.perf_counter_ns()

    def nanoseconds(self, moments: list[int]) -> list[int]:
        """See `Clock`."""
        return moments


class CudaClock:
    """Moments of the current stream of the current device, where a wait for messages holds up what is queued and not
    the host."""

    def __init__(self) -> None:
        self._first = self.read()
        self._first.synchronize()
        self._zero = time.time_ns()

    def read(self) -> torch.cuda.Event:
        """See `Clock`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def nanoseconds(self, moments: list[torch.cuda.Event]) -> list[int]:
        """See `Clock`. Step by step, as the time between two events is a number of seven figures."""
        found, at, last = [], float(self._zero), self._first
        for event in moments:
            event.synchronize()
            at += 1e6 * max(last.elapsed_time(event), 0.0)  # of two streams, the later may be ahead
            found.append(int(at))
            last = event
        return found


@dataclass
class _Piece:
    name: str
    turn: planned.Turn | None
    sent: int = 0
    received: int = 0


@dataclass
class _Call:
    """A call as it is written down: the moments, and what happens from each to the next."""

    name: str
    facts: Mapping[str, str]
    clock: Clock
    pieces: list[_Piece] = field(default_factory=list)
    moments: list[Any] = field(default_factory=list)
    phases: list[tuple[int, str] | None] = field(default_factory=list)  # of which piece; None: between pieces

    def mark(self, phase: str | None) -> None:
        """From now on it is this of the last piece, or nothing of any."""
        self.moments.append(self.clock.read())
        self.phases.append(None if phase is None else (len(self.pieces) - 1, phase))

    def finished(self, times: list[int]) -> ProfiledCall:
        stretches: list[list[Stretch]] = [[] for _ in self.pieces]
        for start, stop, found in zip(times[:-1], times[1:], self.phases[:-1], strict=True):
            if found is not None:
                stretches[found[0]].append(Stretch(found[1], start, stop))
        pieces = [
            Piece(piece.name, tuple(spent), piece.sent, piece.received, piece.turn)
            for piece, spent in zip(self.pieces, stretches, strict=True)
        ]
        return ProfiledCall(self.name, self.facts, times[0], times[-1], tuple(pieces))


class Timeline:
    """Stands for a link while a profile of it is open. A call that fails is not kept."""

    def __init__(self, link: Link) -> None:
        self.link, self.workspace, self.transport, self.traffic = link, link.workspace, link.transport, link.traffic
        self._facts: dict[Hashable, Mapping[str, str]] = {}
        self._clocks: dict[int | None, Clock] = {}  # by CUDA device; None is the host's
        self._done: list[_Call] = []
        self._counted = (0, 0)
        self._at: dict[Link, Timeline] = {link: self}

    def calls(self) -> list[ProfiledCall]:
        """Those that have ended. Waits for what devices still have to do for them."""
        times = {clock: iter(clock.nanoseconds(self._moments(clock))) for clock in self._clocks.values()}
        return [call.finished([next(times[call.clock]) for _ in call.moments]) for call in self._done]

    def _moments(self, clock: Clock) -> list[Any]:
        return [moment for call in self._done if call.clock is clock for moment in call.moments]

    def at(self, link: Link) -> Timeline:
        """The same in the place of a link of other ranks of the group."""
        if link not in self._at:
            self._at[link] = other = copy.copy(self)
            other.link, other.workspace, other.transport = link, link.workspace, link.transport
        return self._at[link]

    # -- as a link ------------------------------------------------------------------------------

    def begin(
        self, name: str, signature: Hashable, facts: Callable[[], dict[str, str]], device: str,
        own: Mapping[str, str] = NOTHING, *, sort: Hashable = None, label: str = "",
    ) -> None:  # fmt: skip
        """See `Link`."""
        known = self._facts.get((name, signature))
        if known is None:
            known = self._facts[name, signature] = facts()
        self._call = _Call(name, {"label": label, **known} if label else known, self._clock(device))
        self._enter("begin", WAIT)
        self.link.begin(name, signature, facts, device, own, sort=sort, label=label)
        self._leave()

    def finish(self, device: str, needed: bool = True) -> None:
        """See `Link`."""
        self._enter("end", WAIT)
        self.link.finish(device, needed)
        self._leave()
        self._done.append(self._call)

    def post(self, batch: Batch) -> Pending | None:
        """See `Messages`."""
        if not self._in_turn:
            self._adopt(batch.what)
        self._call.mark(POST)
        pending = self.link.post(batch)
        self._call.mark(COMPUTE if self._in_turn else COPIES)
        return pending

    def wait(self, pending: Pending) -> None:
        """See `Messages`."""
        if self._call.phases[-1] is None:
            self._adopt(self._call.name)
        self._call.mark(WAIT)
        self.link.wait(pending)
        self._call.mark(ADDS)

    # -- turns ----------------------------------------------------------------------------------

    def walk(self, walk: Walk) -> Found:
        """Walks with marks in its turns. No graph of it is captured or replayed."""
        return walk._replace(call=_Marked(walk.call, self))(self)

    def turn(self, turn: Turn, said: planned.Turn) -> Turn:
        """A turn that tells when it begins, adds, and ends. ``said``: the same in the program."""

        def begins(own: Own) -> None:
            self._enter(turn.what, COPIES, said)

        def adds(own: Own) -> None:
            self._call.mark(ADDS)

        def ends(own: Own) -> None:
            self._leave()

        return turn._replace(copies=[begins, *turn.copies], adds=[adds, *turn.adds, ends])

    # -- pieces ---------------------------------------------------------------------------------

    @property
    def _in_turn(self) -> bool:
        call = self._call
        return call.phases[-1] is not None and call.pieces[-1].turn is not None

    def _enter(self, name: str, phase: str, turn: planned.Turn | None = None) -> None:
        """Begins a piece, where the one before ends."""
        self._settle()
        self._call.pieces.append(_Piece(name, turn))
        self._call.mark(phase)

    def _leave(self) -> None:
        """Ends a piece."""
        self._call.mark(None)
        self._settle()

    def _adopt(self, name: str) -> None:
        """Begins a piece that is not announced; what was done since the last one are its copies."""
        call = self._call
        free = call.phases[-1] is None
        if not free:
            self._settle()
        call.pieces.append(_Piece(name, None))
        if free:
            call.phases[-1] = len(call.pieces) - 1, COPIES

    def _settle(self) -> None:
        """What was moved since this was last asked belongs to the last piece."""
        totals = sum(self.traffic.sent.values()), sum(self.traffic.received.values())
        if self._call.pieces:
            piece = self._call.pieces[-1]
            piece.sent += totals[0] - self._counted[0]
            piece.received += totals[1] - self._counted[1]
        self._counted = totals

    def _clock(self, device: str) -> Clock:
        number = torch.cuda.current_device() if device == "cuda" else None
        if number is not None and torch.cuda.is_current_stream_capturing():
            raise NotImplementedError(
                "a profile is open while a CUDA graph of your own is captured, whose replays it would not see: capture "
                "outside of cp.profile()"
            )
        if number not in self._clocks:
            self._clocks[number] = HostClock() if number is None else CudaClock()
        return self._clocks[number]


class _Marked(Prepared):
    """A call whose turns tell a timeline how far it has come."""

    def __init__(self, call: Prepared, timeline: Timeline) -> None:
        vars(self).update(vars(call))
        self._call, self._timeline = call, timeline

    def turns(self, workspace: Workspace) -> tuple[Turns, Turns]:
        """See `Prepared`."""
        found, program = self._call.turns(workspace), self.program
        return tuple(  # type: ignore[return-value]
            [self._timeline.turn(*both) for both in zip(turns, said, strict=True)]
            for turns, said in zip(found, (program.forward, program.backward), strict=True)
        )
