"""The host's time of a call that takes the device no time, eager: in microseconds, many calls in a row, the device
waited for outside of them. Beside PyTorch's own attention."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu.bench import Bench, graph_settings
from benchmarks.gpu.figures import Bar, Figure, Passes, Row, digits, judged
from ringattn.testing import InstantRank

BARS = {"forward": Bar(150, "microseconds", at_most=True), "both": Bar(450, "microseconds", at_most=True)}


def measure(bench: Bench) -> Iterator[Figure]:
    for name in ("forward", "both"):
        yield {"tokens": bench.sizes.host, "pass": name}, partial(_figure, bench, name)


def _figure(bench: Bench, name: str) -> Row:
    sizes, options = bench.sizes, graph_settings()["off"]
    alone = bench.context(None, sizes.host, options=options)
    rank = InstantRank(sizes.world // 2, sizes.world)
    ring = bench.context(rank, sizes.host * sizes.world, layout="zigzag", schedule="ring", options=options)
    runs = {"one rank": bench.passes(alone), "one rank of a ring": bench.passes(ring), "torch": torch_passes(bench)}
    times = bench.clock.host({side: getattr(passes, name) for side, passes in runs.items()})
    figures = {side: {"microseconds": digits(statistics.median(spent))} for side, spent in times.items()}
    return {**figures, "one rank": judged(figures["one rank"], BARS[name])}


def torch_passes(bench: Bench) -> Passes:
    q, k, v, dout = (x.transpose(1, 2) for x in bench.tensors(bench.sizes.host))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def forward() -> object:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def both() -> object:
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out, leaves, dout)

    return Passes(forward, both)
