"""What is written of a measurement: a figure, and whether it meets its bar."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.gpu.clock import Run, Times, ratio

Row = dict[str, Any]
Figure = tuple[Row, Callable[[], Row]]  # what is measured, in words and sizes, and what measures it


class Passes(NamedTuple):
    """The passes of one computation."""

    forward: Run
    both: Run


def sides(own: Passes, bare: Passes) -> dict[str, Run]:
    """Both passes of both sides, which are to take turns."""
    return {
        "own forward": own.forward,
        "bare forward": bare.forward,
        "own both": own.both,
        "bare both": bare.both,
    }


class Bar(NamedTuple):
    """What a figure is to reach: ``value`` at least, or at most; ``of``: which number of the figure it is about."""

    value: float
    of: str = "ratio"
    at_most: bool = False


def digits(number: float) -> float:
    """Four digits."""
    return float(f"{number:.4g}")


def judged(figure: Row, bar: Bar | None) -> Row:
    """A figure with its bar and whether it is met."""
    if bar is None:
        return figure
    found = figure[bar.of]
    said = f"{bar.of} {'at most' if bar.at_most else 'at least'} {bar.value:g}"
    return {**figure, "bar": said, "met": found <= bar.value if bar.at_most else found >= bar.value}


def compared(times: Times, flop: Mapping[str, int], bars: Mapping[str, Bar]) -> Row:
    """Forward, backward (the time of both less that of forward, by round) and both, each beside the bare calls.
    ``times`` are of :func:`sides`; ``flop`` is of forward and of backward."""
    times = dict(times)
    for side in ("own", "bare"):
        pairs = zip(times[f"{side} both"], times[f"{side} forward"], strict=True)
        times[f"{side} backward"] = [max(both - forward, 1e-6) for both, forward in pairs]
    work = {**flop, "both": flop["forward"] + flop["backward"]}
    row = {}
    for name in ("forward", "backward", "both"):
        own, bare = (statistics.median(times[f"{side} {name}"]) for side in ("own", "bare"))
        figure = {
            "ms": digits(own),
            "tflops": digits(work[name] / own / 1e9),
            "bare_tflops": digits(work[name] / bare / 1e9),
            "ratio": digits(ratio(times, f"bare {name}", f"own {name}")),
        }
        row[name] = judged(figure, bars.get(name))
    return row
