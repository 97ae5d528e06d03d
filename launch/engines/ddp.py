"""A copy of all parameters on each rank; gradients are summed while backward runs."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from launch.engines.plain import Plain

if TYPE_CHECKING:
    from launch.config import Config
    from launch.language import Objective
    from launch.processes import World

# buffers are equal and stay so; torch 2.13 has renamed the option
NAMED = inspect.signature(DistributedDataParallel.__init__).parameters
BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in NAMED else "broadcast_buffers"


class Ddp(Plain):
    """`DistributedDataParallel`, whose average a hook replaces by a sum."""

    name: ClassVar[str] = "ddp"

    def wrap(self, objective: "Objective", config: "Config", world: "World") -> nn.Module:
        """No sum takes longer than the config's timeout."""
        # not the context's: the sums of gradients run while the ring of earlier layers does
        group = dist.new_group(timeout=timedelta(seconds=config.timeout))
        settings: dict[str, Any] = {BUFFERS: False}
        module = DistributedDataParallel(objective, process_group=group, init_sync=False, **settings)
        module.register_comm_hook(group, sum_each)
        return module

    def held(self) -> int:
        """With the buckets of gradients, which are as large as the parameters."""
        return super().held() + sum(parameter.nbytes for parameter in self.model.parameters())

    def summing(self, last: bool) -> AbstractContextManager[None]:
        """DDP's own switch."""
        assert isinstance(self.module, DistributedDataParallel)
        alone: AbstractContextManager[None] = nullcontext() if last else self.module.no_sync()
        return alone


def sum_each(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sums each gradient of a bucket by itself. Where a number lies in a message decides in which order three ranks add
    it up, and DDP lays its buckets out anew after the first step: a resumed run would differ in the last bit."""
    sums = [dist.all_reduce(gradient, group=group, async_op=True).get_future() for gradient in bucket.gradients()]

    def whole_bucket(done: torch.futures.Future[Any]) -> Tensor:
        for each in done.wait():
            each.wait()  # raises what has failed; all of them are over
        return bucket.buffer()

    return torch.futures.collect_all(sums).then(whole_bucket)
