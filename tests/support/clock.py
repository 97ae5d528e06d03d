"""Limits of time in tests are taken as seconds of one machine; here is how many of them a slower one gets."""

import time
from functools import cache

# The least that `_fixed_work` took on an Intel Xeon with AMX (it varied up to 0.107). The machines that the limits were
# set on were not measured so; this is a stand-in for them.
SET_ON = 0.062


@cache
def slowness() -> float:
    """How much longer this machine takes than that, as it is now: 1 to 4."""
    return min(max(1.0, min(_fixed_work() for _ in range(3)) / SET_ON), 4.0)


def patience(seconds: float) -> float:
    """So many seconds of that machine, in seconds of this one."""
    return seconds * slowness()


def _fixed_work() -> float:
    start = time.perf_counter()
    sum(number * number for number in range(1_000_000))
    return time.perf_counter() - start
