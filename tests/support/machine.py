"""`ringattn check` of a machine by ranks that are here already, with a fault planted in one of them."""

import json
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringattn.check import place
from ringattn.comm import SharedMemoryTransport
from ringattn.kernels.blockwise import Blockwise
from ringattn.kernels.reference import Reference


def checked(rank: int, world: int, found: Path, fault: str = "", a_node: int = 0, *options: str) -> tuple[int, str]:
    """The exit status of the command as this rank, and what it printed; rank 0 leaves its JSON in ``found``. ``fault``
    names one of this module's; ``a_node``: ranks of a node, as the launcher tells, 0 for all."""
    from typer.testing import CliRunner

    from ringattn.cli.main import app

    a_node = a_node or world
    port = [_free_port()]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank % a_node))
    os.environ.update(LOCAL_WORLD_SIZE=str(a_node), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port[0]))
    os.environ.pop("TRITON_INTERPRET", None)  # which would take its time
    if fault:
        globals()[fault](rank)
    result = CliRunner().invoke(app, ["check", "--json", str(found), *options])
    return result.exit_code, result.output


def findings(found: Path) -> dict[str, dict[str, Any]]:
    return {one["item"]: one for one in json.loads(found.read_text())["findings"]}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wrapped(kind: type, name: str, wrap: Callable[..., Any]) -> None:
    known = getattr(kind, name)
    setattr(kind, name, lambda self, *args: wrap(known, self, *args))


def no_gpu_on_one(rank: int) -> None:
    """Rank 0 says that it has a GPU."""
    known = place._seen
    place._seen = lambda *args: replace(known(*args), number="" if rank else "uuid")


def wrong_kernels(rank: int) -> None:
    """On rank 1 the logits of one kernel are off by a factor, and another one raises."""

    def scaled(known, self, q, *args):
        known(self, 1.001 * q if rank else q, *args)

    def raising(known, self, *args):
        if rank:
            raise KeyError("planted")
        known(self, *args)

    _wrapped(Reference, "forward", scaled)
    _wrapped(Blockwise, "forward", raising)


def swapped_rows(rank: int) -> None:
    """The first two rows of every message of rank 1 are swapped."""

    def post(known, self, sends, recvs, what):
        if rank:
            sends = [(torch.cat((x[1:2], x[:1], x[2:])), to) for x, to in sends]
        return known(self, sends, recvs, what)

    _wrapped(SharedMemoryTransport, "post", post)


def dies(rank: int) -> None:
    """Rank 1 is killed in the middle."""

    def forward(known, self, *args):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        known(self, *args)

    _wrapped(Blockwise, "forward", forward)
