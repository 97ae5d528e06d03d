"""How the parameters lie on the ranks: a copy on each (ddp), or a part on each (fsdp). Both leave on every rank the
gradient of the sum of all ranks' shares of the loss."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
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


def distribute(objective: Objective, engine: str, mesh: DeviceMesh | None, timeout: float) -> nn.Module:
    """What a step calls in the objective's place. No sum takes longer than `timeout` seconds. Parameters must be
    equal on all ranks already; on one process there is nothing to do."""
    if mesh is None:
        return objective
    if engine == "fsdp":
        return shard_model(objective, mesh, objective.language.layers)
    # not the context's: the sums of gradients run while the ring of earlier layers does
    group = dist.new_group(timeout=timedelta(seconds=timeout))
    settings: dict[str, Any] = {BUFFERS: False}
    module = DistributedDataParallel(objective, process_group=group, init_sync=False, **settings)
    module.register_comm_hook(group, sum_each)
    return module


def sum_each(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sums each gradient of a bucket by itself. Where a number lies in a message decides in which order three ranks add
    it up, and DDP lays its buckets out anew after the first step: a resumed run would differ in the last bit."""
    sums = [dist.all_reduce(gradient, group=group, async_op=True).get_future() for gradient in bucket.gradients()]

    def whole_bucket(done: torch.futures.Future[Any]) -> Tensor:
        for each in done.wait():
            each.wait()  # raises what has failed; all of them are over
        return bucket.buffer()

    return torch.futures.collect_all(sums).then(whole_bucket)


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
