"""Signals that ask a run to stop. It imports nothing heavy: a process of many listens before it loads torch, because
the launcher sends SIGTERM to the ranks that are left when one dies, and they are to say which."""

import select
import signal
import socket
from types import FrameType


class StopSignal:
    """Remembers the first SIGINT or SIGTERM instead of dying of it. Further ones change nothing: a launcher
    passes on what the terminal has already sent. `threads`: whether other threads `wait` for it."""

    def __init__(self, threads: bool = False) -> None:
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)
        if threads:
            # Python's handlers run in the main thread alone, which may sit in a collective
            self._heard, self._bell = socket.socketpair()
            self._heard.setblocking(False)
            self._bell.setblocking(False)
            signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)

    def wait(self, seconds: float) -> bool:
        """Sleeps, in any thread but the main one; True as soon as a signal has come, even if the main thread does not
        know yet."""
        if not select.select([self._heard], [], [], seconds)[0]:
            return False
        self._heard.recv(4096)
        return True

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
