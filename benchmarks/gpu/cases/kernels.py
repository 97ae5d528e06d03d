"""Every kernel that is there and accepts, on one rank: dense tiles, a window, and masks of many small tiles. The table
that the order of kernels is chosen from."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

import ringattn
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.figures import Bar, Figure, Passes, Row, digits, judged
from ringattn.kernels import KERNELS

OWN, BLOCKS = "triton", "flash4_blocks"  # each beside the best of the others, the second for masks in many pieces alone
SLOW_MS = 400.0  # of both passes: what takes longer is timed once
FEW = (3, 5)  # rounds
OF_BEST = {"forward": Bar(0.65, "of_best"), "backward": Bar(0.40, "of_best")}
FASTEST = {"forward": Bar(1.0, "of_best"), "backward": Bar(1.0, "of_best")}


def measure(bench: Bench) -> Iterator[Figure]:
    sizes = bench.sizes
    chunk, scattered = 4 * sizes.block, sizes.long // sizes.window // 4
    stride = sizes.long // chunk
    spread = list(range(7, sizes.long, sizes.long // scattered))
    for name, mask, tokens, bars in (
        ("full", ringattn.full(), sizes.dense, OF_BEST),
        ("causal", ringattn.causal(), sizes.dense, OF_BEST),
        (f"window {sizes.window}", ringattn.sliding_window(sizes.window - 1), sizes.long, {}),
        (f"bigbird({sizes.block}, 3, 1, 2)", ringattn.bigbird(sizes.block, 3, 1, 2), sizes.long, FASTEST),
        (f"chunked({chunk})", ringattn.chunked(chunk), sizes.long, FASTEST),
        (f"strided({stride})", ringattn.strided(stride), sizes.long, FASTEST),
        (f"longformer, {scattered} scattered", ringattn.longformer(sizes.window, spread), sizes.long, FASTEST),
    ):
        yield {"tokens": tokens, "mask": name}, partial(_table, bench, mask, tokens, bars)


def _table(bench: Bench, mask: ringattn.Mask, tokens: int, bars: dict[str, Bar]) -> Row:
    """TFLOP/s of each kernel, and why some have none."""
    sizes = bench.sizes
    table: Row = {}
    racing: dict[str, Passes] = {}
    clock = replace(bench.clock, rounds=min(FEW, sizes.rounds))
    pairs = mask.area(tokens, tokens)
    left_out = sizes.left_out | (frozenset() if bars is FASTEST else {BLOCKS})
    for kernel in (kernel.name for kernel in KERNELS if kernel.name not in left_out):
        try:
            passes = bench.passes(bench.context(None, tokens, mask=mask, kernel=kernel))
            passes.both()
            forward, both = (clock.once(run, 1) for run in passes)
        except (NotImplementedError, torch.OutOfMemoryError) as error:
            table[kernel] = {"refused": f"{error}"[:300]}
            continue
        except Exception as error:  # the others' rates are of use all the same
            table["error"] = f"{kernel}: {type(error).__name__}: {error}"
            continue
        if both > SLOW_MS:
            table[kernel] = {"once": True, **_rates(bench, pairs, [forward], [both])}
        else:
            racing[kernel] = passes
    times = _race(clock, racing)
    for kernel in racing:
        table[kernel] = _rates(bench, pairs, times[f"{kernel} forward"], times[f"{kernel} both"])
    own = {name: _own(table, kernel, bars) for name, kernel in (("own", OWN), ("blocks", BLOCKS)) if kernel in racing}
    return {**table, **own}


def _race(clock: Clock, racing: dict[str, Passes]) -> dict[str, list[float]]:
    runs = {f"{kernel} {name}": run for kernel, passes in racing.items() for name, run in passes._asdict().items()}
    return clock.race(runs)


def _rates(bench: Bench, pairs: int, forward: list[float], both: list[float]) -> Row:
    sizes = bench.sizes
    backward = statistics.median(max(b - f, 1e-6) for f, b in zip(forward, both, strict=True))
    return {
        "forward": digits(pairs * sizes.forward_flop / statistics.median(forward) / 1e9),
        "backward": digits(pairs * sizes.backward_flop / backward / 1e9),
        "both": digits(pairs * (sizes.forward_flop + sizes.backward_flop) / statistics.median(both) / 1e9),
    }


def _own(table: Row, own: str, bars: dict[str, Bar]) -> Row:
    """The rates of one of our kernels over the best of the others'."""
    found = {}
    for name in ("forward", "backward"):
        others = [row[name] for kernel, row in table.items() if kernel not in (OWN, BLOCKS, "error") and name in row]
        if others:
            found[name] = judged({"of_best": digits(table[own][name] / max(others))}, bars.get(name))
    return found
