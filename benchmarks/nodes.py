"""The double ring beside the flat ring where the link between nodes binds: processes of this machine as nodes.

Each rank is a process of one thread. Messages between ranks of different nodes are held back by `SlowLinks`, as by a
card of so many bytes a second for each rank; those inside of a node take what shared memory takes. fp32, full
attention, forward + backward. ``unlimited``: the same calls without the card, which is what attention itself takes
here, where all ranks share the cores.

    python -m benchmarks.nodes
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
import typer

import ringattn
from benchmarks.common import interleaved, medians, on_processes, ratio, write
from benchmarks.ring import DIM, HEADS, ring_call
from ringattn.comm import transport_over
from ringattn.planning.topology import Link, Topology
from ringattn.testing import SlowLinks

FAST = Link(1e12)
SCHEDULES = ("ring", "double_ring")


def full(rank: int, ranks_per_node: int, seqlen: int, rate: float, rounds: int) -> dict[str, Any]:
    """One world. ``rate``: bytes a second of a rank's card."""
    topology = Topology(FAST, Link(rate), ranks_per_node)
    transport = transport_over(dist.group.WORLD, 300.0)
    slow, options = SlowLinks(transport, topology), ringattn.Options(topology=topology)
    made = {
        (schedule, group is slow): ring_call(seqlen, ringattn.full(), group=group, schedule=schedule, options=options)
        for schedule in SCHEDULES
        for group in (slow, transport)
    }
    names = {key: f"{key[0]}{'' if key[1] else ', unlimited'}" for key in made}
    seconds = interleaved({names[key]: call for key, (call, _) in made.items()}, rounds)
    auto = ring_call(seqlen, ringattn.full(), group=slow, options=options)[1]
    return {
        "ranks": dist.get_world_size(),
        "ranks_per_node": ranks_per_node,
        "seqlen": seqlen,
        "shard_bytes": seqlen // dist.get_world_size() * 2 * HEADS * DIM * 4,
        "bytes_per_second": rate,
        "rounds": rounds,
        "seconds": medians(seconds),
        "faster": ratio(seconds, "ring", "double_ring"),
        "auto": auto.schedule,
        "estimated": {offer.schedule: offer.seconds for offer in auto.binding.choice.lines[0].offers},
    }


def main(rounds: int = 3, seqlen: int = 2048, rate: float = 2e6, json: str = "nodes-cpu") -> None:
    """Measure, print and write JSON."""
    result: dict[str, Any] = {"full": []}
    for ranks, ranks_per_node in ((4, 2), (8, 4), (8, 2)):
        case = on_processes(full, ranks, ranks_per_node, seqlen, rate, rounds)
        result["full"].append(case)
        nodes = f"{ranks // ranks_per_node} nodes of {ranks_per_node}"
        print(f"{nodes}: the double ring is {case['faster']:.2f} times as fast; auto takes {case['auto']}")
        for name, seconds in case["seconds"].items():
            print(f"    {name:28} {1000 * seconds:9.1f} ms")
    write(json, result)


if __name__ == "__main__":
    typer.run(main)
