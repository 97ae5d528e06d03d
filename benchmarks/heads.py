"""The head split beside its ideal: two processes, one thread each, fp32, causal, forward + backward.

Each process computes half of the heads for the whole sequence. The ideal is that work as raw operator calls without
communication: one causal call, or the same split into smaller ones, whichever is fastest here.

    python -m benchmarks.heads
"""

from __future__ import annotations

from typing import Any

import typer

import ringattn
from benchmarks.common import interleaved, medians, on_processes, ratio, write
from benchmarks.ring import HEADS, operator_call, ring_call, split_causal, together


def causal(rank: int, seqlen: int, rounds: int) -> dict[str, Any]:
    """One length. Inputs are token-major, as models hand them over."""
    ours, cp = ring_call(seqlen, ringattn.causal(), ulysses=2)
    heads = HEADS // 2
    cases = {
        "ringattn, heads split": ours,
        "ringattn, ring": ring_call(seqlen, ringattn.causal())[0],
        "ideal: causal": operator_call(seqlen, seqlen, True, heads),
        "ideal: causal split to 256": together(split_causal(seqlen, 256, heads)),
        "ideal: causal split to 2,048": together(split_causal(seqlen, 2048, heads)),
    }
    seconds = interleaved(cases, rounds)
    middle = medians(seconds)
    ideal = min((name for name in cases if name.startswith("ideal")), key=lambda name: middle[name])
    return {
        "seqlen": seqlen,
        "rounds": rounds,
        "seconds": middle,
        "fastest": ideal,
        "of_ideal": ratio(seconds, ideal, "ringattn, heads split"),
        "of_ideal_ring": ratio(seconds, ideal, "ringattn, ring"),
        "wait_seconds": cp.traffic()["wait_seconds"] / (rounds + 1),
    }


def main(rounds: int = 9, json: str = "heads-cpu") -> None:
    """Measure, print and write JSON."""
    result: dict[str, Any] = {"causal": []}
    for seqlen in (16384, 4096):
        case = on_processes(causal, 2, seqlen, rounds if seqlen > 8192 else 5 * rounds)
        result["causal"].append(case)
        print(f"causal {seqlen:>6}: {case['of_ideal']:.3f} of ideal; the ring {case['of_ideal_ring']:.3f}")
        for name, seconds in case["seconds"].items():
            print(f"    {name:42} {1000 * seconds:9.1f} ms")
    write(json, result)


if __name__ == "__main__":
    typer.run(main)
