"""The watch: says by name which transfers between GPUs are overdue.

A wait for such a transfer orders a stream and holds up no host, so nobody on the host knows that it is in vain. What
ends the process is the watchdog of the group's engine, whose text knows an operation's number and no call. The watch
looks at the transfers under way now and then, from a thread of its own, and speaks before the watchdog does.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import Event, Thread
from typing import NamedTuple, Protocol, runtime_checkable

import torch.distributed as dist

EARLY = 0.9  # of a deadline
LOOKS = 20  # in the time of a deadline


class _Overdue(NamedTuple):
    since: float
    works: Sequence[dist.Work]
    say: Callable[[], str]

    @property
    def over(self) -> bool:
        try:
            return all(work.is_completed() for work in self.works)
        except RuntimeError:  # its engine has given up, and says so itself
            return True


class Watch:
    """Watches transfers that were started one after the other. Its thread begins with the first of them and ends with
    `close()`.

    Args:
        timeout: seconds after which a transfer is in vain; it is told of a little earlier, once until others come.
        tell: what is done with the text.
    """

    def __init__(self, timeout: float, tell: Callable[[str], None] | None = None) -> None:
        self.timeout, self.tell = timeout, tell or _to_stderr
        self._under_way: deque[_Overdue] = deque()
        self._ended = Event()
        self._thread: Thread | None = None

    def add(self, works: Sequence[dist.Work], say: Callable[[], str]) -> None:
        """Begins to watch what was started just now. ``say``: what it is, in words, asked for when it is overdue."""
        if works:
            self._under_way.append(_Overdue(time.monotonic(), works, say))
            if self._thread is None:
                self._thread = Thread(target=self._look, name="ringattn watch", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Watches no more."""
        self._ended.set()
        self._under_way.clear()

    def _look(self) -> None:
        told: _Overdue | None = None
        while not self._ended.wait(self.timeout / LOOKS):
            first = self._first()
            if first is not None and first is not told and time.monotonic() - first.since > EARLY * self.timeout:
                told = first
                self.tell(f"{first.say()}; it has been under way for {time.monotonic() - first.since:.1f} s")

    def _first(self) -> _Overdue | None:
        """The oldest that is not over."""
        while self._under_way:
            first = self._under_way[0]
            if not first.over:
                return first
            if self._under_way:  # else it was closed meanwhile
                self._under_way.popleft()
        return None


@runtime_checkable
class Watching(Protocol):
    """A transport some of whose transfers no host waits for."""

    watch: Watch


@runtime_checkable
class Unwaited(Protocol):
    """A batch of such transfers."""

    works: Sequence[dist.Work]


def _to_stderr(text: str) -> None:
    print(f"ringattn: {text}", file=sys.stderr, flush=True)
