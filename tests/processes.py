"""Runs a function on real processes: one gloo group per call, nothing left behind."""

import contextlib
import multiprocessing
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    "torch torch.distributed torch.distributed.checkpoint torch._dynamo numpy pytest ringattn "
    "transformers.models.llama.modeling_llama transformers.models.gemma3.modeling_gemma3 transformers.trainer".split()
)


class ChildError(RuntimeError):
    """A child failed; the text is its traceback."""


def run_processes(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    casualties: Sequence[int] = (),
    backend: str = "gloo",
) -> list[Any]:
    """Calls `fn(rank, world_size, *args)` in `world_size` processes, inside a group of them all.

    `fn` is a function at the top of a module; its results are pickled and returned by rank. The first child
    that fails raises `ChildError` here with its traceback. `casualties` are ranks meant to die: their result
    is None.
    """
    # The parent hosts the store, on a port that the system picks, so it survives the death of any rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
    children = [
        _CONTEXT.Process(
            target=_child, args=(fn, rank, world_size, store.port, pipes[rank][1], timeout, backend, args), daemon=True
        )
        for rank in range(world_size)
    ]
    try:
        for child, (_, writer) in zip(children, pipes, strict=True):
            child.start()
            writer.close()
        results = _collect([reader for reader, _ in pipes], timeout, casualties)
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


def _collect(readers: list[Connection], timeout: float, casualties: Sequence[int]) -> list[Any]:
    results: list[Any] = [None] * len(readers)
    open_ranks = {reader: rank for rank, reader in enumerate(readers)}
    deadline = time.monotonic() + timeout
    while open_ranks:
        ready = wait(list(open_ranks), deadline - time.monotonic())
        if not ready:
            raise ChildError(f"ranks {sorted(open_ranks.values())} gave no result within {timeout} s")
        for reader in ready:
            rank = open_ranks.pop(reader)
            try:
                results[rank], failure = pickle.loads(reader.recv_bytes())
            except EOFError:
                failure = None if rank in casualties else "it died without a result"
            if failure is not None:
                raise ChildError(f"rank {rank} of {len(readers)}:\n{failure}")
    return results


def _child(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    pipe: Connection,
    timeout: float,
    backend: str,
    args: tuple,
) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    deadline = timedelta(seconds=timeout)
    if backend == "nccl":
        share_gpus(rank)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=deadline)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=deadline)
        pipe.send_bytes(pickle.dumps((fn(rank, world_size, *args), None)))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((None, traceback.format_exc())))
        os._exit(1)  # a group with a failed peer may not come down cleanly


def share_gpus(rank: int) -> None:
    """Lets NCCL run more ranks than there are GPUs: it takes each process for a host of its own."""
    os.environ |= {"NCCL_HOSTID": f"rank {rank}", "NCCL_SOCKET_IFNAME": "lo"}
    torch.cuda.set_device(rank % torch.cuda.device_count())


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills memory that torch allocates without initialising it with NaN (integers: the largest value)."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(deterministic)
