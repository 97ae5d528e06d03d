"""Rates: what a device does in a second, as far as costs follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringattn.arguments.values import flag, number
from ringattn.planning.shape import Shape

LEAST, MOST = 1.0, 1e21  # FLOP/s
LONGEST = 1e6  # seconds


@dataclass(frozen=True)
class Rates:
    """What a device does.

    forward, backward: FLOP/s of attention on large tiles that no bound cuts; a pair of a query and a key is 4 FLOP for
        each head and element of its size, and 10 backward.
    diagonal: the part of these rates, at most 1, that tiles reach which a diagonal bounds on one side (causal), counted
        in pairs that attend; window: the part of that rate that tiles reach which diagonals bound on both sides.
    call: seconds that one kernel call of a pass takes beyond its FLOP.
    step: seconds that one step takes beyond its messages and its calls.
    merge: seconds an element to merge a query row's result into another, or to copy it.
    exposed: the part of a transfer, 0 to 1, that costs time even while hidden behind compute.
    queued: whether the host runs ahead of the device, so that the longer of their times counts (calls, steps and
        messages are the host's), and not their sum.
    """

    forward: float
    backward: float
    diagonal: float = 1.0
    window: float = 1.0
    call: float = 0.0
    step: float = 0.0
    merge: float = 0.0
    exposed: float = 0.0
    queued: bool = False

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            object.__setattr__(self, name, number(f"Rates.{name}", getattr(self, name), least, most))
        object.__setattr__(self, "queued", flag("Rates.queued", self.queued))

    def weigh(self, by_kind: NDArray[Any]) -> NDArray[Any]:
        """Pairs, ``[3, n]`` of bands without a bound, with one, with two, as so many of bands without: ``[n]``."""
        return np.asarray(np.array([1.0, 1.0 / self.diagonal, 1.0 / (self.diagonal * self.window)]) @ by_kind)

    def pair_seconds(self, shape: Shape) -> NDArray[Any]:
        """Seconds that a pair of a band without bounds takes in each pass."""
        return np.array([shape.forward.flop / self.forward, shape.backward.flop / self.backward])


_LIMITS = {"forward": (LEAST, MOST), "backward": (LEAST, MOST), "exposed": (0.0, 1.0)}
_LIMITS |= {name: (0.01, 1.0) for name in ("diagonal", "window")}
_LIMITS |= {name: (0.0, LONGEST) for name in ("call", "step", "merge")}
