"""Runs a function on real processes, one for each rank, inside one process group: a failure or a death is told at once
by rank, nothing waits for ever, and nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from ringattn.comm.transport import name_ranks

PACKAGE = os.path.dirname(os.path.dirname(__file__))
ENDING = 5.0  # seconds that a process may take to end once it has answered


class ProcessError(RuntimeError):
    """Some ranks gave no result. ``ranks``: which; ``reason``: why, without naming them."""

    def __init__(self, ranks: Collection[int], world_size: int, reason: str) -> None:
        self.ranks, self.world_size, self.reason = tuple(sorted(ranks)), world_size, reason
        super().__init__(f"{name_ranks(self.ranks)} of {world_size}: {reason}")


class ProcessRaised(ProcessError):
    """A rank raised. The reason begins with what, and where the caller's own code was; then comes the traceback."""


class ProcessDied(ProcessError):
    """A rank died without a result and without raising."""


class ProcessesLate(ProcessError):
    """Ranks gave no result in time."""


def run_processes(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    casualties: Collection[int] = (),
    backend: str = "gloo",
    reraise: tuple[type[BaseException], ...] = (),
) -> list[Any]:
    """Calls ``fn(rank, world_size, *args)`` in ``world_size`` processes, inside a process group of them all.

    The processes come from a fork server, with one thread and one seed each; what is in its preload list
    (``multiprocessing.set_forkserver_preload``) they need not import. When this returns or raises, all have ended.

    Args:
        fn: a function at the top of a module that a new process can import.
        world_size: number of processes.
        args: pickled, as are the results; tensors by value.
        timeout: seconds for all of it, and for any wait of the group.
        casualties: ranks that are meant to die; the result of one that does is None.
        backend: gloo, or nccl, where ranks share the GPUs (see :func:`share_gpus`).
        reraise: exceptions of these types are raised here as they are, if they can be pickled.

    Returns:
        The results by rank.

    Raises:
        ProcessRaised: a rank raised; the first one to.
        ProcessDied: a rank died that was not meant to.
        ProcessesLate: ranks gave no result within ``timeout``.
    """
    context = multiprocessing.get_context("forkserver")
    # This process hosts the store, on a port that the system picks, so it survives the death of any rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    call = pickle.dumps((fn, args))  # tensors by value: torch would pass them as open files
    places = [_Place(rank, world_size, store.port, timeout, backend, reraise) for rank in range(world_size)]
    children = [
        context.Process(target=_child, args=(place, writer, call), daemon=True)
        for place, (_, writer) in zip(places, pipes, strict=True)
    ]
    try:
        for child, (_, writer) in zip(children, pipes, strict=True):
            child.start()
            writer.close()
        results = _collect([reader for reader, _ in pipes], timeout, casualties)
        for child in children:
            child.join(ENDING)
        return results
    finally:
        for child in children:
            if child.pid is not None:
                child.kill()
                child.join()
                child.close()
        for reader, _ in pipes:
            reader.close()


def share_gpus(rank: int) -> None:
    """Lets NCCL run more ranks than there are GPUs: it takes each process for a host of its own."""
    os.environ |= {"NCCL_HOSTID": f"rank {rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    torch.cuda.set_device(rank % torch.cuda.device_count())


@dataclass(frozen=True)
class _Place:
    """What a process needs to join its group."""

    rank: int
    world_size: int
    port: int
    timeout: float
    backend: str
    reraise: tuple[type[BaseException], ...]


@dataclass(frozen=True)
class _Answer:
    """What a process gives: its function's result, what it raised in words, or an exception to be raised again."""

    result: Any = None
    raised: str | None = None
    error: BaseException | None = None


def _collect(readers: Sequence[Connection], timeout: float, casualties: Collection[int]) -> list[Any]:
    results: list[Any] = [None] * len(readers)
    waiting = {reader: rank for rank, reader in enumerate(readers)}
    deadline = time.monotonic() + timeout
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            reason = f"no answer within {timeout:g} s: it waits for another rank, or is slow"
            raise ProcessesLate(waiting.values(), len(readers), reason)
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = waiting.pop(reader)
            try:
                answer: _Answer = pickle.loads(reader.recv_bytes())
            except EOFError:
                if rank in casualties:
                    continue
                reason = "the process died without a word: killed, or out of memory"
                raise ProcessDied([rank], len(readers), reason) from None
            if answer.error is not None:
                raise answer.error
            if answer.raised is not None:
                raise ProcessRaised([rank], len(readers), answer.raised)
            results[rank] = answer.result
    return results


def _child(place: _Place, pipe: Connection, call: bytes) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        fn, args = pickle.loads(call)
        _join(place)
        pipe.send_bytes(pickle.dumps(_Answer(fn(place.rank, place.world_size, *args))))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:
        with suppress(OSError):  # it has answered already, and nobody listens any more
            pipe.send_bytes(_told(error, place.reraise))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a group with a failed peer, or what the function started, may not come down cleanly


def _join(place: _Place) -> None:
    """Begins the process group, on all ranks: one that ended while another still connects would fail that one."""
    if place.backend == "nccl":
        share_gpus(place.rank)
    deadline = timedelta(seconds=place.timeout)
    store = dist.TCPStore("127.0.0.1", place.port, is_master=False, timeout=deadline)
    dist.init_process_group(place.backend, store=store, rank=place.rank, world_size=place.world_size, timeout=deadline)
    if store.add("ringattn ranks that have joined", 1) == place.world_size:
        store.set("ringattn: all have joined", "")
    store.wait(["ringattn: all have joined"])


def _told(error: BaseException, reraise: tuple[type[BaseException], ...]) -> bytes:
    if isinstance(error, reraise):
        with suppress(Exception):  # one that cannot be pickled is told in words
            answer = pickle.dumps(_Answer(error=error))
            pickle.loads(answer)
            return answer
    return pickle.dumps(_Answer(raised=_in_words(error)))


def _in_words(error: BaseException) -> str:
    """What was raised, first and where the caller's own code last was, then the traceback."""
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
