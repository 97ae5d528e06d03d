"""What a training step and a checkpoint ask of an engine: whatever holds the parameters, adds up their gradients and
updates them. Nothing else in the job knows where a parameter lies."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:  # the config asks for the engines' names
    from launch.config import Config
    from launch.language import Inputs, Objective
    from launch.processes import World

MODEL, OPTIMIZER = "model.", "optimizer."  # what the names of a checkpoint's tensors begin with


@dataclass(frozen=True, slots=True)
class Part:
    """A block of one of a checkpoint's tensors: the shape of the whole tensor, where the block begins in it (an offset
    for each dim), and the block itself, which may be empty. `shared`: every rank has this same block, which is then
    the whole tensor; otherwise the blocks of all ranks make up the tensor, each number once."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    block: Tensor
    shared: bool


Read = Callable[[str, Sequence[int], Sequence[int]], Tensor]
"""`read(name, offsets, sizes)`: that block of a checkpoint's tensor, on the CPU, in the dtype it was saved in."""


class Engine(Protocol):
    """The parameters of one run on one rank. A step of `n` micro-batches is, on every rank,

        engine.zero_grad()
        for index, inputs in enumerate(micro_batches):
            with engine.summing(last=index == n - 1):
                share, _ = engine(inputs)
                engine.backward(share * engine.loss_scale)
        norm = engine.step(lr)

    where the shares of all ranks and micro-batches add up to the mean loss, so that gradients are summed and never
    averaged. An engine may gather, sum and divide as it likes: what counts is that the gradient is that of one process.
    All methods but `backward` of a lone rank may be collective; every rank calls them in this order.
    """

    name: ClassVar[str]
    """As the config calls it."""

    loss_scale: float
    """What a rank's share of the loss is multiplied by before `backward`, so that the gradient of the sum of all shares
    results: 1 where gradients are summed, the number of ranks where the engine averages over them. Divisions by the
    number of micro-batches are to be switched off, not to be made up for."""

    settles: int
    """How many steps of a process take less memory than those behind them."""

    def __init__(self, objective: "Objective", config: "Config", world: "World") -> None:
        """Takes over the objective, whose parameters are equal on all ranks and lie on `world.device`, and makes its
        own AdamW of `config.optimizer`. `world` is split already: `world.mesh` is data x context, None for a single
        process. `objective.language.model` stays the module that users see; its parameters may be replaced, sharded or
        emptied from here on."""

    def __call__(self, inputs: "Inputs") -> tuple[Tensor, Tensor]:
        """The objective's forward: this rank's share of the loss, and how many targets were guessed. Called without
        gradients too, and then outside of `summing`."""

    def summing(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: gradients are summed over the ranks after the last one only, or
        once for all of them at the latest in `step`."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a scaled share."""

    def zero_grad(self) -> None:
        """Forgets what gradients there are."""

    def step(self, lr: float) -> float:
        """Clips the gradient to the norm `config.optimizer.clip` (inf: not at all), updates the parameters at this
        learning rate, and returns the norm before clipping, over all parameters, the same on every rank. Where that is
        no finite number the parameters are to stay as they are; an engine that cannot look first may return it all the
        same: the run ends there, and nothing is saved."""

    def held(self) -> int:
        """Bytes that lie on this rank from step to step: its part of the parameters, AdamW's moments, buffers."""

    def weights(self) -> dict[str, Tensor]:
        """What the model's `state_dict` names, each tensor whole and in the parameter's own dtype. Collective."""

    def gradients(self) -> dict[str, Tensor]:
        """Each parameter's gradient by its name in the model, whole, after the last micro-batch and before `step`;
        without those that have none. Collective."""

    def state(self) -> Iterator[tuple[str, Part]]:
        """All that a checkpoint must hold, in an order that is the same on every rank: `model.NAME` of each tensor in
        the model's `state_dict` (tied ones once), and of each parameter AdamW's `optimizer.NAME.step` (fp32, no dims),
        `.exp_avg` and `.exp_avg_sq` (of its shape; zeros before the first step). Collective: every rank takes all of
        it. One that must gather may yield whole tensors one after the other as `shared`; they are let go of where this
        rank does not write them. Blocks are read before the next is asked for, or kept, and never written to."""

    def load(self, read: Read) -> None:
        """Takes every tensor that `state` names from a checkpoint, whichever engine and however many ranks wrote it.
        What `read` raises is passed on."""


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What `state_dict` names, tied tensors once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())
