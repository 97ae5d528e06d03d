"""The processes of a run: started by torchrun, mpiexec or srun they form one group (gloo on CPUs, NCCL on GPUs),
started plainly there is one of them. Here are the few things the processes do together outside attention, and how one
that cannot go on ends all of them with the same line."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from launch.board import ALONE, DONE, Attempt, Board, connect, find_attempt, new_store
from launch.stopping import StopSignal
from ringattn.comm.started import part_of_mpi, ranks_of_mpi
from ringattn.context import Group
from ringattn.integrations.fsdp import data_context_mesh
from ringattn.testing import share_gpus

# what a rank refuses in one line; an error of another kind is a fault in the program
REFUSALS = (ValueError, NotImplementedError, ImportError, OSError, MemoryError)


@dataclass(slots=True)
class World:
    """The processes of a run as seen by one of them. `group` is None for a single one; `mesh` is data x context once
    they are `split`, `meshes` are all of those so far, by their replicas; `board` is what they tell each other beside
    the group; `step` is the one that is under way."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None
    meshes: dict[int, DeviceMesh] = field(default_factory=dict)
    board: Board | None = None
    attempt: Attempt = ALONE
    step: int | None = None

    def at(self, phase: str) -> None:
        """Tells the other ranks what this one does from now on."""
        if self.board is not None:
            self.board.at(phase if self.step is None else f"step {self.step}, {phase}")

    def split(self, replicas: int) -> None:
        """Makes the processes `replicas` groups that share a sequence each, which divides their number."""
        if self.group is None:
            return
        if replicas not in self.meshes:
            self.meshes[replicas] = mesh = data_context_mesh(self.device.type, data=replicas)
            mesh["dp", "cp"]._flatten()  # what parameters are sharded over
            if self.board is not None:
                limit_waits(self.board.timeout)
        self.mesh = self.meshes[replicas]

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

    def ring(self, transport: str) -> Group:
        """What attention's messages go over among them: their mesh, or MPI's communicator."""
        if transport != "mpi" or self.mesh is None:
            return self.context
        return part_of_mpi(self.size, self.replica, self.rank)

    def sum_(self, values: Sequence[Tensor | float]) -> list[float]:
        """The sum of each scalar over the processes, in one transfer."""
        numbers = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.device)
        if self.group is not None:
            dist.all_reduce(numbers, group=self.group)
        return numbers.tolist()

    def largest(self, value: Tensor) -> float:
        """The largest of every process's scalar."""
        number = value.detach().double().clone()
        if self.group is not None:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        return float(number)

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

    def tell(self, value: Any) -> list[Any]:
        """Every rank's value, as `gather`, for what JSON can hold; a rank that is lost is named."""
        return self.gather(value) if self.board is None else self.board.gather(value)

    def together(self, action: Callable[[], Any]) -> list[Any]:
        """Runs `action` on every rank and returns every rank's result (what JSON can hold), in rank order. Where it
        is refused on any, all of them raise the first one's error, so that no rank waits for another in vain."""
        result, said, kind = None, "", ""
        try:
            result = action()
        except REFUSALS as error:
            said, kind = str(error) or type(error).__name__, kind_of(error)
        everyone = self.tell([kind, said, result])
        refused = [rank for rank, (kind, _, _) in enumerate(everyone) if kind]
        if refused:
            kind, said, _ = everyone[refused[0]]
            where = "" if len(refused) == self.size else f"rank {refused[0]}: "
            raise KINDS[kind](where + said)
        return [result for _, _, result in everyone]

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

    @property
    def device_name(self) -> str:
        """As the driver calls this process's device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def peak_memory(self) -> int:
        """Largest memory this process has held, in bytes: allocated by CUDA, or resident."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        """Leaves the group and lets go of it. gloo's threads end with the last reference; one still at work
        while the interpreter shuts down would abort the process."""
        if self.board is not None:
            self.board.end(DONE, 0, "it is done")
        if self.group is not None:
            self.group = self.mesh = None
            self.meshes.clear()
            dist.destroy_process_group()
            gc.collect()


KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in REFUSALS}


def kind_of(error: Exception) -> str:
    """Which of the refusals it is."""
    return next(name for name, kind in KINDS.items() if isinstance(error, kind))


def limit_waits(timeout: float) -> None:
    """Gives every group of this process one deadline: groups of a mesh are made with torch's own."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)


def check_device(device: str, share_gpus: bool) -> None:
    """Raises ValueError where this machine has fewer GPUs than the launcher has started ranks here, unless they are to
    share them."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cuda" and torch.cuda.device_count() < (1 if share_gpus else ranks):
        raise ValueError(
            f"{ranks} ranks want a GPU each and this machine shows {torch.cuda.device_count()}; start fewer "
            'ranks, or take a config with device = "cpu", such as cpu-128k'
        )


def check_transport(transport: str) -> None:
    """Raises ValueError where attention cannot go over what it is to go over."""
    if transport == "mpi":
        try:
            ranks_of_mpi(int(os.environ.get("WORLD_SIZE", "1")))
        except ImportError as error:
            raise ValueError(f"transport is 'mpi': {error}; pip install -e '.[launch,mpi]'") from None


def meet(world: World, stop: StopSignal | None) -> None:
    """Lets the processes that a launcher describes in the environment tell each other things; they have no group
    yet. Without a launcher there is one."""
    world.size = int(os.environ.get("WORLD_SIZE", "1"))
    world.attempt = find_attempt()
    if world.size > 1:
        world.board = connect(stop)
        world.rank = world.board.rank
        # agents of several machines count restarts each for itself
        world.attempt = Attempt(world.attempt.launch, max(world.board.gather(world.attempt.restarts)))


def join(world: World, device: str, timeout: float, shared: bool = False) -> None:
    """Makes the processes one group, in which no wait is longer than `timeout` seconds. `shared`: several of them may
    have one GPU."""
    place = torch.device("cpu")
    if device == "cuda":
        if shared:
            share_gpus(world.rank)
        number = int(os.environ.get("LOCAL_RANK", "0"))
        place = torch.device("cuda", number % torch.cuda.device_count() if shared else number)
        torch.cuda.set_device(place)
    else:
        keep_freed_memory()
    world.device = place
    if world.board is None:
        return
    world.at("joining the group")
    world.board.timeout = timeout
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.PrefixStore("group", new_store(timeout=timeout)),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout),
        device_id=place if device == "cuda" else None,
    )
    world.group = dist.group.WORLD


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
