"""One call on one rank, beside the bare call."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import ringattn
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.figures import Bar, Figure, Row, compared, sides
from ringattn.geometry.tiles import Window

SHORT = 4096  # up to which a call may reach less


def measure(bench: Bench) -> Iterator[Figure]:
    for tokens in bench.sizes.calls:
        for mask, window in ((ringattn.causal(), (None, 0)), (ringattn.full(), (None, None))):
            yield {"tokens": tokens, "mask": str(mask)}, partial(_figure, bench, tokens, mask, window)


def _figure(bench: Bench, tokens: int, mask: ringattn.Mask, window: Window) -> Row:
    tiles = [bench.tile(tokens, window)]
    own, bare = bench.passes(bench.context(None, tokens, mask=mask)), bench.bare_passes(tiles, tiles)
    bar = Bar(0.90 if tokens <= SHORT else 0.97)
    flop = bench.flop(mask.area(tokens, tokens))
    return compared(bench.clock.race(sides(own, bare)), flop, {"forward": bar, "both": bar})
