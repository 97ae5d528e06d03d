"""Is the sharded step right? The first step's loss and gradients are computed a second time by rank 0
alone, over the whole sequence without sharding, and compared. Where no sequence is sharded, that is said."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from launch.engines import make_engine
from launch.processes import World
from launch.run import Job, build
from launch.training import Trainer, make_context

# Largest difference allowed: of the loss relative to it, of each parameter's gradient relative to its largest
# entry. The two runs add the same terms in another order, which costs some hundred roundings of the dtype.
BOUNDS = {"float64": 1e-10, "float32": 5e-5, "bfloat16": 5e-2}
TINY = 1e-30
NOTHING = "verify: nothing is compared: one process computes this step either way; start several ranks"
WHOLE = "; no attention was sharded, so none was compared: set data_parallel lower, or start more ranks"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Largest differences between the step of all ranks and the single-rank step, relative, and the bound on both;
    `context` of the ranks share a sequence."""

    context: int
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
        kind, where, limits = "sharded", f"each sequence over {self.context} ranks", ""
        if self.context == 1:
            kind, where, limits = "replicated", "each sequence whole on one rank", WHOLE
        return (
            f"verify: {kind} and single-rank step are {verdict}, {where}: loss differs by {self.loss:.1e} of it, "
            f"gradients by up to {self.gradient:.1e} of their largest entry ({self.parameter}); "
            f"bound {self.bound:.0e}{limits}"
        )


def verify(job: Job, trainer: Trainer) -> Comparison:
    """Compares the next step; the parameters stay as they are and the gradients are cleared. Called by every
    rank, all of which get rank 0's comparison. On one process there is nothing to compare."""
    loss = trainer.loss_and_gradients(job.samples(trainer.world)).loss
    weights, gradients = trainer.engine.weights(), trainer.engine.gradients()
    comparison = None
    if trainer.world.rank == 0:
        alone = _alone(job, trainer, weights)
        expected = alone.loss_and_gradients(job.samples_of_all(trainer.world)).loss
        context = trainer.world.size // trainer.world.replicas
        comparison = _compare(trainer.config.dtype, context, loss, gradients, alone, expected)
    trainer.engine.zero_grad()
    return trainer.world.gather(comparison)[0]


def _alone(job: Job, trainer: Trainer, weights: dict[str, Tensor]) -> Trainer:
    """A trainer of the same model on one process."""
    world, language = World(device=trainer.world.device), build(job.config)
    language.model.to(world.device).load_state_dict(weights)
    engine = make_engine(job.objective(language), job.config, world)
    return Trainer(job.stage, world, language, engine, make_context(job.stage, world, language))


def _compare(
    dtype: str, context: int, loss: float, gradients: dict[str, Tensor], alone: Trainer, expected: float
) -> Comparison:
    worst = (-1.0, "")
    references = alone.engine.gradients()
    # what is zero but for rounding (a router without a choice) is compared with the largest of all
    rounding = 8 * torch.finfo(torch.float64 if dtype == "float64" else torch.float32).eps
    least = rounding * max(float(reference.abs().max()) for reference in references.values()) + TINY
    for name in {**references, **gradients}:
        # a gradient that one side lacks is zero there
        found, reference = (of.get(name, torch.zeros(1, device=alone.world.device)) for of in (gradients, references))
        difference = float((found - reference).abs().max()) / max(float(reference.abs().max()), least)
        # a NaN is worse than any number
        worst = max(worst, (difference, name), key=lambda pair: (math.isnan(pair[0]), pair[0]))
    return Comparison(context, abs(loss - expected) / max(abs(expected), TINY), *worst, BOUNDS[dtype])
