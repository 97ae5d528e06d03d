"""Seconds to plan 1,048,576 tokens on 1,024 ranks: 5,000 documents & a window | 64 global tokens. Then what a training
step waits for, ``replace()`` with new documents every batch; and the kernel calls of block-sparse masks.

python -m benchmarks.planning
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import typer

import ringattn
from benchmarks.common import write
from ringattn.comm import PlanningRank
from ringattn.geometry.layouts import contiguous, zigzag
from ringattn.planning.cost import Terms
from ringattn.planning.placement import Choice, Problem, choose
from ringattn.planning.plan import Plan
from ringattn.planning.schedules import by_name
from ringattn.planning.turns import compile_program

SEQLEN, WORLD, DOCUMENTS = 1 << 20, 1024, 5000


def median_seconds(case: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        case()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def spread(count: int) -> ringattn.Mask:
    """Documents that end at uniformly random places."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, SEQLEN), count - 1, replace=False))
    return ringattn.documents([0, *cuts.tolist(), SEQLEN])


def batch(seed: int, seqlen: int, count: int) -> ringattn.Mask:
    """Packed documents of lognormal lengths, causal."""
    sizes = np.random.default_rng(seed).lognormal(0, 1, count)
    cuts = np.unique((sizes.cumsum() / sizes.sum() * seqlen).astype(int)[:-1])
    return ringattn.documents([0, *cuts[cuts > 0].tolist(), seqlen]) & ringattn.causal()


def worlds(rounds: int) -> list[dict[str, Any]]:
    """One rank's plan, the world's, and the world's with one rank's program."""
    window = spread(DOCUMENTS) & ringattn.sliding_window(1023)
    masks = {"any": window | ringattn.global_tokens(64)}
    masks["causal"] = masks["any"] & ringattn.causal()
    rows: list[dict[str, Any]] = []
    for name, mask in masks.items():
        for layout in (contiguous, zigzag):
            placed = layout(SEQLEN, WORLD)
            bound = mask.bind(SEQLEN, SEQLEN)

            def one_rank(bound: Any = bound, placed: Any = placed) -> None:
                plan = Plan(bound, placed, placed)
                plan.own_tiles(WORLD // 2, plan.k_layout.frame(WORLD // 2))
                plan.needs(WORLD // 2)

            def world(bound: Any = bound, placed: Any = placed) -> None:
                plan = Plan(bound, placed, placed)
                plan.work, plan.received  # noqa: B018 - computed on access

            def program(bound: Any = bound, placed: Any = placed) -> None:
                plan = Plan(bound, placed, placed)
                compile_program(plan, by_name("exchange"), 1, WORLD // 2)

            row = {
                "mask": name,
                "layout": layout.__name__,
                "one_rank_seconds": median_seconds(one_rank, rounds),
                "world_seconds": median_seconds(world, rounds),
                "world_and_program_seconds": median_seconds(program, rounds),
            }
            rows.append(row)
            print(
                f"{name:7} {layout.__name__:11} one rank {1000 * row['one_rank_seconds']:6.1f} ms, "
                f"world {1000 * row['world_seconds']:6.1f} ms, "
                f"world and one rank's exchange program {1000 * row['world_and_program_seconds']:6.1f} ms"
            )
    return rows


def placements(rounds: int) -> list[dict[str, Any]]:
    """The choice of a layout and a schedule for 1,024 ranks, and its balance."""
    rows, packed = [], spread(DOCUMENTS)
    masks = {"causal": packed & ringattn.causal(), "window": packed & ringattn.sliding_window(1023)}
    for name, mask in masks.items():
        for layout in ("auto", "balanced"):

            def case(mask: ringattn.Mask = mask, layout: str = layout) -> Choice:
                bound = mask.bind(SEQLEN, SEQLEN)
                return choose(Problem((bound,), WORLD, Terms()), layout)

            best = case().lines[0]
            row = {"mask": f"documents & {name}", "layout": layout, "taken": best.layout}
            row |= {"balance": best.offers[0].balance, "seconds": median_seconds(case, rounds)}
            rows.append(row)
            print(f"{row['mask']:18} {layout:8} on {WORLD:,} ranks: {row['seconds']:.2f} s, takes {best.layout}, "
                  f"balance {row['balance']:.2f}")  # fmt: skip
    return rows


def replacements(batches: int = 50, seqlen: int = 1 << 17, count: int = 200) -> list[dict[str, Any]]:
    """``replace()`` with new documents every batch on 8 ranks, layout and schedule chosen anew."""
    first = ringattn.ContextParallel(PlanningRank(3, 8), seqlen)
    rows = []
    for program in (False, True):
        wall, cpu = [], []
        for seed in range(-5, batches):  # the first five warm up
            start, spent = time.perf_counter(), time.process_time()
            mask = batch(abs(seed), seqlen, count)
            cp = first.replace(mask=mask)
            if program:
                cp.program(mask)
            if seed >= 0:
                wall.append(1000 * (time.perf_counter() - start))
                cpu.append(1000 * (time.process_time() - spent))
        row = {"program": program, "seqlen": seqlen, "documents": count, "ranks": 8, "layout": cp.q_layout.name}
        row |= {"median_ms": statistics.median(wall), "p90_ms": float(np.quantile(wall, 0.9))}
        row |= {"least_ms": min(wall), "cpu_median_ms": statistics.median(cpu)}
        rows.append(row)
        print(f"replace(), {count} documents of {seqlen:,} tokens, 8 ranks{', and its program' if program else '':17}: "
              f"median {row['median_ms']:.1f} ms, p90 {row['p90_ms']:.1f} ms, least {row['least_ms']:.1f} ms, "
              f"processor {row['cpu_median_ms']:.1f} ms")  # fmt: skip
    return rows


def launches(seqlen: int = 1 << 17, world: int = 8) -> list[dict[str, Any]]:
    """Kernel calls of block-sparse masks on the layout that auto picks, on a CPU."""
    masks = {
        "longformer(1023, 64)": ringattn.longformer(1023, 64),
        "longformer(1023, 64, causal=False)": ringattn.longformer(1023, 64, causal=False),
        "bigbird(64, 3, 2, 0)": ringattn.bigbird(64, 3, 2, 0),
        "bigbird(64, 3, 2, 3)": ringattn.bigbird(64, 3, 2, 3),
    }
    rows = []
    for name, mask in masks.items():
        first = ringattn.ContextParallel(PlanningRank(0, world), seqlen, mask=mask)
        ranks = [ringattn.ContextParallel(PlanningRank(rank, world), seqlen, mask=mask) for rank in range(world)]
        turns = [turn for cp in ranks for turn in cp.program(mask).forward]
        row = {"mask": name, "layout": first.q_layout.name, "schedule": first.schedule, "ranks": world}
        row |= {
            "calls_a_rank": max(cp.program(mask).calls for cp in ranks),
            "calls_a_step": max(len(turn.launches) for turn in turns),
            "tiles_a_step": max(sum(len(work.tiles) for work in turn.work) for turn in turns),
        }
        rows.append(row)
        print(f"{name} on {world} ranks, {row['layout']} and {row['schedule']}: at most {row['calls_a_rank']:,} kernel "
              f"calls a rank, {row['calls_a_step']:,} a step, of {row['tiles_a_step']:,} tiles")  # fmt: skip
    return rows


def main(rounds: int = 5, json: str = "planning-cpu") -> None:
    """Measure, print and write JSON."""
    result = {
        "rows": worlds(rounds),
        "placements": placements(rounds),
        "replace": replacements(),
        "launches": launches(),
    }
    write(json, {"seqlen": SEQLEN, "world_size": WORLD, "documents": DOCUMENTS, **result})


if __name__ == "__main__":
    typer.run(main)
