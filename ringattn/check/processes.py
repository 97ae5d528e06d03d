"""Runs a function in one gloo process for each rank: a failure or a death is told at once, nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from ringattn.check.settings import SubjectError

PACKAGE = os.path.dirname(os.path.dirname(__file__))


class CheckError(RuntimeError):
    """The check could not be made: a process raised (the text is its traceback), died, or gave no answer in time."""


def run_processes(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float) -> list[Any]:
    """``fn(rank, world_size, *args)`` in a process for each rank, inside a gloo group of them all; results by rank.

    ``fn`` is a function at the top of a module; arguments and results are pickled. Raises :class:`CheckError`.
    """
    context = multiprocessing.get_context("forkserver")
    # The parent hosts the store, on a port that the system picks, so it survives the death of any rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    call = pickle.dumps((fn, args))  # tensors by value: torch would pass them as open files
    children = [
        context.Process(target=_child, args=(rank, world_size, store.port, writer, timeout, call), daemon=True)
        for rank, (_, writer) in enumerate(pipes)
    ]
    try:
        for child, (_, writer) in zip(children, pipes, strict=True):
            child.start()
            writer.close()
        results = _collect([reader for reader, _ in pipes], timeout)
        for child in children:
            child.join(5.0)
        return results
    finally:
        for child in children:
            if child.pid is not None:
                child.kill()
                child.join()
                child.close()
        for reader, _ in pipes:
            reader.close()


def _collect(readers: Sequence[Connection], timeout: float) -> list[Any]:
    results: list[Any] = [None] * len(readers)
    waiting = {reader: rank for rank, reader in enumerate(readers)}
    deadline = time.monotonic() + timeout
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            ranks = ", ".join(map(str, sorted(waiting.values())))
            raise CheckError(
                f"no answer from rank {ranks} of {len(readers)} within {timeout:g} s: it waits for another rank, or is "
                "slow; make the model smaller, or raise --timeout"
            )
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = waiting.pop(reader)
            try:
                results[rank], failure, theirs = pickle.loads(reader.recv_bytes())
            except EOFError:
                theirs, failure = False, "the process died without a word: killed, or out of memory"
            if failure is not None:
                who = f"rank {rank} of {len(readers)}: " if len(readers) > 1 else "on one process: "
                raise CheckError(failure if theirs else who + failure)
    return results


def _child(rank: int, world_size: int, port: int, pipe: Connection, timeout: float, call: bytes) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    deadline = timedelta(seconds=timeout)
    try:
        fn, args = pickle.loads(call)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=deadline)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=deadline)
        answer = pickle.dumps((fn(rank, world_size, *args), None, False))
        dist.destroy_process_group()
        pipe.send_bytes(answer)
    except SubjectError as error:
        pipe.send_bytes(pickle.dumps((None, str(error), True)))
    except BaseException as error:
        pipe.send_bytes(pickle.dumps((None, _in_short(error), False)))
    os._exit(0)  # a group with a failed peer, or what the model started, may not come down cleanly


def _in_short(error: BaseException) -> str:
    """What was raised, first and where the user's own code last was, then the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((PACKAGE, "<frozen")) and "site-packages" not in f.filename]
    place = f" at {own[-1].filename}:{own[-1].lineno} in {own[-1].name}" if own else ""
    said = "".join(traceback.format_exception_only(error)).strip()
    return f"{said}{place}\n\n{''.join(traceback.format_exception(error))}"


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
