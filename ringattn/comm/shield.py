"""Work that is done to its end, whatever a signal's handler raises meanwhile."""

from __future__ import annotations

import _thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident, main_thread
from typing import TypeVar

import torch

Result = TypeVar("Result")


def shield(work: Callable[[], Result], stop: Callable[[], None] = lambda: None) -> Result:
    """Does ``work``, in the same modes and on the same CUDA stream, and returns or raises what it does. What a signal's
    handler raises in the meantime (Ctrl-C, a time limit of the user's) is raised when it is done; ``stop`` is called
    then, and may make the work's end come soon.

    Handlers are called in the main thread alone, between any two steps of Python. So the work is done in another.
    """
    if torch.compiler.is_compiling() or get_ident() != main_thread().ident:
        return work()
    task = _Task(work, stop)
    interrupts: list[BaseException] = []
    while not task.outcome:
        try:
            task.wait(interrupts)
        except BaseException as error:  # a second one right after the first
            interrupts.append(error)
    result, failure = task.outcome[0]
    if interrupts:
        raise interrupts[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


class _Task:
    """Work that one thread does, once."""

    def __init__(self, work: Callable[[], Result], stop: Callable[[], None]) -> None:
        stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        self.stop = stop
        self.work, self.modes = work, _as_in(torch.is_inference_mode_enabled(), torch.is_grad_enabled(), stream)
        self.outcome: list[tuple[object, BaseException | None]] = []
        self._begun, self._done = Lock(), Lock()
        self._done.acquire()

    def wait(self, interrupts: list[BaseException]) -> None:
        """Has it done in a new thread, or here where none can be had, and waits until it is."""
        while not self.outcome:
            try:
                try:
                    _thread.start_new_thread(self.run, ())  # of a Thread's steps in Python, handlers could stop some
                except RuntimeError as error:
                    if "can't start new thread" not in str(error):
                        raise
                    self.run()
                self._done.acquire()
            except BaseException as error:
                interrupts.append(error)
                self.stop()

    def run(self) -> None:
        """Does it, if nobody has begun to."""
        if not self._begun.acquire(blocking=False):
            return
        try:
            with self.modes:
                self.outcome.append((self.work(), None))
        except BaseException as error:
            self.outcome.append((None, error))
        finally:
            self._done.release()


@contextmanager
def _as_in(inference: bool, grad: bool, stream: torch.cuda.Stream | None) -> Iterator[None]:
    """What a new thread does not inherit."""
    with torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.cuda.stream(stream):
        yield
