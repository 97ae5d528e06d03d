"""Messages, and the causal ring, over MPI beside shared memory and gloo: two processes of one machine, one thread each,
which mpiexec starts; fp32, the transports taking turns.

    python -m benchmarks.mpi
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer

import ringattn
from benchmarks.common import interleaved, medians, ratio, write
from benchmarks.ring import ring_call
from ringattn.comm import Allocator, ProcessGroupTransport, SharedMemoryTransport, Transport, empty

RANKS = 2
MESSAGES = ((65_536, 300), (1 << 20, 200), (8 << 20, 60), (32 << 20, 20))  # bytes, rounds
RINGS = ((1024, 60), (4096, 20), (16_384, 8))  # tokens, rounds
BAR = 0.9  # of the ring's speed over shared memory, at the most tokens


def join() -> Any:
    """MPI's ranks as a process group over gloo."""
    from mpi4py import MPI

    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
    port = comm.bcast(store.port if store else None)
    store = store or dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    return comm


def shift(transport: Transport, size: int) -> Callable[[], object]:
    """Both ranks send each other so many bytes, out of a buffer as those of a call."""
    peer, device = 1 - transport.rank, torch.device("cpu")
    allocate = transport.allocate if isinstance(transport, Allocator) else empty
    sent, got = allocate(size, torch.uint8, device).fill_(1), torch.zeros(size, dtype=torch.uint8)
    return lambda: transport.post([(sent, peer)], [(got, peer)], "shift").wait()


def measure(results: str) -> None:
    """On each rank."""
    from mpi4py import MPI

    comm = join()

    def over_gloo() -> ProcessGroupTransport:
        return ProcessGroupTransport(dist.group.WORLD, 100.0)

    transports: dict[str, Transport] = {
        "gloo": over_gloo(),
        "shared memory": SharedMemoryTransport(over_gloo()),
        "MPI": ringattn.comm.MPITransport(comm, 100.0),
    }
    messages, rings = [], []
    for size, rounds in MESSAGES:
        seconds = interleaved({name: shift(transport, size) for name, transport in transports.items()}, rounds)
        messages.append({"bytes": size, "rounds": rounds, "seconds": medians(seconds)})
    for seqlen, rounds in RINGS:
        cases = {name: ring_call(seqlen, ringattn.causal(), group=t)[0] for name, t in transports.items()}
        seconds = interleaved(cases, rounds)
        speed = ratio(seconds, "shared memory", "MPI")
        rings.append({"seqlen": seqlen, "rounds": rounds, "seconds": medians(seconds), "mpi_of_shared_memory": speed})
    if comm.rank == 0:
        library = MPI.Get_library_version().split("\n")[0].strip()
        Path(results).write_text(json.dumps({"mpi": library, "messages": messages, "rings": rings}))
    dist.destroy_process_group()


def main(json_name: str = "mpi-cpu", results: str = "") -> None:
    """Measure, print and write JSON. With ``results``: as one of the ranks, which leave theirs there."""
    if results:
        measure(results)
        return
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if mpiexec is None:
        print("no mpiexec here: pip install -e '.[mpi]'")
        return
    with tempfile.TemporaryDirectory() as folder:
        found = f"{folder}/results"
        ranks = [sys.executable, "-m", "mpi4py", "-m", "benchmarks.mpi", "--results", found]
        subprocess.run([mpiexec, "-n", str(RANKS), *ranks], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        result = json.loads(Path(found).read_text())
    for row in result["messages"]:
        times = ", ".join(f"{name} {1000 * seconds:8.3f} ms" for name, seconds in row["seconds"].items())
        print(f"{row['bytes'] / 2**20:8.4f} MiB both ways: {times}")
    for row in result["rings"]:
        times = ", ".join(f"{name} {1000 * seconds:8.1f} ms" for name, seconds in row["seconds"].items())
        print(f"{row['seqlen']:>6} tokens: {times} (MPI {row['mpi_of_shared_memory']:.3f} of shared memory's speed)")
    bar = {"mpi_of_shared_memory": BAR, "met": result["rings"][-1]["mpi_of_shared_memory"] >= BAR}
    write(json_name, {"ranks": RANKS, **result, "bar": bar})


if __name__ == "__main__":
    typer.run(main)
