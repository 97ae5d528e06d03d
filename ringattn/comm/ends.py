"""The two ends of a connection, which must count its messages alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from ringattn.comm.calls import CallLog

P = ParamSpec("P")
Result = TypeVar("Result")


class End(Protocol):
    """One of them: ``torn`` once it may not count as the other does."""

    torn: bool
    _log: CallLog


Some = TypeVar("Some", bound=End)


def whole(step: Callable[Concatenate[Some, P], Result]) -> Callable[Concatenate[Some, P], Result]:
    """A step after which both ends count alike: what is raised in the middle of it (by a signal's handler, at any
    place) leaves the connection torn."""

    @wraps(step)
    def watched(self: Some, *args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return step(self, *args, **kwargs)
        except BaseException:
            self.torn = self._log.torn = True
            raise

    return watched
