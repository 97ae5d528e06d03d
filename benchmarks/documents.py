"""Packed documents: two processes, one thread each, fp32, forward + backward.

40 documents of lognormal lengths in 32,768 tokens, `documents & causal`. Useful GFLOP/s of the busiest rank by exact
area, against one causal operator call on 8,192 tokens; first as ``layout="auto"``, ``schedule="auto"`` choose, then
by name.

    python -m benchmarks.documents
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import typer

import ringattn
from benchmarks.common import interleaved, medians, on_processes, ratio, write
from benchmarks.ring import DIM, FLOP, HEADS, operator_call, ring_call

SEQLEN, DOCUMENTS = 32768, 40
SETTINGS = [
    ("auto", "auto"),
    ("contiguous", "exchange"),
    ("zigzag", "exchange"),
    ("balanced", "exchange"),
    ("contiguous", "ring"),
]
OPERATOR = "causal 8192"
OPERATOR_PAIRS = 8192 * 8193 // 2


def bounds(seqlen: int = SEQLEN, count: int = DOCUMENTS, seed: int = 0) -> list[int]:
    """`cu_seqlens` of lognormal document lengths (sigma 0.9) that fill the sequence."""
    ends = np.random.default_rng(seed).lognormal(0.0, 0.9, count).cumsum()
    return [0, *np.round(ends / ends[-1] * seqlen).astype(int).tolist()]


def measure(rank: int, rounds: int, settings: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """One row for each (layout, schedule), all cases taking turns."""
    mask = ringattn.documents(bounds()) & ringattn.causal()
    cases: dict[str, Any] = {OPERATOR: operator_call(8192, 8192, True)}
    contexts = {}
    for layout, schedule in settings:
        name = f"{layout}, {schedule}"
        cases[name], contexts[name] = ring_call(SEQLEN, mask, layout=layout, schedule=schedule)
    seconds = interleaved(cases, rounds)
    return [row(rank, name, cp, seconds) for name, cp in contexts.items()]


def row(rank: int, name: str, cp: Any, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The figures of one case; every rank takes part."""
    calls = len(seconds[name]) + 1  # the first is not counted
    program, busiest = cp.program(next(iter(cp.plans))), int(cp.plan.work.max())
    traffic = cp.traffic()["received"]
    mine = [
        traffic.get("forward kv", 0) // calls,
        int(cp.plan.received[rank]) * 2 * HEADS * DIM * 4,
        program.calls,
    ]
    ranks = [torch.zeros(len(mine), dtype=torch.int64) for _ in range(cp.world_size)]
    dist.all_gather(ranks, torch.tensor(mine))
    received, least, kernel_calls = (column.tolist() for column in torch.stack(ranks, 1))
    middle = medians(seconds)
    return {
        "asked": name,
        "layout": cp.q_layout.name,
        "schedule": cp.schedule,
        "rounds": calls - 1,
        "seconds": middle[name],
        "times_auto": ratio(seconds, name, "auto, auto"),
        "balance": busiest / float(cp.plan.work.mean()),
        "useful_gflops": busiest * FLOP / middle[name] / 1e9,
        "causal_8192_gflops": OPERATOR_PAIRS * FLOP / middle[OPERATOR] / 1e9,
        "of_causal_8192": busiest / OPERATOR_PAIRS * ratio(seconds, OPERATOR, name),
        "received_bytes_forward": received,
        "least_bytes_forward": least,
        "kernel_calls": kernel_calls,
    }


def main(rounds: int = 9, json: str = "documents-cpu") -> None:
    """Measure, print and write JSON."""
    rows = on_processes(measure, 2, rounds, SETTINGS)
    for case in rows:
        print(
            f"{case['asked']:22} {case['of_causal_8192']:.3f} of one causal call on 8,192 ({case['useful_gflops']:.1f} "
            f"of {case['causal_8192_gflops']:.1f} GFLOP/s), {case['times_auto']:.3f} of auto's time; {case['layout']}, "
            f"{case['schedule']}, balance {case['balance']:.2f}, {case['kernel_calls']} calls, "
            f"received {case['received_bytes_forward']} bytes, least {case['least_bytes_forward']}"
        )
    write(json, {"seqlen": SEQLEN, "cu_seqlens": bounds(), "cases": rows})


if __name__ == "__main__":
    typer.run(main)
