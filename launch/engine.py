"""How the parameters lie on the ranks: a copy on each (ddp), or a part on each (fsdp). Both leave on every rank the
gradient of the sum of all ranks' shares of the loss."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from launch.language import Objective
from ringattn.integrations.fsdp import shard_model

# buffers are equal and stay so; torch 2.13 has renamed the option
NAMED = inspect.signature(DistributedDataParallel.__init__).parameters
BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in NAMED else "broadcast_buffers"


def distribute(objective: Objective, engine: str, mesh: DeviceMesh | None) -> nn.Module:
    """What a step calls in the objective's place. Parameters must be equal on all ranks already; on one process there
    is nothing to do."""
    if mesh is None:
        return objective
    if engine == "fsdp":
        return shard_model(objective, mesh, objective.language.layers)
    group = dist.new_group()  # not the context's: the sums of gradients run while the ring of earlier layers does
    settings: dict[str, Any] = {BUFFERS: False}
    return DistributedDataParallel(objective, process_group=group, init_sync=False, **settings)


def loss_scale(module: nn.Module) -> int:
    """What the shares are multiplied by before backward: DDP divides by the number of ranks."""
    return dist.get_world_size() if isinstance(module, DistributedDataParallel) else 1


def summing(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around forward and backward of a micro-batch: gradients are summed over the ranks after the last one only."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        alone: AbstractContextManager[None] = module.no_sync()
        return alone
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may lie in parts on the ranks, which must all call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip(module: nn.Module, largest: float) -> float:
    """Clips the gradient to a norm, and returns the norm before."""
    return float(whole(torch.nn.utils.clip_grad_norm_(module.parameters(), largest)))
