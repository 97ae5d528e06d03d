"""What one rank of a ring spends beside attention (merges, casts, copies, sums): the part of the device's time that is
not in attention's kernels, by a profile, with the kernels that take most of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench, graph_settings
from benchmarks.gpu.clock import Run
from benchmarks.gpu.figures import Bar, Figure, Row, digits, judged
from ringattn.testing import InstantRank

ATTENTION = ("flash", "fmha", "sdpa", "attention", "attend")  # in the names of attention's kernels
RUNS, SHOWN, LONGEST = 3, 6, 80


def measure(bench: Bench) -> Iterator[Figure]:
    for schedule in ("ring", "exchange"):
        for name in ("forward", "both"):
            what = {"tokens": bench.sizes.shards[0], "schedule": schedule, "pass": name}
            yield what, partial(_figure, bench, schedule, name)


def _figure(bench: Bench, schedule: str, name: str) -> Row:
    sizes = bench.sizes
    rank = InstantRank(sizes.world // 2, sizes.world)
    options = graph_settings()["off"]
    cp = bench.context(rank, sizes.shards[0] * sizes.world, layout="zigzag", schedule=schedule, options=options)
    spent = kernel_times(getattr(bench.passes(cp), name), bench.on_gpu)
    beside = {kernel: time for kernel, time in spent.items() if not is_attention(kernel)}
    most = sorted(beside.items(), key=lambda item: -item[1])[:SHOWN]
    total = sum(spent.values())
    figure = {
        "part": digits(sum(beside.values()) / total),
        "kernels_us": digits(total / RUNS),
        "beside_us": {kernel[:LONGEST]: digits(time / RUNS) for kernel, time in most},
    }
    return judged(figure, Bar(0.08, "part", at_most=True))


def is_attention(kernel: str) -> bool:
    return any(word in kernel.lower() for word in ATTENTION)


def kernel_times(run: Run, on_gpu: bool) -> dict[str, float]:
    """Microseconds of each kernel, or of each operator on a CPU, in all runs together."""
    for _ in range(2):
        run()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        for _ in range(RUNS):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    events = found.key_averages()
    if on_gpu:
        return {e.key: e.self_device_time_total for e in events if e.device_type == DeviceType.CUDA}
    return {e.key: e.self_cpu_time_total for e in events}
