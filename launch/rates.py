"""The optimizer's settings, and its learning rate at every step: a linear warm-up, and then one of the schedules in
`SCHEDULES`. The rate is a function of the step alone, so that a resumed run goes on with it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from launch.rules import COUNT, Rule, check, check_choice, integer, number

OPTIMIZER = {
    "lr": number(0, math.inf, 1e-3, above=True),
    "warmup": integer(0, COUNT, 10),
    "final_lr": number(0, 1, 0.1),
    "weight_decay": number(0, math.inf, 0.1),
    "betas": Rule(
        lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "two numbers, each at least 0 and below 1",
        [0.9, 0.95],
    ),
    "clip": Rule(lambda clip: clip > 0, "a number above 0, inf for none", 1.0),
    "decay": number(0, 1, 0.2, above=True),
}


def cosine(settings: "OptimizerConfig", step: int, steps: int) -> float:
    """Half a cosine from the end of the warm-up to the last step (Loshchilov and Hutter, 2017, arXiv:1608.03983,
    equation 5, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * _progress(settings.warmup, step, steps)))


def wsd(settings: "OptimizerConfig", step: int, steps: int) -> float:
    """Warm-up, stable, decay: 1 until the last `decay` of all steps, and then down by `shape`. The schedule is that of
    Hu et al., 2024 (arXiv:2404.06395, section 4), the shapes are those of Haegele et al., 2024 (arXiv:2405.18392,
    section 3), who found 1 - sqrt the best and a fifth of the steps enough."""
    begin = max(settings.warmup, steps - max(1, round(settings.decay * steps)))
    return SHAPES[settings.shape](_progress(begin, step, steps))


def constant(settings: "OptimizerConfig", step: int, steps: int) -> float:
    """1 after the warm-up."""
    return 1.0


# from 1 at the first step after the warm-up to 0 at the last
SCHEDULES: Mapping[str, Callable[["OptimizerConfig", int, int], float]] = {
    "cosine": cosine,
    "wsd": wsd,
    "constant": constant,
}
SHAPES: Mapping[str, Callable[[float], float]] = {
    "sqrt": lambda progress: 1 - math.sqrt(progress),
    "linear": lambda progress: 1 - progress,
}


def _progress(begin: int, step: int, steps: int) -> float:
    """From 0 at step `begin` and before to 1 at the last of `steps`."""
    return min(1.0, max(0, step - begin) / max(1, steps - 1 - begin))


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW with a linear warm-up of `warmup` steps and then a schedule: cosine (down to `final_lr` of `lr` at the last
    step), wsd (constant, and down to `final_lr` in the last `decay` of all steps, by `shape`: sqrt or linear) or
    constant. It has nothing to do with the context's schedule, by which K/V travels."""

    lr: float
    warmup: int
    final_lr: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.95)
    clip: float = 1.0
    schedule: str = "cosine"
    decay: float = 0.2
    shape: str = "sqrt"

    def __post_init__(self) -> None:
        check({entry.name: getattr(self, entry.name) for entry in fields(self)}, OPTIMIZER, "optimizer.")
        check_choice("optimizer.schedule", self.schedule, tuple(SCHEDULES))
        check_choice("optimizer.shape", self.shape, tuple(SHAPES))
        of_wsd, falling = ("decay", "shape"), ("final_lr",)
        unused = (*(of_wsd if self.schedule != "wsd" else ()), *(falling if self.schedule == "constant" else ()))
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in unused and value != entry.default:
                raise ValueError(
                    f"optimizer.{entry.name} is {value!r}, which optimizer.schedule {self.schedule!r} does not know; "
                    'leave it out, or set schedule = "wsd" in [optimizer]'
                )
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"optimizer.weight_decay is {self.weight_decay!r} at optimizer.lr {self.lr!r}; AdamW multiplies "
                "weights by 1 - lr * weight_decay, which must be above 0: set a smaller one, for instance 0.1"
            )

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        left = SCHEDULES[self.schedule](self, step, steps)
        return self.lr * (self.final_lr + (1 - self.final_lr) * left)
