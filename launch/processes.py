"""The processes of a run: started by torchrun they form one group (gloo on CPUs, NCCL on GPUs), started
plainly there is one of them. Here are the few things the processes do together outside attention."""

import ctypes
import gc
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

DEADLINE = timedelta(minutes=10)


@dataclass(slots=True)
class World:
    """The processes of a run as seen by one of them. `group` is None for a single one; `waited` are the
    seconds this process has spent in `sum_`."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    waited: float = 0.0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over the processes, in one transfer."""
        if self.group is None:
            return
        start = time.perf_counter()
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))
        self.waited += time.perf_counter() - start

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by rank 0's."""
        if self.group is not None:
            for tensor in tensors:
                dist.broadcast(tensor, src=0, group=self.group)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. For small things, outside the loop."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, values: dict[str, Any]) -> None:
        """Raises ValueError on every rank, naming the ranks and the value, unless all ranks hold the same
        values."""
        everyone = self.gather(values)
        for name in values:
            ranks = [rank for rank, other in enumerate(everyone) if other[name] != everyone[0][name]]
            if ranks:
                raise ValueError(
                    f"rank 0 has {name} {everyone[0][name]!r}, rank {ranks[0]} has "
                    f"{everyone[ranks[0]][name]!r}; start every rank with the same arguments, text and files"
                )

    def peak_memory(self) -> int:
        """Largest memory this process has held, in bytes: allocated by CUDA, or resident."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        """Leaves the group and lets go of it. gloo's threads end with the last reference; one still at work
        while the interpreter shuts down would abort the process."""
        if self.group is not None:
            self.group = None
            dist.destroy_process_group()
            gc.collect()


def check_device(device: str) -> None:
    """Raises ValueError where this machine has fewer GPUs than the launcher has started ranks here."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cuda" and torch.cuda.device_count() < ranks:
        raise ValueError(
            f"{ranks} ranks want a GPU each and this machine shows {torch.cuda.device_count()}; start fewer "
            'ranks, or take a config with device = "cpu", such as cpu-128k'
        )


def join(device: str) -> World:
    """Joins the group that torchrun describes in the environment; on its own without torchrun."""
    local_rank, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    else:
        keep_freed_memory()
    if size == 1:
        return World(device=place)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=DEADLINE, device_id=place if device == "cuda" else None)
    return World(dist.get_rank(), size, place, dist.group.WORLD)


def keep_freed_memory() -> None:
    """Tells glibc to serve large blocks from its heap and to keep them when freed. Otherwise every
    activation of a step is fresh pages from the kernel, whose faults cost a third of the step on a CPU."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have no such call
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        mallopt(top_pad, 64 << 20)
