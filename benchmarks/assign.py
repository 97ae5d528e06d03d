"""Groups that change beside groups of one size, simulated: batches of documents, at most 8,192 tokens a rank at once.

Nothing is run. Every group starts a part once its last member is free, as in `ringattn.assign`, by whose seconds of a
causal attention call (32 heads over 8 of 128, bf16, an H200's figures) all are compared. The lengths are synthetic:

* ``mixed``: what LongAlign trains on (arXiv 2401.18058), by its published ranges and not by its data: one document in
  ten of 8k to 64k tokens (log-normal, median 16k), nine short ones (log-normal, median 1k, at most 8k);
* ``long``: documents of 1k to 64k alone (log-normal, median 14k);
* ``bimodal``: one in ten of 30k to 64k, nine of 0.5k to 2k; ``uniform``: 1k to 64k.

Groups of one size hold the longest document of all batches. ``packed``: of the smallest such power of two, the packs
filled in the order of the batch and dealt out in turn, as loaders do. ``best``: of the size of least time over all
batches, each packed in order or balanced by the same seconds, the longest document first, whichever is done sooner.
``world``: the same for all ranks as one group. ``by plans``: the first batch, changing groups beside balanced ones of
the best size, by the library's own plan of every pack (layout, schedule, bytes) in place of the closed form, which
charges a group for each document as if it were cut over all its ranks.

``a layer``: with what the linear layers of a layer of an 8B model take for a token beside attention, which groups of
any size share as evenly: 6 FLOP a parameter, 2.2e8 parameters, at 4e14 FLOP/s (assumed).

    python -m benchmarks.assign
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import typer

import ringattn
from benchmarks.common import write
from ringattn.geometry.spans import Ints
from ringattn.planning.assign import best
from ringattn.planning.assignment import Assignment, Part
from ringattn.planning.cost import Terms
from ringattn.planning.filling import fill
from ringattn.planning.hardware import HOPPER
from ringattn.planning.launches import Stacking
from ringattn.planning.placement import Problem, choose
from ringattn.planning.spread import Batch, pairs

MEMORY, MOST = 8192, 65536
WORLDS = ((8, 256), (32, 256), (128, 256), (128, 1024))  # ranks, and documents of a batch
LINEAR = 6 * 2.2e8 / 4e14  # seconds a token
TERMS = Terms(HOPPER.topology, HOPPER.rates, stacking=Stacking.of("cuda", alone=False))


def lognormal(rng: np.random.Generator, count: int, median: int, spread: float, least: int, most: int) -> Ints:
    return np.clip(rng.lognormal(np.log(median), spread, count), least, most).astype(np.int64)


def mixed(rng: np.random.Generator, count: int) -> Ints:
    long, short = lognormal(rng, count, 16_000, 0.6, 8192, MOST), lognormal(rng, count, 1_000, 1.0, 64, 8192)
    return np.where(rng.random(count) < 0.1, long, short)


def long(rng: np.random.Generator, count: int) -> Ints:
    return lognormal(rng, count, 14_000, 0.7, 1024, MOST)


def bimodal(rng: np.random.Generator, count: int) -> Ints:
    long, short = rng.integers(30_000, MOST, count), rng.integers(500, 2000, count)
    return np.where(rng.random(count) < 0.1, long, short)


def uniform(rng: np.random.Generator, count: int) -> Ints:
    return rng.integers(1024, MOST, count)


def batch_of(lengths: Ints, world: int, token_seconds: float) -> Batch:
    return Batch(lengths, pairs(ringattn.causal(), lengths), world, MEMORY, TERMS, token_seconds)


def fixed(batch: Batch, size: int) -> Assignment:
    """All groups of one size, balanced."""
    filled = fill(batch, np.full(len(batch.lengths), size))
    assert filled is not None
    return filled.assignment(batch)


def packed(batch: Batch, size: int) -> float:
    """Seconds of groups of one size whose packs are filled in order and dealt out in turn."""
    ranks = int(batch.sizes[size])
    packs, room = [0.0], ranks * MEMORY
    for tokens, seconds in zip(batch.lengths.tolist(), batch.device[:, size].tolist(), strict=True):
        if tokens > room:
            packs.append(0.0)
            room = ranks * MEMORY
        packs[-1] += seconds
        room -= tokens
    taken = np.maximum(packs, batch.host[size])
    return float(np.bincount(np.arange(len(packs)) % (batch.world // ranks), taken).max())


@cache
def planned_seconds(lengths: tuple[int, ...], ranks: int) -> float:
    """Of a pack's attention, by the plan that the library would run."""
    mask = ringattn.causal() & ringattn.documents(np.append(0, np.cumsum(lengths)))
    bound = mask.bind(sum(lengths), sum(lengths))
    return choose(Problem((bound,), ranks, TERMS), "auto").taken.seconds


def planned(plan: Assignment) -> float:
    def part(one: Part) -> Part:
        return replace(one, seconds=planned_seconds(one.lengths, len(one.ranks))) if one.documents else one

    return Assignment(plan.world, tuple(tuple(map(part, parts)) for parts in plan.micro_batches)).seconds


def milliseconds(batch: Batch) -> float:
    """What a call takes, the fastest of five."""
    given: dict[str, Any] = {"memory": MEMORY, "topology": TERMS.topology, "rates": TERMS.rates}
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        ringattn.assign(batch.lengths, batch.world, token_seconds=batch.token_seconds, **given)
        taken.append(time.perf_counter() - start)
    return 1000 * min(taken)


@dataclass(frozen=True)
class Fixed:
    """Groups of one size over all batches: seconds packed in order, and the balanced assignments."""

    in_order: tuple[float, ...]
    balanced: tuple[Assignment, ...]

    @staticmethod
    def of(batches: Sequence[Batch], size: int) -> Fixed:
        return Fixed(tuple(packed(b, size) for b in batches), tuple(fixed(b, size) for b in batches))

    @property
    def seconds(self) -> float:
        return sum(min(a, b.seconds) for a, b in zip(self.in_order, self.balanced, strict=True))


def row(name: str, lengths: Sequence[Ints], world: int, token_seconds: float) -> dict[str, Any]:
    """One distribution on one world, all batches one after the other."""
    batches = [batch_of(each, world, token_seconds) for each in lengths]
    least = max(int(batch.least.max()) for batch in batches)
    sizes = batches[0].sizes
    others = [(int(sizes[size]), Fixed.of(batches, size)) for size in _indices(batches[0], least)]
    best_size, taken = min(others, key=lambda other: other[1].seconds)
    plans = [best(batch) for batch in batches]
    seconds = sum(plan.seconds for plan in plans)
    return {
        "lengths": name,
        "ranks": world,
        "documents": len(lengths[0]),
        "token_seconds": token_seconds,
        "tokens": int(sum(each.sum() for each in lengths)),
        "seconds": seconds,
        "idle": statistics.mean(plan.idle for plan in plans),
        "micro_batches": max(len(plan.micro_batches) for plan in plans),
        "best_size": best_size,
        "over_best": taken.seconds / seconds,
        "best_idle": statistics.mean(plan.idle for plan in taken.balanced),
        "over_packed": sum(others[0][1].in_order) / seconds,
        "over_world": others[-1][1].seconds / seconds,
        "by_plans": None if token_seconds else planned(taken.balanced[0]) / planned(plans[0]),
        "milliseconds": max(map(milliseconds, batches)),
    }


def _indices(batch: Batch, least: int) -> list[int]:
    return [int(size) for size in np.flatnonzero(batch.doublings & (batch.sizes >= least))]


def main(batches: int = 6, json: str = "assign-cpu") -> None:
    """Simulate, print and write JSON."""
    result: dict[str, Any] = {"memory": MEMORY, "batches": batches, "rows": []}
    for kind in (mixed, long, bimodal, uniform):
        for world, count in WORLDS:
            lengths = [kind(np.random.default_rng(seed), count) for seed in range(batches)]
            for token_seconds in (0.0, LINEAR):
                one = row(kind.__name__, lengths, world, token_seconds)
                result["rows"].append(one)
                what = "a layer" if token_seconds else "attention"
                by_plans = f"by plans {one['by_plans']:.2f}; " if one["by_plans"] else ""
                print(
                    f"{kind.__name__:8} {world:4} ranks {count:5,} documents, {what:9}: "
                    f"{one['over_best']:.2f} x over the best size ({one['best_size']}), {one['over_packed']:.2f} over "
                    f"packed, {one['over_world']:.2f} over world; {by_plans}idle "
                    f"{one['idle']:.1%} for {one['best_idle']:.1%}; {one['milliseconds']:.1f} ms"
                )
    write(json, result)


if __name__ == "__main__":
    typer.run(main)
