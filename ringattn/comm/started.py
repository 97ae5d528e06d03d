"""What has started this process. torchrun says so in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which
commands and jobs read; mpiexec and srun have variables of their own, which are translated into these."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from mpi4py import MPI

OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# What each launcher calls these, the more telling one first: inside a Slurm step, mpiexec's ranks are all task 0.
OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
MPIS = (OPEN_MPI, MPICH)
PORTS = range(20_000, 40_000)


def translate() -> None:
    """Sets torchrun's variables where another launcher has started this process. Collective where their address has to
    be agreed on.

    Raises:
        ValueError: torchrun's variables stand beside other numbers of MPI's, or there is no way to agree.
    """
    found = translated(os.environ)
    os.environ.update(found)
    if int(found.get("WORLD_SIZE", "1")) > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        address, port = _slurms_address(os.environ) or _agreed_address()
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))


def translated(environ: Mapping[str, str]) -> dict[str, str]:
    """This rank's place as torchrun would have said it, nothing where torchrun itself has, or nobody. Raises ValueError
    where two launchers contradict each other."""
    names = next((names for names in (*MPIS, SLURM) if {*names[:2]} <= environ.keys()), None)
    if names is None:
        return {}
    if {"RANK", "WORLD_SIZE"} <= environ.keys():
        if names in MPIS:  # of srun's tasks each may be a torchrun
            _check_same(environ, names)
        return {}
    found = {ours: environ[theirs] for ours, theirs in zip(OURS, names, strict=True) if theirs in environ}
    # srun's PMI has no names for these
    found.setdefault("LOCAL_RANK", environ.get(SLURM[2], found["RANK"]))
    found["LOCAL_WORLD_SIZE"] = _tasks_here(
        found.get("LOCAL_WORLD_SIZE") or environ.get(SLURM[3], found["WORLD_SIZE"]), environ
    )
    return found


def by_mpi(environ: Mapping[str, str]) -> bool:
    """Whether mpiexec has started this process."""
    return any({*names[:2]} <= environ.keys() for names in MPIS)


def _check_same(environ: Mapping[str, str], names: tuple[str, ...]) -> None:
    pairs = list(zip(OURS[:2], names[:2], strict=True))
    if any(environ[ours] != environ[theirs] for ours, theirs in pairs):
        said = ", ".join(f"{ours}={environ[ours]} beside {theirs}={environ[theirs]}" for ours, theirs in pairs)
        raise ValueError(
            f"{said}: torchrun and mpiexec have both started this process, as different ranks; start it with one of "
            f"them, or unset {' and '.join(OURS[:2])} if they are left over"
        )


def _tasks_here(counts: str, environ: Mapping[str, str]) -> str:
    """Slurm's counts by node, as "4(x2),3", for this node; a plain count as it is."""
    of_nodes: list[str] = []
    for part in counts.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        of_nodes += [count] * int(times or 1)
    return of_nodes[int(environ.get("SLURM_NODEID", "0")) if len(of_nodes) > 1 else 0]


def _slurms_address(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """The first node of a Slurm step and a port that follows from its job, where no mpiexec is in between."""
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    if by_mpi(environ) or not nodes:
        return None
    first = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    assert first is not None, "a list of nodes begins with a name"
    return first[1] + (first[2] or ""), PORTS[int(environ.get("SLURM_JOB_ID", "0")) % len(PORTS)]


def _agreed_address() -> tuple[str, int]:
    """Where rank 0 will listen, which MPI tells the others."""
    try:
        comm = ranks_of_mpi(int(os.environ["WORLD_SIZE"]))
    except ImportError as error:
        raise ValueError(
            f"mpiexec does not say where rank 0 listens, and MPI cannot be asked ({error}); set MASTER_ADDR and "
            "MASTER_PORT, the same for all ranks, or install mpi4py (pip install 'ringattn[mpi]')"
        ) from None
    address = None
    if comm.rank == 0:
        alone = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
        with socket.socket() as listener:
            listener.bind(("", 0))
            address = "127.0.0.1" if alone else socket.gethostname(), listener.getsockname()[1]
    told: tuple[str, int] = comm.bcast(address)
    return told


def ranks_of_mpi(size: int) -> MPI.Intracomm:
    """All ranks of the job as MPI knows them. Raises ValueError where that is another number."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if comm.size != size:
        vendor, version = MPI.get_vendor()
        raise ValueError(
            f"the job has {size} ranks and MPI ({vendor} {'.'.join(map(str, version))}) knows {comm.size}; start it "
            "with the mpiexec of that very MPI (launch/mpi.sh does), not with torchrun or another's"
        )
    return comm


def part_of_mpi(size: int, part: int, rank: int) -> MPI.Intracomm:
    """The ranks of all that name the same part, in the order of their ranks. Collective."""
    return cast("MPI.Intracomm", ranks_of_mpi(size).Split(part, rank))


def end_all() -> None:
    """Makes MPI, if it is at work, end all ranks when this one does: its own end would wait for them."""
    if "mpi4py.MPI" in sys.modules:
        from mpi4py.run import set_abort_status

        set_abort_status(1)
