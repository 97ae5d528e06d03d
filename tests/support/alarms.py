"""Signals whose handlers raise, at any moment of a call."""

import signal
from collections.abc import Callable
from typing import Any


class Alarm(BaseException):
    """What the handlers of these tests raise."""


def alarmed(call: Callable[[], object], after: float, where: str = "", local: str = "part") -> bool:
    """Whether a signal's handler has raised in a call, so many seconds after its beginning, or later, once it is
    ``where``: in a function of this name that has come to set this local variable."""

    def ring(_: int, frame: Any) -> None:
        while where and frame and not (frame.f_code.co_name == where and local in frame.f_locals):
            frame = frame.f_back
        if armed and (frame or not where):
            raise Alarm
        signal.setitimer(signal.ITIMER_REAL, 1e-5 if armed else 0.0)

    armed = True
    signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, after)
            call()
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0.0)
    except Alarm:
        return True
    return False
