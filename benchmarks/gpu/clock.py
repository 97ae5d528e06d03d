"""Time: cases that take turns, by the device's clock, or the host's for what only the host does."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Run = Callable[[], object]
Times = dict[str, list[float]]

LEAST_MS = 5.0  # of the runs in a row that are timed together
MOST = 20  # runs in a row


@dataclass(frozen=True)
class Clock:
    """A device's. ``seconds``: of one comparison; ``rounds``: the fewest and the most."""

    device: str
    seconds: float
    rounds: tuple[int, int]

    def race(self, cases: Mapping[str, Run]) -> Times:
        """Milliseconds of one run of each case by round, the cases taking turns."""
        in_a_row = {name: self._how_many(case) for name, case in cases.items()}
        times: Times = {name: [] for name in cases}
        deadline, (least, most) = time.monotonic() + self.seconds, self.rounds
        for number in range(most):
            if number >= least and time.monotonic() > deadline:
                break
            for name, case in cases.items():
                times[name].append(self.once(case, in_a_row[name]))
        return times

    def _how_many(self, case: Run) -> int:
        """Runs that take long enough together, after two that warm up."""
        case()
        case()
        return min(MOST, max(1, math.ceil(LEAST_MS / max(self.once(case, 1), 1e-3)))) if self.seconds else 1

    def once(self, case: Run, runs: int) -> float:
        """Milliseconds of one of several runs in a row."""
        if self.device == "cpu":
            begun = time.perf_counter()
            for _ in range(runs):
                case()
            return 1e3 * (time.perf_counter() - begun) / runs
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(runs):
            case()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / runs

    def host(self, cases: Mapping[str, Run]) -> Times:
        """Microseconds that the host is busy with one run, by round: the device is waited for outside of them."""
        times: Times = {name: [] for name in cases}
        for number in range(self.rounds[0] * 4 + 1):
            for name, case in cases.items():
                self.settle()
                begun = time.perf_counter()
                for _ in range(MOST):
                    case()
                if number:  # the first round warms up
                    times[name].append(1e6 * (time.perf_counter() - begun) / MOST)
        return times

    def settle(self) -> None:
        """Waits for the device."""
        if self.device != "cpu":
            torch.cuda.synchronize()


def ratio(times: Times, above: str, below: str) -> float:
    """Median over the rounds of one case's time over another's."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def graphed(case: Run) -> Run:
    """The same as a CUDA graph, which is captured once; the case has run before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case()
    return graph.replay
