"""FSDP2 on data x context ranks: one mesh, parameters sharded over both axes, gradients that are those of one process.

mesh = data_context_mesh("cuda", context=8)  # as many replicas as are left
cp = ringattn.ContextParallel(mesh["cp"], seqlen)
shard_model(model, mesh, layers=model.layers)
loss = ringattn.loss.token_mean(logits, labels, group=mesh["dp", "cp"])  # this rank's share; gradients are summed
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

GRADIENTS = ("sum", "average")


def data_context_mesh(
    device_type: str, *, data: int | None = None, context: int | None = None, tensor: int = 1
) -> DeviceMesh:
    """The mesh of all ranks: `dp` outermost, then `cp`, then `tp` (only where `tensor` is above 1).
    Losses are summed over `mesh["dp", "cp"]`, and over both, flattened, parameters are sharded.

    Args:
        device_type: cpu or cuda.
        data: replicas of the sequence axis; None takes what the others leave of the world.
        context: ranks that share a sequence; None takes what the others leave.
        tensor: ranks that share a head or a matrix; neighbours, as theirs are the most frequent messages.

    Raises `ValueError` where the sizes do not make up the world. Collective over all ranks.
    """
    world = dist.get_world_size()
    known = tensor * (data or 1) * (context or 1)
    if min(tensor, known) < 1 or world % known:
        raise ValueError(
            f"data={data} x context={context} x tensor={tensor} over {world} ranks: each must be positive and their "
            "product divide the world; start another number of ranks, or leave data or context out"
        )
    if context is None:
        context = world // known
    elif data is None:
        data = world // known
    data = 1 if data is None else data
    if data * context * tensor != world:
        raise ValueError(
            f"data={data} x context={context} x tensor={tensor} is {data * context * tensor}, but there are {world} "
            "ranks; leave data or context out to take the rest"
        )
    shape, names = (data, context, tensor), ("dp", "cp", "tp")
    return init_device_mesh(device_type, shape if tensor > 1 else shape[:2], mesh_dim_names=names[: 2 + (tensor > 1)])


def shard_model(
    model: nn.Module, mesh: DeviceMesh, layers: Iterable[nn.Module], gradients: str = "sum", **options: Any
) -> nn.Module:
    """Shards parameters, gradients and optimizer state over data x context: each of `layers`, then the rest.

    Args:
        model: its forward is what a step calls. Other ways in would find parameters sharded.
        mesh: of :func:`data_context_mesh`.
        layers: the blocks to gather one at a time.
        gradients: `sum`: of the shares of the loss that ranks hold, as they are. `average`: FSDP's own; multiply the
            loss by :func:`loss_scale`.
        options: of `torch.distributed.fsdp.fully_shard`: `mp_policy`, `reshard_after_forward`, ...

    Returns the model. Raises `ValueError` for another recipe, and where ranks hold different weights, of which each
    would keep a part.
    """
    loss_scale(mesh, gradients)
    both = mesh["dp", "cp"]._flatten()
    _check_equal(model, both)
    for layer in layers:
        fully_shard(layer, mesh=both, **options)
    fully_shard(model, mesh=both, **options)
    if gradients == "sum":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                if dist.get_backend(both.get_group()) != "nccl":  # others cannot scale while they sum
                    module.set_force_sum_reduction_for_comms(True)
    return model


def _check_equal(model: nn.Module, mesh: DeviceMesh) -> None:
    """Raises unless all ranks hold the same weights, by two sums of each; those on meta are left out."""
    here = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    weights = [w.detach().double() for w in here if w.device.type != "meta"]
    if not weights:
        return
    sums = torch.stack([torch.stack([w.sum(), w.abs().sum()]) for w in weights]).to(mesh.device_type)
    least, most = sums.clone(), sums.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group=mesh.get_group())
    dist.all_reduce(most, dist.ReduceOp.MAX, group=mesh.get_group())
    if not torch.equal(least, most):
        raise ValueError(
            "the ranks hold different weights, and sharding would mix them: seed every rank alike, or load the same "
            "weights, before shard_model"
        )


def loss_scale(mesh: DeviceMesh, gradients: str) -> int:
    """What to multiply this rank's share of the loss by before `backward()`: 1 where gradients are summed (`sum`; a
    plain all-reduce), the ranks of data x context where they are averaged (`average`; DDP)."""
    if gradients not in GRADIENTS:
        raise ValueError(f"gradients={gradients!r}: must be one of {', '.join(GRADIENTS)}")
    return 1 if gradients == "sum" else mesh["dp", "cp"].size()
