"""Calls: what every message belongs to, and how a call that fails on one rank fails on all of them.

All ranks of a transport make the same calls in the same order: attention forward and backward, unshard, roll. Each
rank counts them in a `CallLog` and keeps a running digest of them, and every message carries both, in its `Label`. So
a message never fills the tensor of another call: where two calls meet, both ranks raise. An exception that escapes a
call ends its *epoch*: all ranks are told, raise, and begin the next one with the call that they start together,
whose first act is an agreement; what is left of the epoch before is dropped by its number.

Some of the ranks may make calls of their own, over the same connections. Each such set of ranks is a `Course`, with a
count and a digest for itself; epochs are those of all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

import torch
from torch.utils.checkpoint import _StopRecomputationError

from ringattn.comm.course import Course
from ringattn.comm.label import Kind, Label, mark
from ringattn.comm.shield import shield

if TYPE_CHECKING:
    from ringattn.comm.transport import Transport

# Calls that all ranks make; what is refused on the way to one may be refused on one rank alone.
CALLS = ("attention forward", "attention backward", "unshard", "backward of unshard", "backward of shard", "roll",
         "backward of roll")  # fmt: skip
TORN = "torn, by an exception in the middle of a transfer"


class PeerError(RuntimeError):
    """A peer did not do its part in time: it died, failed, or is somewhere else. The text names the ranks
    waited for, the step, and the seconds. ``waited``: this rank itself waited for messages in vain."""

    waited = False

    @classmethod
    def of_wait(cls, text: str) -> Self:
        """That of a rank that has waited itself."""
        error = cls(text)
        error.waited = True
        return error


class CallMismatch(PeerError, ValueError):
    """The ranks are not at the same call. The text names the calls, or what differs between them. ``apart``: the calls
    are of different kinds, so that the ranks are at different places of the program. ``since``: the earlier of the two
    calls, 0 where these are no calls of the same ranks."""

    def __init__(self, text: str, apart: bool = False, since: int = 0) -> None:
        super().__init__(text)
        self.apart, self.since = apart, since


# What a rank refuses with is raised as the same on all ranks; what else befalls it is a PeerError there.
_APART = "CallMismatch apart"
_REFUSALS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, TypeError, NotImplementedError, FloatingPointError, CallMismatch)
}
_REFUSALS[_APART] = CallMismatch


class CallLog:
    """Which call one rank is at. ``broken`` until the epoch after is begun, ``warned`` once this rank has told the
    others. ``posted`` counts the unlabelled batches of the call under way; ``finished``: this rank has done its part of
    that call. ``course``: that of the call under way, of all ranks between calls. ``apart``: an epoch failed because
    ranks were at different places of the program; ``torn``: a connection can move no more messages."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._process = os.getpid()
        self._caller: int | None = None
        self.epoch = self.posted = 0
        self.labelled = True
        self.apart = self.torn = False
        self.lost: str | None = None  # why no call can be made any more
        self.group_lost = False  # nor one of another transport of the same group
        self.failed = ""  # which kind of call, when an epoch was broken
        self.course = self._all = Course()
        self.subsets: dict[str, Course] = {}  # of some of the ranks each, by the name of their transport
        self._courses = {self._all.ident: self._all}  # all, by what labels call them
        self._heard: dict[int, Label] = {}  # failures by epoch
        self._waiting: dict[int, Label] = {}  # in agreements, by rank
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        for course in self._courses.values():
            course.restart()
        self.broken = self.warned = self.finished = False
        self.text = "no call"

    def open(self, name: str, course: Course) -> None:
        """From now on calls over the transport of this name, of some of the ranks, are those of a course of theirs."""
        known = self.subsets.setdefault(name, course)
        self._courses[known.ident] = known

    def course_of(self, name: str) -> Course:
        """That of the calls over a transport."""
        return self.subsets.get(name, self._all)

    @property
    def hint(self) -> str:
        """What to look at where ranks do not meet, beside whether all make the same calls."""
        return "; of contexts of cp.on(), every rank of a list must pass the same list" if self.subsets else ""

    @property
    def number(self) -> int:
        """Calls of the course that this epoch has begun."""
        return self.course.number

    @property
    def in_child(self) -> bool:
        """Whether this is a copy in a process forked from the rank's."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Raises RuntimeError in a copy: calls are the rank's own."""
        if self.in_child:
            raise RuntimeError(
                f"a call in process {os.getpid()}, a child of process {self._process}, which is rank {self.rank}: only "
                "the process that has made a context can call it; a child (a DataLoader's worker) may shard"
            )

    def lose(self, why: str, group: bool) -> None:
        """No call can be made from now on; the first reason counts."""
        self.lost = self.lost or why
        self.group_lost |= group

    @property
    def place(self) -> str | None:
        """Where the next call of all ranks will be, in words; None while something is amiss with the one before."""
        sound, at = not (self.broken or self.lost or self.apart or self.epoch in self._heard), self._all
        return f"call {at.number + 1} of epoch {self.epoch} after {at.made}, digest {at.chain:x}" if sound else None

    def renew(self) -> None:
        """Leaves a broken epoch."""
        self.epoch += 1
        self._begin_epoch()
        self._heard = {epoch: label for epoch, label in self._heard.items() if epoch >= self.epoch}
        self._waiting = {rank: label for rank, label in self._waiting.items() if label.epoch >= self.epoch}

    def approach(self, what: str) -> None:
        """This rank is at its next call, which has not begun yet."""
        self.text, self.course.current, self.finished = what, self.number + 1, False
        if torch._C._current_graph_task_id() == -1:  # else it may be autograd's thread of some device
            self._caller = get_ident()

    @property
    def in_another_thread(self) -> bool:
        """Whether this is not the thread that makes the calls."""
        return self._caller is not None and get_ident() != self._caller and torch._C._current_graph_task_id() == -1

    def begin(self, text: str, digest: bytes, labelled: bool) -> None:
        """Counts a call, whose ``digest`` is that of all that ranks must have alike, and whose messages are
        ``labelled`` or not."""
        self.text = self.course.begin(text, digest, labelled)
        self.posted, self.labelled, self.finished = 0, labelled, False

    def within(self, text: str) -> None:
        """Says what the next call is part of: it does not meet one that is part of something else."""
        self.course.fold(text.encode())

    def ballot(self) -> str:
        """The name of the next agreement, the same on all ranks of the course."""
        course = self.course
        course.ballots += 1
        return f"{self.epoch}.{course.ballots}{course.said}"

    def label(self, what: str) -> Label:
        """That of the next batch of the call under way. Outside of any call, batches are told apart by their order
        alone."""
        self.posted += not self.labelled
        batch = mark(what) if self.number else 0
        return self._label(self.number, batch, Kind.TENSORS, f"{what} of {self.text}")

    def failure(self, error: BaseException, what: str = "", number: int = 0) -> Label:
        """What the others are told of an error in call ``number``, a ``what`` (the current one); of one that this rank
        was told, the same."""
        if (heard := self._heard.get(self.epoch)) is not None:
            return heard
        kind = next((k.__name__ for k in type(error).__mro__ if k.__name__ in _REFUSALS), type(error).__name__)
        kind = _APART if getattr(error, "apart", False) else kind
        text = f"{kind}\n{what or self.text}\n{_text(error)}"
        since = number or getattr(error, "since", 0)  # peers still wait in the earlier of two calls that have met
        return self._label(since or self.course.current, 0, Kind.FAILURE, text)

    def agreement(self, facts: Mapping[str, str]) -> Label:
        """What the others are told by a rank that waits for them in an agreement."""
        name = facts.get("call", "a comparison")
        text = "; ".join([f"a first comparison of {name}", *(f"{fact} {value:.100}" for fact, value in facts.items())])
        return self._label(self.number, 0, Kind.AGREEMENT, text)._replace(chain=self.course.ballots)

    def _label(self, number: int, batch: int, kind: Kind, text: str) -> Label:
        return Label(self.epoch, self.course.ident, number, self.course.chain, batch, self.rank, kind, text)

    def hear(self, label: Label) -> None:
        """Takes in what a rank has told."""
        if label.kind is Kind.FAILURE:
            self._heard.setdefault(label.epoch, label)
        elif label.epoch >= self.epoch:
            self._waiting[label.rank] = label

    def same_call(self, label: Label) -> bool:
        """Whether a failure was of the call that this rank is at, as far as their names tell."""
        mine, theirs = _kind(self.text), _kind([*label.text.split("\n", 2), ""][1])
        return mine == theirs or not {mine, theirs} <= set(CALLS)

    def check(self) -> None:
        """Raises if a rank has failed in this epoch, or waits in an agreement that this one has gone past."""
        if self.broken or not (self._heard or self._waiting):
            return
        failure = self._heard.get(self.epoch)
        if failure is not None and self._reaches(failure):
            self.broken = True
            self.apart |= self._here(failure) and not self.same_call(failure)
            self._raise(failure)
        for label in self._waiting.values():
            course = self._courses.get(label.course)
            if label.epoch == self.epoch and course is not None and course.passed(label.number, label.chain):
                raise self.mismatch(self.label("messages"), label._replace(number=label.number + 1))

    def _here(self, label: Label) -> bool:
        """Whether it is of the same ranks' calls as the one under way."""
        return label.course == self.course.ident

    def _reaches(self, failure: Label) -> bool:
        """Whether a failure is one of the call under way: one before the call that failed is still right. Calls of
        other ranks have no order; theirs are failures of all."""
        return not self._here(failure) or failure.number <= self.course.current

    def _raise(self, label: Label) -> NoReturn:
        kind, call, text = [*label.text.split("\n", 2), "", ""][:3]
        refusal = _REFUSALS.get(kind)
        if refusal is CallMismatch:
            error: Exception = CallMismatch(text, kind == _APART)
        elif refusal is not None:
            error = refusal(f"rank {label.rank} refused the call: {text}")
        else:
            error = PeerError(f"rank {label.rank} failed in call {label.number} ({call}) with {kind}: {text}")
        error.add_note(f"told to rank {self.rank} by rank {label.rank}, on which it was raised")
        raise error

    def mismatch(self, mine: Label, theirs: Label) -> CallMismatch:
        """The error where messages of two calls meet: what they are, and in what they differ."""
        same = (mine.number, mine.text) == (theirs.number, theirs.text)
        hint = "; the calls before it differ" if same else ""
        ends = " but ".join(_beside(one, other) for one, other in ((mine, theirs), (theirs, mine)))
        rule = "every rank must make the same calls, with the same settings, in the same order"
        since = min(mine.number, theirs.number) if mine.course == theirs.course else 0
        return CallMismatch(f"{ends}{hint}: {rule}", mine.number != theirs.number or mine.call != theirs.call, since)


def _kind(text: str) -> str:
    """Of a call, by its name in texts."""
    name = text.split("; ")[0]
    return "attention forward" if name == "attention" or name.startswith("a layer of") else name


def _text(error: BaseException) -> str:
    """What an error says; its class may be a user's, and unable to."""
    try:
        return str(error)
    except Exception as other:
        return f"(its text cannot be had: {type(other).__name__})"


def _beside(one: Label, other: Label) -> str:
    """A label without what the other says too."""
    what, *facts = one.text.split("; ")
    said = other.text.split("; ")
    own = "; ".join([what, *(fact for fact in facts if fact not in said)])
    return f"rank {one.rank} is at call {one.number} ({own:.600})"


def together(transport: Transport, what: str) -> AbstractContextManager[object]:
    """What raises in here on one rank raises on all of them. The first to be entered after that begins an epoch.
    ``what`` names what has not begun yet in error texts."""
    nobody_else = transport.world_size == 1 and transport.name not in transport.log.subsets
    return nullcontext() if nobody_else else _Together(transport, what)


class _Together:
    """No generator: one that is dropped would raise in its `with`, and later."""

    def __init__(self, transport: Transport, what: str) -> None:
        self.transport, self.what, log = transport, what, transport.log
        self.course, self.before = log.course_of(transport.name), log.course
        self.made = self.course.made

    def __enter__(self) -> None:
        self.transport.log.course = self.course
        try:
            self._approach()
        except BaseException as error:
            self._leave(error)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        try:
            if error is not None:
                self._tell(error)
        finally:
            self.transport.log.course = self.before

    def _approach(self) -> None:
        log = self.transport.log
        log.approach(self.what)
        self.transport.check_open()
        if log.lost is not None:
            raise CallMismatch(log.lost)
        if log.broken:
            log.renew()
            log.approach(self.what)

    def _tell(self, error: BaseException) -> None:
        """Tells the others, unless activation checkpointing has ended a forward of which it needs no more."""
        if self.transport.log.finished and isinstance(error, _StopRecomputationError):
            return
        try:
            _tell(self.transport, error, self.made)
        except BaseException:  # a second interrupt, right after the first
            _tell(self.transport, error, self.made)
            raise


class told:
    """What raises in here on one rank, all ranks raise in the call that they make next. For what prepares a call and
    moves nothing, in any thread."""

    def __init__(self, transport: Transport, what: str) -> None:
        self.transport, self.what = transport, what

    def __enter__(self) -> None:
        """See the class."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        log = self.transport.log
        if error is None or log.broken or (self.transport.world_size == 1 and self.transport.name not in log.subsets):
            return
        if log.in_another_thread:  # it cannot be put at one place of the program: all ranks are told in the next call
            thread = f"in a thread of rank {log.rank} that makes no calls"
            text = f"{self.what} was refused {thread}: {type(error).__name__}: {_text(error)}"
            log.hear(log.failure(CallMismatch(text, apart=True), self.what, log.number + 1))
            return
        before, log.course = log.course, log.course_of(self.transport.name)
        log.text, log.course.current = self.what, log.number + 1
        try:
            _tell(self.transport, error, log.course.made)
        finally:
            log.course = before


def _tell(transport: Transport, error: BaseException, made: int) -> None:
    """Ends the epoch on this rank, where so many calls had been made before, and warns the others."""
    log = transport.log
    if log.in_child:
        return

    log.apart |= getattr(error, "apart", False)
    if log.broken and log.warned:
        return

    def tell() -> None:
        log.broken = True
        if not log.warned:
            log.warned = True
            log.failed = _kind(log.failure(error).text.split("\n", 2)[1])
            log.course.made = max(log.course.made, made + 1)  # a call that is refused before it begins is one, too
            with suppress(Exception):  # the error itself matters more
                transport.warn(log.failure(error))

    shield(tell)
