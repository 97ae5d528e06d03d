"""Functions on ranks that mpiexec has started, and how their job ended."""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringattn.comm import Transport
from tests.support.clock import patience

ROOT = Path(__file__).parents[2]
BESIDE = Path(sys.executable).parent / "mpiexec"
MPIEXEC = str(BESIDE) if BESIDE.exists() else shutil.which("mpiexec")
ABSENT = MPIEXEC is None or find_spec("mpi4py") is None


@dataclass(frozen=True)
class Ended:
    """Exit code and output of mpiexec, the seconds it took, and what the ranks returned: None where they did not."""

    code: int
    said: str
    seconds: float
    results: list[Any]


def mpiexec(world_size: int, command: Sequence[str], timeout: float = 60.0, **environment: str) -> Ended:
    """Runs a command of Python's on so many ranks; ``RESULTS`` names the folder where they may leave theirs. None of
    them outlives this."""
    assert MPIEXEC is not None
    named = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        job = subprocess.Popen(
            [MPIEXEC, "-n", str(world_size), *command],
            env={**os.environ, **named, "RESULTS": folder},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            said, _ = job.communicate(timeout=patience(timeout))
        finally:
            job.terminate()  # which it passes on
            job.wait(10)
        paths = [Path(folder) / str(rank) for rank in range(world_size)]
        results = [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]
        return Ended(job.returncode, said, time.monotonic() - start, results)


def end_of(
    fn: Callable[..., Any], world_size: int, *args: Any, options: Sequence[str] = (), timeout: float = 60.0, **env: str
) -> Ended:
    """Calls ``fn(comm, *args)`` on each rank of a job, with MPI's communicator of them all."""
    call = pickle.dumps((fn, args)).hex()
    python = [sys.executable, "-m", "mpi4py", "-m", "tests.support.mpi", call]
    return mpiexec(world_size, [*options, *python], timeout, **env)


def on_ranks(fn: Callable[..., Any], world_size: int, *args: Any, **settings: Any) -> list[Any]:
    """The results by rank of a job that ends well."""
    ended = end_of(fn, world_size, *args, **settings)
    assert ended.code == 0, ended.said
    return ended.results


def over_mpi(timeout: float = 20.0) -> Transport:
    """Between all ranks of the job."""
    from mpi4py import MPI

    from ringattn.comm import MPITransport

    return MPITransport(MPI.COMM_WORLD, timeout)


def in_group(comm: Any, fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(rank, world_size, *args)``, as `run_processes` calls it: inside a process group, over gloo."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
    port = comm.bcast(store.port if store else None)
    store = store or dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    try:
        return fn(comm.rank, comm.size, *args)
    finally:
        dist.destroy_process_group()


def _rank(call: str) -> None:
    from mpi4py import MPI

    torch.set_num_threads(1)
    fn, args = pickle.loads(bytes.fromhex(call))
    result = pickle.dumps(fn(MPI.COMM_WORLD, *args))
    (Path(os.environ["RESULTS"]) / str(MPI.COMM_WORLD.rank)).write_bytes(result)


if __name__ == "__main__":
    _rank(sys.argv[1])
