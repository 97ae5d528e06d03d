"""What a step allocates, to the byte: on a CPU by the profiler's record of every block that PyTorch's allocators hand
out and take back, on a GPU by the allocator's own counters. Buffers that processes of a machine share are mapped by
each: they count where they were made, and are told by the workspace that holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch

from ringattn.comm.shared_block import SharedBlock
from ringattn.kernels import windows
from ringattn.runtime.workspace import Workspace

T = TypeVar("T")
MEMORY, MAPPED = "[memory]", "aten::from_file"  # an event of the profiler that is a block; what maps a peer's


def advice(action: Callable[[], T]) -> tuple[T | None, str]:
    """What an account or a count says, or why it says nothing: no error of it is to end what it is about."""
    try:
        return action(), ""
    except ValueError as refused:
        return None, str(refused)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


@dataclass(slots=True)
class Measured:
    """``peak``: the most that was there at a time, in bytes above what there was at the beginning; or the ``problem``
    for which it was not counted."""

    peak: int = 0
    problem: str = ""


@contextmanager
def measured(device: torch.device, workspace: Workspace) -> Iterator[Measured]:
    """Looks on while something runs, whose errors pass; its own are a ``problem``. On a CPU it must not be within
    another profile."""
    found, counter = Measured(), _Allocator(device) if device.type == "cuda" else _Blocks(workspace)
    _, found.problem = advice(counter.begin)
    try:
        yield found
    finally:
        if not found.problem:
            peak, found.problem = advice(counter.end)
            found.peak = peak or 0


@dataclass(slots=True)
class _Allocator:
    """CUDA's own counters."""

    device: torch.device
    before: int = 0

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = torch.cuda.memory_allocated(self.device)

    def end(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.before


class _Blocks:
    """The profiler's record of every block of a CPU, with what of the workspace lies in shared memory."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.before = workspace, 0
        # not torch.profiler.profile, which makes a tree of Python objects of all events: most of a GB of the process
        self.profile = torch.autograd.profiler.profile(use_cpu=True, use_kineto=True, profile_memory=True)

    def begin(self) -> None:
        windows.forget()  # so that a step counts what it keeps, whatever was computed before
        self.before = _shared(self.workspace)
        self.profile.__enter__()

    def end(self) -> int:
        self.profile.__exit__(None, None, None)
        assert self.profile.kineto_results is not None, "it has ended"
        return _peak(self.profile.kineto_results.events()) + _shared(self.workspace) - self.before


def _peak(events: list[Any]) -> int:
    """The largest sum of blocks over time, without those of other processes."""
    mapping = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == MAPPED]
    blocks = [(e.start_ns(), index, e.nbytes()) for index, e in enumerate(events) if e.name() == MEMORY]
    own = (block for block in sorted(blocks) if not any(a <= block[0] <= b for a, b in mapping))
    return max(accumulate(size for *_, size in own), default=0)


def _shared(workspace: Workspace) -> int:
    return sum(x.nbytes for x in workspace.buffers() if SharedBlock.of(x) is not None)
