"""Transports whose messages carry no labels, as those between GPUs: over NCCL, or over gloo in its place."""

import os

import torch
import torch.distributed as dist

from ringattn.comm import ProcessGroupTransport


def unlabelled_transport(
    timeout: float, communicators: int = 0, group: dist.ProcessGroup | None = None
) -> ProcessGroupTransport:
    """On lanes of its own, if ``communicators`` says so."""
    if communicators > 1:
        os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"] = "1"
    transport = ProcessGroupTransport(group or dist.group.WORLD, timeout, communicators)
    if "cuda" not in transport.devices:
        transport.blind = frozenset({"cpu"})
        if communicators:
            transport.open_lanes(communicators, torch.device("cpu"))
    return transport
