"""Limits of time in tests are seconds of one machine; here is how many of them a slower one gets."""

import time
from functools import cache

# What `_fixed_work` took where the limits were set: one core of an Intel Xeon of 2023, nothing beside it.
SET_ON = 0.05


@cache
def slowness() -> float:
    """How much longer this machine takes than that, as it is now: 1 to 4."""
    return min(max(1.0, min(_fixed_work() for _ in range(3)) / SET_ON), 4.0)


def patience(seconds: float) -> float:
    """So many seconds of the machine that limits were set on, in seconds of this one."""
    return seconds * slowness()


def _fixed_work() -> float:
    start = time.perf_counter()
    sum(number * number for number in range(1_000_000))
    return time.perf_counter() - start
