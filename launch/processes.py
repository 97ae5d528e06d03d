"""The processes of a run: started by torchrun they form one group (gloo on CPUs, NCCL on GPUs), started
plainly there is one of them. Here are the few things the processes do together outside attention."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.integrations.fsdp import data_context_mesh

DEADLINE = timedelta(minutes=10)


@dataclass(slots=True)
class World:
    """The processes of a run as seen by one of them. `group` is None for a single one; `mesh` is data x context once
    they are `split`."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None

    def split(self, replicas: int) -> None:
        """Makes the processes `replicas` groups that share a sequence each. Raises ValueError where that leaves some
        over."""
        if self.size % replicas:
            raise ValueError(
                f"data_parallel is {replicas} over {self.size} ranks, which leaves {self.size % replicas} over; start "
                "a multiple of it, or set another data_parallel"
            )
        if self.group is not None:
            self.mesh = data_context_mesh(self.device.type, data=replicas)

    @property
    def replicas(self) -> int:
        """How many groups read samples of their own."""
        return 1 if self.mesh is None else self.mesh["dp"].size()

    @property
    def replica(self) -> int:
        """Which of them this process is in."""
        return 0 if self.mesh is None else self.mesh["dp"].get_local_rank()

    @property
    def context(self) -> DeviceMesh | None:
        """The processes that share a sequence with this one."""
        return None if self.mesh is None else self.mesh["cp"]

    def sum_(self, values: Sequence[Tensor | float]) -> list[float]:
        """The sum of each scalar over the processes, in one transfer."""
        numbers = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.device)
        if self.group is not None:
            dist.all_reduce(numbers, group=self.group)
        return numbers.tolist()

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
            self.group = self.mesh = None
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
