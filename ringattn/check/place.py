"""Where a check of the machine runs: this process among those that its launcher has started, its device, their
group."""

from __future__ import annotations

import gc
import os
import platform
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ringattn.check.processes import CheckError
from ringattn.check.tally import Tally
from ringattn.comm.started import translate
from ringattn.version import VERSION

PLACES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))  # as torchrun names them; of one rank alone


class HeardByAll(CheckError):
    """What every rank raises alike, and one has to say."""


@dataclass(frozen=True)
class Seen:
    """What a rank says of itself. device: as its driver calls it, "cpu" without a GPU; number: its own name of it, ""
    without. nccl_host: its ``NCCL_HOSTID``. threads: that PyTorch computes with on the CPU."""

    rank: int
    host: str
    local_rank: int
    local_ranks: int
    device: str
    number: str
    nccl: str
    nccl_host: str
    threads: int
    torch: str
    python: str
    ringattn: str


@dataclass(frozen=True)
class Place:
    """One rank of a check. ``everyone``: what all ranks say, on rank 0; this one alone elsewhere. ``group`` is None for
    one rank alone."""

    rank: int
    size: int
    device: torch.device
    everyone: tuple[Seen, ...]
    group: dist.ProcessGroup | None
    tally: Tally

    @property
    def timeout(self) -> float:
        return self.tally.timeout

    def leave(self, status: int) -> int:
        """Leaves the group with rank 0's exit status, on all ranks."""
        status = self.tally.close(status)
        if self.group is not None:
            dist.destroy_process_group()
            gc.collect()  # gloo's threads end with the last that refers to them
        return status


def enter(timeout: float) -> Place:
    """Joins the ranks that torchrun, mpiexec or srun has started, on the GPU of this one's number or on the CPU; one
    rank alone without a launcher. ``timeout``: seconds for any wait.

    Raises:
        CheckError: the ranks cannot meet.
        HeardByAll: they can, and should not go on: different devices, or a GPU that several share.
    """
    try:
        translate()
    except ValueError as error:
        raise CheckError(str(error)) from None
    rank, size, local = (int(os.environ.get(key, alone)) for key, alone in PLACES)
    device = own_device(local)
    if size == 1:
        return Place(0, 1, device, (_seen(0, local, device),), None, Tally(None, 0, 1, timeout))
    deadline = timedelta(seconds=timeout)
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=deadline)))
    except (RuntimeError, ValueError) as error:
        raise CheckError(f"rank {rank}: the {size} ranks do not meet within {timeout:g} s: {error}") from None
    tally = Tally(dist.PrefixStore("ringattn check", store), rank, size, timeout)
    seen, everyone = _seen(rank, local, device), list[Seen]()

    def judge(answers: list[dict | None]) -> str:
        everyone.extend(Seen(**answer) for answer in answers if answer is not None)
        absent = [place for place, answer in enumerate(answers) if answer is None]
        return f"ranks {absent} did not come within {timeout:g} s" if absent else refusal(everyone)

    if why := tally.settle(asdict(seen), judge):
        tally.close(None)
        raise HeardByAll(why)
    try:
        _begin_group(dist.PrefixStore("group", store), rank, size, deadline, device)
    except RuntimeError as error:
        raise CheckError(f"rank {rank}: the {size} ranks make no group: {error}") from None
    return Place(rank, size, device, tuple(everyone) or (seen,), dist.group.WORLD, tally)


def _begin_group(store: dist.Store, rank: int, size: int, timeout: timedelta, device: torch.device) -> None:
    """Over gloo, and for tensors of GPUs over NCCL."""
    gpu = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device if gpu else None
    )


def own_device(local_rank: int) -> torch.device:
    """The GPU that this rank computes on from now on; ranks beyond a machine's GPUs share them. The CPU where PyTorch
    sees no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _seen(rank: int, local_rank: int, device: torch.device) -> Seen:
    on_gpu = device.type == "cuda"
    return Seen(
        rank=rank,
        host=socket.gethostname(),
        local_rank=local_rank,
        local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        number=str(torch.cuda.get_device_properties(device).uuid) if on_gpu else "",
        nccl=".".join(map(str, torch.cuda.nccl.version())) if on_gpu else "",
        nccl_host=os.environ.get("NCCL_HOSTID", ""),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        ringattn=VERSION,
    )


def refusal(everyone: Sequence[Seen]) -> str:
    """Why these ranks cannot be one group, with the remedy; "" where they can."""
    without = [seen.rank for seen in everyone if not seen.number]
    if without and len(without) < len(everyone):
        return (
            f"ranks {_few(without)} see no GPU and the others do: give all of them one, or hide them from all "
            "(CUDA_VISIBLE_DEVICES=)"
        )
    for ranks in shared_gpus(everyone):
        if len({seen.nccl_host for seen in ranks} - {""}) < len(ranks):
            return (
                f"ranks {_few([seen.rank for seen in ranks])} share a GPU of {ranks[0].host}, and NCCL takes one rank "
                "of a host on each: start as many ranks as there are GPUs; or give each its own host for NCCL, "
                "NCCL_HOSTID=$RANK NCCL_SOCKET_IFNAME=lo NCCL_MULTI_RANK_GPU_ENABLE=1, which is slow"
            )
    return ""


def shared_gpus(everyone: Sequence[Seen]) -> list[list[Seen]]:
    """The ranks on each GPU that has several."""
    of: dict[str, list[Seen]] = {}
    for seen in everyone:
        if seen.number:
            of.setdefault(seen.number, []).append(seen)
    return [ranks for ranks in of.values() if len(ranks) > 1]


def _few(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
