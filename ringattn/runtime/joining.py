"""Joining: from what a user names as the group of a context to the link that its ranks share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringattn.arguments.values import integer, shown
from ringattn.comm import Meeting, PlanningRank, Solo, Transport, told
from ringattn.comm.shield import shield
from ringattn.runtime.binding import Shared
from ringattn.runtime.link import Link
from ringattn.runtime.nodes import Nodes, regular, told_nodes
from ringattn.runtime.settings import Options

if TYPE_CHECKING:
    from mpi4py import MPI

DEADLINE = 300.0  # seconds

MESH = ("ring", "ulysses")  # dims of a 2-D mesh

Group: TypeAlias = "dist.ProcessGroup | DeviceMesh | Transport | MPI.Intracomm | None"


def join(group_or_mesh: Group, options: Callable[[], Options]) -> Shared:
    """What a first context shares with those that replace it. ``options`` looks at its arguments, and raises for those
    that do not fit."""
    link, nodes = _link(group_or_mesh, options)
    return Shared(link, _device(link.transport), nodes)


def split_of(group_or_mesh: Group, ulysses: int | str) -> int | str:
    """The ranks of the head axis, as asked for or as a 2-D mesh says; 1 and "auto" leave it to the mesh."""
    if ulysses != "auto":
        ulysses = integer("ulysses", ulysses, 1, hint=", or 'auto'")
    if not isinstance(group_or_mesh, DeviceMesh) or group_or_mesh.ndim == 1:
        return ulysses
    mesh = group_or_mesh
    if mesh.mesh_dim_names != MESH:
        raise ValueError(
            f"a {mesh.ndim}-D mesh with dims {mesh.mesh_dim_names}: must have the dims {MESH}, in this order; of a "
            "larger mesh pass these two, or the one of the context axis, e.g. mesh['cp']"
        )
    if ulysses not in (1, "auto", mesh.size(1)):
        raise ValueError(f"ulysses={ulysses}, but the mesh's dim 'ulysses' has {mesh.size(1)} ranks; leave one out")
    ranks = mesh.mesh.flatten()
    if bool((ranks[1:] <= ranks[:-1]).any()):
        raise ValueError(
            f"the mesh's ranks are {mesh.mesh.tolist()}: those of a row must be neighbours, and ranks must rise from "
            "row to row, as init_device_mesh() makes them"
        )
    return mesh.size(1)


def _device(transport: Transport) -> str:
    """What contexts plan for. One rank alone may call on either device, and costs nothing to plan for."""
    if isinstance(transport, PlanningRank):
        return transport.device
    gpus = "cuda" in transport.blind or transport.world_size == 1
    return torch.cuda.get_device_name() if gpus and torch.cuda.is_available() else "cpu"


def _link(group_or_mesh: Group, options: Callable[[], Options]) -> tuple[Link, Nodes | None]:
    """What a first context moves messages with, and between which nodes, if a launcher has told."""
    if _is_communicator(group_or_mesh):
        return _over_mpi(group_or_mesh, options)
    group = _group(group_or_mesh)
    if group is None:
        asked = options()
        return Link(Solo(asked.timeout or DEADLINE), asked.compare_every, asked.communicators), None
    if isinstance(group, dist.ProcessGroup):
        return _meet(group, options)
    with told(group, "a new context"):
        return Link(group, options().compare_every), None


def _over_mpi(comm: MPI.Intracomm, options: Callable[[], Options]) -> tuple[Link, Nodes]:
    """The link of a communicator's contexts, which share a transport, and the nodes of its ranks, who have seen each
    other's machines. What one rank refuses, the others hear of in their next call."""
    from ringattn.comm.mpi import transport_of

    try:
        asked = options()
    except BaseException:
        with told(transport_of(comm, DEADLINE), "a new context"):
            raise
    transport = transport_of(comm, asked.timeout or DEADLINE)
    return Link(transport, asked.compare_every), regular("MPI", transport.machines)


def _is_communicator(group: object) -> TypeGuard[MPI.Intracomm]:
    """Whether it is mpi4py's, which is not imported for the question: that would start MPI."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and isinstance(group, mpi.Comm)


def _meet(group: dist.ProcessGroup, options: Callable[[], Options]) -> tuple[Link, Nodes | None]:
    """The link that all ranks of a group make, or none; and the nodes on which all agree."""
    meetings: list[Meeting] = []
    links: list[tuple[Link, Nodes | None]] = []

    def meet(refusal: BaseException | None = None) -> None:
        with Meeting(group) as meeting:
            meetings.append(meeting)
            if refusal is not None:
                raise refusal
            asked = options()  # what does not fit says so before anything is sent
            nodes = told_nodes(os.environ, dist.get_process_group_ranks(group), dist.get_rank())
            transport = meeting.transport(asked.timeout or DEADLINE, asked.communicators, str(nodes or "nothing"))
            if meeting.apart:
                nodes = Nodes(None, f"its ranks were {meeting.apart}")
            links.append((Link(transport, asked.compare_every, asked.communicators), nodes))

    def stop() -> None:
        for meeting in meetings:
            meeting.give_up()

    try:
        shield(meet, stop)
    except BaseException as error:
        if not meetings:  # interrupted before it began
            shield(partial(meet, error))
        for link, _ in links:  # the others have theirs already
            with told(link.transport, "a new context"):
                raise
        raise
    return links[0]


def _group(group: Group) -> dist.ProcessGroup | Transport | None:
    if isinstance(group, DeviceMesh):
        return group.get_group() if group.ndim == 1 else group._flatten("_".join(MESH)).get_group()
    if isinstance(group, (dist.ProcessGroup, Transport)):
        return group
    if group is not None:
        raise ValueError(
            f"group_or_mesh={shown(group)}: pass a ProcessGroup, a 1-D DeviceMesh, a 2-D one (ring, ulysses), a "
            "ringattn transport, an mpi4py communicator, or None"
        )
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if many and dist.is_torchelastic_launched() and not dist.is_initialized():
        raise ValueError(
            "group_or_mesh is None under torchrun, before torch.distributed is initialised: this rank would "
            "attend alone; call init_process_group() first, then pass dist.group.WORLD"
        )
    return None
