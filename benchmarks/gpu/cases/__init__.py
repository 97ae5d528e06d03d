"""The cases in order of value, with the seconds of each when all of them have 240."""

from benchmarks.gpu.cases import accuracy, calls, ceilings, host, kernels, long, memory, merging, overlap, ranks
from benchmarks.gpu.runner import Case

CASES: tuple[Case, ...] = (
    Case("ceilings", 5, ceilings.measure),
    Case("calls", 40, calls.measure),
    Case("ranks", 75, ranks.measure),
    Case("long", 30, long.measure),
    Case("host", 10, host.measure),
    Case("merging", 10, merging.measure),
    Case("accuracy", 15, accuracy.measure),
    Case("kernels", 35, kernels.measure),
    Case("overlap", 15, overlap.measure),
    Case("memory", 5, memory.measure),
)
