"""The engine of a single process: PyTorch's own parameters, gradients and AdamW. Where there are several processes it
is what ddp and fsdp have in common."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from launch.engines.base import MODEL, OPTIMIZER, Part, Read, weights_of

if TYPE_CHECKING:
    from launch.config import Config
    from launch.language import Inputs, Objective
    from launch.processes import World


class Plain:
    """See `Engine`. `module` is what a step calls: the objective, as `wrap` makes it."""

    name: ClassVar[str] = "plain"
    loss_scale = 1.0
    settles = 0

    def __init__(self, objective: "Objective", config: "Config", world: "World") -> None:
        self.model = objective.model
        self.clip = config.optimizer.clip
        self.module = self.wrap(objective, config, world)
        betas = config.optimizer.betas
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.optimizer.lr,
            betas=(betas[0], betas[1]),
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self._begin_moments()

    def wrap(self, objective: "Objective", config: "Config", world: "World") -> nn.Module:
        """What a step calls in the objective's place."""
        return objective

    def __call__(self, inputs: "Inputs") -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.module(inputs)
        return found

    def summing(self, last: bool) -> AbstractContextManager[None]:
        """There is nobody else."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Autograd's."""
        loss.backward()

    def zero_grad(self) -> None:
        """Drops them."""
        self.module.zero_grad()

    def step(self, lr: float) -> float:
        """Nothing is updated where the norm is no finite number."""
        norm = float(self.whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        return norm

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor that may lie in parts on the ranks, which must all call this."""
        return tensor

    def part(self, tensor: Tensor) -> Part:
        """What this rank holds of a tensor."""
        return Part(tuple(tensor.shape), (0,) * tensor.ndim, tensor, shared=True)

    def held(self) -> int:
        """All that a checkpoint holds."""
        return sum(part.block.nbytes for _, part in self.state())

    def weights(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return {name: self.whole(tensor) for name, tensor in self.model.state_dict().items()}

    def gradients(self) -> dict[str, Tensor]:
        """Clipped ones after `step`."""
        named = self.model.named_parameters()
        return {name: self.whole(parameter.grad) for name, parameter in named if parameter.grad is not None}

    def state(self) -> Iterator[tuple[str, Part]]:
        """See `Engine`."""
        for name, tensor in self._tensors():
            yield name, self.part(tensor)

    @torch.no_grad()
    def load(self, read: Read) -> None:
        """Each rank reads its own blocks."""
        for name, part in self.state():
            part.block.copy_(read(name, part.offsets, part.block.shape))

    def _begin_moments(self) -> None:
        """AdamW would make its state in the first step, which then took less memory than all others until its end."""
        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights_of(self.model).items():
            yield MODEL + name, tensor.detach()
        for name, parameter in self.model.named_parameters():
            for what, tensor in self.optimizer.state[parameter].items():
                yield f"{OPTIMIZER}{name}.{what}", tensor.detach()
