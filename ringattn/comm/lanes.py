"""Lanes: what messages between GPUs travel on. That is the user's group, or communicators of our own over the same
ranks, on streams of high priority: the blocks of a transfer are few, and must not queue behind those of attention.

Each batch goes out in the order of the lanes, so a device is given its transfers in one order on all ranks. NCCL asks
for that where several communicators are under way at once, and to be told to keep the order on the device
(`NCCL_LAUNCH_ORDER_IMPLICIT=1`, since NCCL 2.26): ranks that start two in different orders, on devices with room for
one, wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.board import GroupBoard

Tensors = dict[int, list[Tensor]]  # by peer
# Starts what goes out and comes back as one, so that NCCL fuses it, behind what the current stream has been given.
Lane = Callable[[dist.ProcessGroup, Tensors, Tensors], list[dist.Work]]


def group_lane(group: dist.ProcessGroup, out: Tensors, back: Tensors) -> list[dist.Work]:
    """Starts transfers on the user's own group."""
    ways: tuple[tuple[Callable[..., Any], Tensors], ...] = (dist.isend, out), (dist.irecv, back)
    return dist.batch_isend_irecv(
        [
            dist.P2POp(move, tensor, group=group, group_peer=peer)
            for move, of in ways
            for peer, tensors in of.items()
            for tensor in tensors
        ]
    )


class OwnLane:
    """A communicator of our own.

    PyTorch's list of groups does not have it. What `new_group` makes for some ranks is named after the number of groups
    that a rank is in, which may differ between them; and if the default group is bound to a device, NCCL splits it from
    that one, in which ranks outside of it would have to take part.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __call__(self, group: dist.ProcessGroup, out: Tensors, back: Tensors) -> list[dist.Work]:
        """See `Lane`."""
        backend, fuses = self.backend, self.backend.supports_coalescing
        if fuses:
            backend._start_coalescing()
        works = [
            move([tensor], peer, 0)
            for move, of in ((backend.send, out), (backend.recv, back))
            for peer, tensors in of.items()
            for tensor in tensors
        ]
        return [backend._end_coalescing()] if fuses else works

    def close(self) -> None:
        """Waits for what is under way, and gives back what the communicator holds."""
        backend, self.backend = self.backend, None
        with suppress(RuntimeError):  # a peer may have died, and nobody needs it any more
            backend.shutdown()


def open_lanes(group: dist.ProcessGroup, device: torch.device, store: dist.Store, number: int) -> list[OwnLane]:
    """So many lanes of our own, for tensors on a device. Collective: a first sum brings each up, one after the other.

    Args:
        group: the ranks, whose engine and deadline the lanes have too.
        store: where these find each other.

    Raises:
        NotImplementedError: the engine is not NCCL.
        RuntimeError: a rank did not come.
    """
    lanes = []
    for at in range(number):
        lanes.append(OwnLane(_backend(group, device, dist.PrefixStore(f"lane {at}", store))))
        ones = torch.ones(1, device=device)
        lanes[at].backend.allreduce([ones]).wait()
        assert ones.item() == group.size(), "every rank has come"  # on a GPU, waits for them
    return lanes


def _backend(group: dist.ProcessGroup, device: torch.device, store: dist.Store) -> Any:
    """Another one of the kind that the group has for this device, with its deadline."""
    like = group._get_backend(device)
    rank, size, timeout = group.rank(), group.size(), like.options._timeout
    if like.name() == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
    if like.name() != "nccl":
        raise NotImplementedError(
            f"Options.communicators: on GPUs the group's engine is '{like.name()}', and communicators of our own are "
            "NCCL's only; leave the option out"
        )
    options: Any = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    options.global_ranks_in_group = dist.get_process_group_ranks(group)
    options.group_name = f"{group.group_name} of ringattn"
    return dist.ProcessGroupNCCL(store, rank, size, options)


class Fused:
    """The transfers of a batch on one lane.

    Whoever holds it keeps their tensors from being freed until the current stream has been ordered behind them (by
    `wait()`): `ProcessGroupTransport` holds every batch until then, one that failed for as long as the group lives.
    After that the allocator may give the memory to later work of that stream only, which is where it came from: buffers
    belong to a call, and what else is sent was made by the same thread. Nothing depends on whether PyTorch records the
    transfer's stream on the tensors, or keeps them itself until `wait()`, as it does since 2.8.
    """

    def __init__(self, board: GroupBoard, lane: Lane, out: Tensors, back: Tensors) -> None:
        self.board, self.lane, self.out, self.back = board, lane, out, back
        self.peers = sorted(out.keys() | back.keys())
        self.works: list[dist.Work] = []
        self.errors: dict[int, RuntimeError] = {}

    def start(self) -> None:
        """Starts all of them."""
        try:
            self.works = self.lane(self.board.group, self.out, self.back)
        except RuntimeError as error:
            self.errors = dict.fromkeys(self.peers, error)

    def wait(self, deadline: float) -> dict[int, RuntimeError]:
        """The errors by peer. Orders the current stream behind the transfers; a timeout would block the host."""
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            self.errors = dict.fromkeys(self.peers, error)
        return self.errors
