"""What a step allocates, to the byte: on a CPU by the profiler's record of every block that PyTorch's allocators hand
out and take back, on a GPU by the allocator's own counters. Buffers that processes of a machine share are mapped by
each: they count where they were made, and are told by the workspace that holds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ringattn.comm.shared_block import SharedBlock
from ringattn.runtime.workspace import Workspace

MEMORY, MAPPED = "[memory]", "aten::from_file"  # an event of the profiler that is a block; what maps a peer's


@dataclass(slots=True)
class Measured:
    """``peak``: the most that was there at a time, in bytes above what there was at the beginning."""

    peak: int = 0


@contextmanager
def measured(device: torch.device, workspace: Workspace) -> Iterator[Measured]:
    """Looks on while something runs. On a CPU it must not be within another profile."""
    found = Measured()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.peak = torch.cuda.max_memory_allocated(device) - before
        return
    shared = _shared(workspace)
    # not torch.profiler.profile, which makes a tree of Python objects of all events: most of a gigabyte of the process
    with torch.autograd.profiler.profile(use_cpu=True, use_kineto=True, profile_memory=True) as profile:
        yield found
    found.peak = _peak(profile.kineto_results.events()) + _shared(workspace) - shared


def _peak(events: list[Any]) -> int:
    """The largest sum of blocks over time, without those of other processes."""
    mapping = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == MAPPED]
    blocks = [(e.start_ns(), index, e.nbytes()) for index, e in enumerate(events) if e.name() == MEMORY]
    own = (block for block in sorted(blocks) if not any(a <= block[0] <= b for a, b in mapping))
    return max(accumulate(size for *_, size in own), default=0)


def _shared(workspace: Workspace) -> int:
    return sum(x.nbytes for x in workspace.buffers() if SharedBlock.of(x) is not None)
