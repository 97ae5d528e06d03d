"""Seconds to plan 1,048,576 tokens on 1,024 ranks: 5,000 documents & a window | 64 global tokens.

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
from ringattn.layouts import contiguous, zigzag
from ringattn.plan import Plan
from ringattn.program import compile_program
from ringattn.schedules import exchange

SEQLEN, WORLD, DOCUMENTS = 1 << 20, 1024, 5000


def median_seconds(case: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        case()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main(rounds: int = 5, json: str = "planning-cpu") -> None:
    """Measure, print and write JSON."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, SEQLEN), DOCUMENTS - 1, replace=False))
    bounds = [0, *cuts.tolist(), SEQLEN]
    window = ringattn.documents(bounds) & ringattn.sliding_window(1023)
    masks = {"any": window | ringattn.global_tokens(64)}
    masks["causal"] = masks["any"] & ringattn.causal()
    rows: list[dict[str, Any]] = []
    for name, mask in masks.items():
        for layout in (contiguous, zigzag):
            placed = layout(SEQLEN, WORLD)
            bound = mask.bind(SEQLEN, SEQLEN)

            def one_rank(bound: Any = bound, placed: Any = placed) -> None:
                plan = Plan(bound, placed, placed)
                plan.tiles(WORLD // 2, plan.k_layout.frame(WORLD // 2))
                plan.needs(WORLD // 2)

            def world(bound: Any = bound, placed: Any = placed) -> None:
                plan = Plan(bound, placed, placed)
                plan.work, plan.received  # noqa: B018 - computed on access

            def program(bound: Any = bound, placed: Any = placed) -> None:
                plan = Plan(bound, placed, placed)
                compile_program(plan, exchange(plan, WORLD // 2), WORLD // 2)

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
    write(json, {"seqlen": SEQLEN, "world_size": WORLD, "documents": DOCUMENTS, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
