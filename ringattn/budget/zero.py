"""DeepSpeed's ZeRO 1 to 3: what lies in memory beside a step's activations, as its source has it (0.19.8:
runtime/zero/stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py), with `contiguous_gradients` and
`reduce_scatter`, as is its default, and weights and sums of one dtype.

Gradients are copied into a bucket as they are made (stage 1: when all are), and summed when it is full and at the end,
in a copy that is as large as what lies in it. Stage 3 knows from the second step on in which order parameters are
wanted: it gathers them ahead, up to so many at a time, copies each from the message, and keeps it until the step's end
where it is wanted again soon, which in a model of half as many numbers as it may keep is always.
"""

from __future__ import annotations

from dataclasses import dataclass

from ringattn.budget.amounts import Amount, named
from ringattn.budget.layers import WEIGHTS
from ringattn.budget.tape import Tensor

BUCKET, PREFETCHED, KEPT, PERSISTS = 500_000_000, 50_000_000, 1_000_000_000, 100_000  # numbers, DeepSpeed's defaults
BUCKETS, GATHERED = "communication buffers", "parameters gathered"

Alive = tuple[tuple[Tensor, int], ...]


@dataclass(frozen=True, slots=True)
class Zero:
    """``weights``: the gradients of all parameters, whole. ``size``: bytes of a number. ``bucket``: its numbers."""

    stage: int
    ranks: int
    size: Amount
    weights: tuple[Tensor, ...]
    bucket: int = BUCKET

    @property
    def taken_away(self) -> bool:
        """Whether a gradient is in the bucket, or summed, as soon as it is made."""
        return self.stage > 1

    @property
    def message(self) -> Alive:
        """That in which parameters come, until the last of them is taken from it."""
        numbers = min(self._parted, PREFETCHED)
        return () if self.stage < 3 else self._as(GATHERED, "message of parameters", numbers)

    @property
    def gathered(self) -> Alive:
        """Parameters that are there until all is over."""
        return () if self.stage < 3 else self._as(GATHERED, "parameters of all layers", self._parted)

    @property
    def bucketed(self) -> Alive:
        """While gradients are made: the bucket, that of stage 3 lies there all the time; and what sums it where it is
        full before the end."""
        bucket = () if self.stage == 3 else self._as(BUCKETS, "bucket of gradients", self.bucket)
        full = self.taken_away and self._numbers > self.bucket
        return (*bucket, *(self._copy if full else ()), *(self.aside if full else ()))

    @property
    def last(self) -> Alive:
        """Besides, when the bucket is summed at the end; stage 1 gives up gradients for it."""
        return self._copy if self.taken_away and self._numbers <= self.bucket else ()

    @property
    def _copy(self) -> Alive:
        return self._as(BUCKETS, "bucket's copy", min(self.bucket, self._numbers))

    @property
    def aside(self) -> Alive:
        """Summed gradients of the own part, but for stage 3, where they have a place of their own all the time."""
        return self._part("gradients of the own part") if self.stage == 2 else ()

    @property
    def updating(self) -> Alive:
        """Gradients of the own part while the optimizer updates it: laid end to end."""
        flat = self._part("gradients of the own part, end to end")
        return flat if self.stage == 3 else (*flat, *self._part("gradients of the own part"))

    @property
    def _numbers(self) -> int:
        return sum(map(self._count, self.weights))

    @property
    def _parted(self) -> int:
        """Those of parameters that do not stay whole on every rank."""
        return sum(x for x in map(self._count, self.weights) if x > PERSISTS)

    def _count(self, weight: Tensor) -> int:
        return weight.size.value // self.size.value

    def _as(self, kind: str, name: str, numbers: int) -> Alive:
        return ((Tensor(kind, name, named("numbers", numbers) * self.size), 1),)

    def _part(self, name: str) -> Alive:
        size = (named("parameters", self._numbers) * self.size).over(named("ranks", self.ranks))
        return ((Tensor(WEIGHTS, name, size), 1),)


__all__ = ["BUCKET", "GATHERED", "KEPT", "Zero"]
