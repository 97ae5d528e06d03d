"""One rank of a ring of eight whose transfers take no time, causal and zigzag, beside the bare calls of its tiles:
every launch of every turn, without merges, copies and sums. With graphs both sides are CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.gpu.bench import Bench, graph_settings
from benchmarks.gpu.clock import graphed
from benchmarks.gpu.figures import Bar, Figure, Passes, Row, compared, sides
from ringattn.testing import InstantRank

SCHEDULES = ("ring", "exchange", "gather")
# forward and both, by tokens a rank: those of 1,024 are for graphs
BARS = {
    8192: {"forward": Bar(0.95), "both": Bar(0.96)},
    4096: {"forward": Bar(0.85), "both": Bar(0.90)},
    1024: {"forward": Bar(0.75), "both": Bar(0.75)},
}
GRAPHS_ONLY = 1024


def measure(bench: Bench) -> Iterator[Figure]:
    options = graph_settings(bench.on_gpu)
    for shard in bench.sizes.shards:
        for schedule in SCHEDULES:
            for graphs, setting in options.items():
                what = {"tokens": shard, "schedule": schedule, "graphs": graphs}
                yield what, partial(_figure, bench, shard, graphs, schedule=schedule, options=setting)


def _figure(bench: Bench, shard: int, graphs: str, **settings: Any) -> Row:
    sizes = bench.sizes
    rank = InstantRank(sizes.world // 2, sizes.world)
    cp = bench.context(rank, shard * sizes.world, layout="zigzag", **settings)
    program, own = cp.program(cp.masks[0]), bench.passes(cp)
    bare = bench.bare_passes(bench.tiles(program.forward), bench.tiles(program.backward))
    if graphs == "on" and bench.on_gpu:
        bare.both()  # what is compiled at a first call
        bare = Passes(graphed(bare.forward), graphed(bare.both))
    times = bench.clock.race(sides(own, bare))
    bars = {} if graphs == "off" and shard <= GRAPHS_ONLY else BARS.get(shard, {})
    return {"calls": program.calls, **compared(times, bench.flop(int(cp.plan.work[rank.rank])), bars)}
