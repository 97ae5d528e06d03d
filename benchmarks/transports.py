"""The same causal ring over gloo and over shared memory, processes of one machine, fp32, forward + backward.

python -m benchmarks.transports
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
import typer

import ringattn
from benchmarks.common import interleaved, medians, on_processes, ratio, write
from benchmarks.ring import ring_call
from ringattn.comm import ProcessGroupTransport, SharedMemoryTransport

SIZES = ((2, 512, 60), (2, 1024, 60), (2, 4096, 20), (4, 1024, 40), (4, 4096, 15))  # ranks, tokens, rounds


def compare(rank: int, seqlen: int, rounds: int) -> dict[str, Any]:
    def over_gloo() -> ProcessGroupTransport:
        return ProcessGroupTransport(dist.group.WORLD, 100.0)

    transports = {"gloo": over_gloo(), "shared memory": SharedMemoryTransport(over_gloo())}
    cases = {name: ring_call(seqlen, ringattn.causal(), group=t)[0] for name, t in transports.items()}
    seconds = interleaved(cases, rounds)
    return {
        "ranks": dist.get_world_size(),
        "seqlen": seqlen,
        "rounds": rounds,
        "seconds": medians(seconds),
        "gloo_over_shared_memory": ratio(seconds, "gloo", "shared memory"),
    }


def main(json: str = "transports-cpu") -> None:
    """Measure, print and write JSON."""
    result = []
    for ranks, seqlen, rounds in SIZES:
        case = on_processes(compare, ranks, seqlen, rounds)
        result.append(case)
        gloo, shared = (1000 * case["seconds"][name] for name in ("gloo", "shared memory"))
        print(
            f"{ranks} ranks, {seqlen:>5} tokens: gloo {gloo:7.1f} ms, shared memory {shared:7.1f} ms "
            f"(gloo takes {case['gloo_over_shared_memory']:.2f} times as long)"
        )
    write(json, {"cases": result})


if __name__ == "__main__":
    typer.run(main)
