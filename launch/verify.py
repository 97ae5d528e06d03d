"""Is the sharded step right? The first step's loss and gradients are computed a second time by rank 0
alone, over the whole sequence without sharding, and compared."""

import copy
import math
from dataclasses import dataclass, replace

from torch import nn

from launch.data import Sample
from launch.processes import World
from launch.training import Trainer, make_context

# Largest difference allowed: of the loss relative to it, of each parameter's gradient relative to its largest
# entry. The two runs add the same terms in another order, which costs some hundred roundings of the dtype.
BOUNDS = {"float64": 1e-10, "float32": 5e-5, "bfloat16": 5e-2}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Largest differences between the sharded and the single-rank step, relative, and the bound on both."""

    loss: float
    gradient: float
    parameter: str
    bound: float

    @property
    def passed(self) -> bool:
        """Not a number never passes."""
        return self.loss <= self.bound and self.gradient <= self.bound

    def __str__(self) -> str:
        verdict = "equal" if self.passed else "DIFFERENT"
        return (
            f"verify: sharded and single-rank step are {verdict}: loss differs by {self.loss:.1e} of it, "
            f"gradients by up to {self.gradient:.1e} of their largest entry ({self.parameter}); "
            f"bound {self.bound:.0e}"
        )


def verify(trainer: Trainer, sample: Sample) -> Comparison:
    """Compares one step; the parameters stay as they are and the gradients are cleared. Called by every
    rank, all of which get rank 0's comparison."""
    loss = float(trainer.loss_and_gradients(sample))
    comparison = None
    if trainer.world.rank == 0:
        alone = World(device=trainer.world.device)
        model = copy.deepcopy(trainer.model)
        model.zero_grad()
        whole = replace(trainer, world=alone, model=model, cp=make_context(trainer.config, alone, trainer.masks))
        comparison = _compare(trainer, loss, model, float(whole.loss_and_gradients(sample)))
    trainer.model.zero_grad()
    return trainer.world.gather(comparison)[0]


def _compare(trainer: Trainer, loss: float, single: nn.Module, expected: float) -> Comparison:
    references = dict(single.named_parameters())
    worst = (-1.0, "")
    for name, parameter in trainer.model.named_parameters():
        reference = references[name].grad
        assert parameter.grad is not None and reference is not None
        difference = float((parameter.grad - reference).abs().max() / reference.abs().max())
        # a NaN is worse than any number
        worst = max(worst, (difference, name), key=lambda pair: (math.isnan(pair[0]), pair[0]))
    bound = BOUNDS[trainer.config.dtype]
    return Comparison(abs(loss - expected) / abs(expected), worst[0], worst[1], bound)
