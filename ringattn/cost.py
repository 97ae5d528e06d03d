"""What a plan costs, in one function that serves every ``auto``, and the choice of a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ringattn.plan import Plan


@dataclass(frozen=True)
class Rates:
    """How much attention a device computes while one K/V token arrives.

    ``pairs_per_token`` is (bytes of a K/V token / link bytes per second) / (FLOP of a pair / FLOP per
    second): about 120 * num_kv_heads / num_heads for a CPU core over a local socket (fp32, 60 GFLOP/s,
    1 GB/s) and 1,300 * num_kv_heads / num_heads for bf16 over NVLink (600 TFLOP/s, 450 GB/s).
    """

    pairs_per_token: float = 500.0
    exposed: float = 0.1  # part of a transfer that costs time even while hidden behind compute


@dataclass(frozen=True)
class Cost:
    """The slowest rank's figures: ``work`` pairs, ``received`` foreign tokens, ``time`` in units of pairs."""

    work: int
    received: int
    time: float
    balance: float  # largest over mean work


# K/V tokens whose bytes are those of one travelling query: q and out, with all heads.
QUERY = 8


def cheaper(plan: Plan, rates: Rates) -> Plan:
    """The plan, or the one in which queries travel where that costs less."""
    travelling = replace(plan, travel=True)
    if plan.travel or not len(travelling.guests) or cost(travelling, rates).time >= cost(plan, rates).time:
        return plan
    return travelling


def cost(plan: Plan, rates: Rates) -> Cost:
    """The slowest rank's max(compute, transfer), plus the part of the shorter one that does not hide."""
    work, received = plan.work, plan.received
    transfer = (received + QUERY * plan.visited) * rates.pairs_per_token
    slowest = (np.maximum(work, transfer) + rates.exposed * np.minimum(work, transfer)).max(initial=0)
    mean = work.mean() if len(work) else 0.0
    return Cost(
        int(work.max(initial=0)),
        int(received.max(initial=0)),
        float(slowest),
        float(work.max() / mean) if mean else 1.0,
    )


def choose_schedule(plans: Sequence[Plan]) -> tuple[str, str]:
    """``exchange`` where the foreign K/V of every rank fits two shards, else ``ring``; and why."""
    received = max(int(plan.received.max(initial=0)) for plan in plans)
    shard = max(int(plan.k_layout.sizes.max(initial=0)) for plan in plans)
    if received <= 2 * shard:
        return "exchange", f"the most a rank receives, {received:,} tokens, fits two shards of {shard:,}"
    return (
        "ring",
        f"a rank needs {received:,} foreign tokens, more than two shards of {shard:,}: two buffers are enough",
    )
