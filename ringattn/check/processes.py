"""The processes of a check, and what is said where one of them gives no result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ringattn.check.settings import SubjectError
from ringattn.testing import processes


class CheckError(RuntimeError):
    """The check could not be made: a process raised (the text is its traceback), died, or gave no answer in time."""


def run_processes(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float) -> list[Any]:
    """``fn(rank, world_size, *args)`` in a gloo process for each rank (see :func:`ringattn.testing.run_processes`);
    results by rank. Raises :class:`CheckError`, of a :class:`SubjectError` with its text alone."""
    try:
        return processes.run_processes(fn, world_size, *args, timeout=timeout, reraise=(SubjectError,))
    except SubjectError as error:
        raise CheckError(str(error)) from None
    except processes.ProcessError as error:
        text = str(error) if world_size > 1 else f"on one process: {error.reason}"
        remedy = "; make the model smaller, or raise --timeout" if isinstance(error, processes.ProcessesLate) else ""
        raise CheckError(text + remedy) from None
