"""Do messages hide behind attention? One rank whose messages arrive from host memory at a link's rate, over one whose
messages take no time. What shows is the loop's order of posts and waits; what a library of collectives takes of the
device while it moves data does not."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import ringattn
from benchmarks.gpu.bench import Bench, graph_settings
from benchmarks.gpu.figures import Bar, Figure, Row, digits, judged
from ringattn.testing import InstantRank, StagedRank


def measure(bench: Bench) -> Iterator[Figure]:
    for schedule in ("ring", "exchange", "gather"):
        for name in ("forward", "both"):
            what = {"tokens": bench.sizes.shards[0], "schedule": schedule, "pass": name}
            yield what, partial(_figure, bench, schedule, name)


def _figure(bench: Bench, schedule: str, name: str) -> Row:
    sizes = bench.sizes
    rank, world = sizes.world // 2, sizes.world
    staged_rank = StagedRank(rank, world, bytes_per_second=sizes.link)
    instant, staged = (_context(bench, transport, schedule) for transport in (InstantRank(rank, world), staged_rank))
    runs = {"instant": getattr(bench.passes(instant), name), "staged": getattr(bench.passes(staged), name)}
    runs["staged"]()
    before = _received(staged)
    runs["staged"]()
    received = _received(staged) - before
    times = bench.clock.race(runs)
    copying = 1e3 * received / staged_rank.rate
    over = statistics.median(b - a for a, b in zip(times["instant"], times["staged"], strict=True))
    figure = {"hidden": digits(1 - over / copying)}
    return {
        "bytes": received,
        "bytes_per_second": digits(staged_rank.rate), "copying_ms": digits(copying),
        "instant_ms": digits(statistics.median(times["instant"])),
        "staged_ms": digits(statistics.median(times["staged"])),
        **judged(figure, Bar(0.95, "hidden")),
    }  # fmt: skip


def _context(bench: Bench, transport: InstantRank, schedule: str) -> ringattn.ContextParallel:
    settings = {"layout": "zigzag", "schedule": schedule, "options": graph_settings()["off"]}
    return bench.context(transport, bench.sizes.shards[0] * bench.sizes.world, **settings)


def _received(cp: ringattn.ContextParallel) -> int:
    return sum(cp.traffic()["received"].values())
