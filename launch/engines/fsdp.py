"""A part of every parameter, gradient and moment on each rank: PyTorch's FSDP2."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from launch.engines.base import Part
from launch.engines.plain import Plain
from ringattn.integrations.fsdp import shard_model

if TYPE_CHECKING:
    from launch.config import Config
    from launch.language import Objective
    from launch.processes import World


class Fsdp(Plain):
    """`fully_shard` over all ranks, data and context, a layer at a time; gradients are summed."""

    name: ClassVar[str] = "fsdp"

    def wrap(self, objective: "Objective", config: "Config", world: "World") -> nn.Module:
        """The objective itself, its parameters sharded."""
        assert world.mesh is not None
        return shard_model(objective, world.mesh, objective.language.layers)

    def summing(self, last: bool) -> AbstractContextManager[None]:
        """FSDP's own switch, which stays as it is set."""
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        return nullcontext()

    def whole(self, tensor: Tensor) -> Tensor:
        """Gathered, where it lies in parts; buffers and counters of steps do not."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def part(self, tensor: Tensor) -> Part:
        """This rank's rows."""
        if not isinstance(tensor, DTensor):
            return super().part(tensor)
        (chunk,) = tensor.__create_chunk_list__()
        return Part(tuple(tensor.shape), tuple(chunk.offsets), tensor.to_local(), shared=False)
