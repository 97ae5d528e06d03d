"""Masks that a long sequence is for, on one rank: a window, a window with global tokens, and packed documents, each
beside the bare calls of its tiles; for documents that is one call of variable lengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np

import ringattn
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.figures import Bar, Figure, Passes, Row, compared, sides


def measure(bench: Bench) -> Iterator[Figure]:
    tokens, window = bench.sizes.long, bench.sizes.window
    bars = _bars(forward=440, backward=390)
    yield (
        {"tokens": tokens, "mask": f"window {window}"},
        partial(_tiles, bench, ringattn.sliding_window(window - 1), bars),
    )
    longformer = ringattn.longformer(window - 1, window // 16)
    what = {"tokens": tokens, "mask": f"longformer, {window // 16} global tokens"}
    yield what, partial(_tiles, bench, longformer, _bars(both=380))
    yield {"tokens": tokens, "mask": f"{bench.sizes.documents} random documents, causal"}, partial(_documents, bench)


def _bars(**tflops: float) -> dict[str, Bar]:
    return {name: Bar(value, "tflops") for name, value in tflops.items()}


def _tiles(bench: Bench, mask: ringattn.Mask, bars: Mapping[str, Bar]) -> Row:
    cp = bench.context(None, bench.sizes.long, mask=mask)
    program = cp.program(mask)
    return _compared(bench, cp, bench.bare_passes(bench.tiles(program.forward), bench.tiles(program.backward)), bars)


def _documents(bench: Bench) -> Row:
    sizes = bench.sizes
    cuts = np.random.default_rng(0).choice(np.arange(1, sizes.long), sizes.documents - 1, replace=False)
    bounds = [0, *sorted(cuts.tolist()), sizes.long]
    cp = bench.context(None, sizes.long, mask=ringattn.documents(bounds) & ringattn.causal())
    bare = bench.bare.documents(*bench.tensors(sizes.long), bounds)
    return _compared(bench, cp, bare, _bars(forward=340, backward=310))


def _compared(bench: Bench, cp: ringattn.ContextParallel, bare: Passes, bars: Mapping[str, Bar]) -> Row:
    times = bench.clock.race(sides(bench.passes(cp), bare))
    return {"calls": cp.program(cp.masks[0]).calls, **compared(times, bench.flop(int(cp.plan.work[0])), bars)}
