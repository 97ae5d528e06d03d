"""What a plan costs under a schedule: one function, which serves every ``auto``.

The unit of time is the pair: what one (query, key) pair takes a rank's device, over all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringattn.arguments.values import number
from ringattn.geometry.bands import QN, TAG
from ringattn.geometry.spans import Ints
from ringattn.planning.plan import Plan
from ringattn.planning.schedules import HEAD_CHUNKS, by_name, two_shards
from ringattn.planning.travel import worthwhile

Pairs = NDArray[Any]  # of each rank

# Merges that take as long as a gather's copies of one own token: K/V into its buffers, twice, and gradients out.
COPIES = 3
# K/V tokens whose bytes are those of one travelling query: q and out, with all heads.
QUERY = 8
# Bounds of a device's figures, in pairs: a token always takes some time to arrive, or every layout would cost the same
# to move, and costs of a whole stack stay finite.
FREE, NEVER = 1e-6, 1e15
KV_HEADS = 8  # assumed while nothing is known of a call


@dataclass(frozen=True)
class Rates:
    """What a device and its links do, in attention pairs (one query, one key, all heads).

    pairs_per_token: pairs computed while one K/V token arrives, (bytes of a K/V token / link bytes per second)
        / (FLOP of a pair / FLOP per second): about 120 * num_kv_heads / num_heads for a CPU core over a local
        socket (fp32, 60 GFLOP/s, 1 GB/s) and 1,300 * num_kv_heads / num_heads for bf16 over NVLink
        (600 TFLOP/s, 450 GB/s).
    exposed: the part of a transfer, 0 to 1, that costs time even while hidden behind compute.
    pairs_per_call: pairs computed in the time that one kernel call takes beyond its pairs.
    pairs_per_step: pairs computed in the time that one step's messages take beyond their bytes.
    pairs_per_merge: pairs computed while one query row's result is merged into another: 1 to 4 for a CPU core,
        about 100 for a GPU.
    """

    pairs_per_token: float = 500.0
    exposed: float = 0.1
    pairs_per_call: float = 20_000.0
    pairs_per_step: float = 50_000.0
    pairs_per_merge: float = 16.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = FREE if name == "pairs_per_token" else 0.0
            most = 1.0 if name == "exposed" else NEVER
            object.__setattr__(self, name, number(f"Rates.{name}", value, least, most))


@dataclass(frozen=True)
class Cost:
    """Figures of one plan under one schedule, each that of the rank where it is largest."""

    time: float  # of the slowest rank, in pairs
    work: int  # pairs
    received: int  # foreign K/V tokens needed; a relay carries more
    calls: int  # kernel calls of a forward pass, estimated
    balance: float  # largest over mean work
    fits: bool  # whether the assumed room holds the schedule's buffers


def cheaper(plan: Plan, schedules: Sequence[str], rates: Rates) -> Plan:
    """The plan, or the one in which queries travel where that costs less under one of the schedules."""
    if not worthwhile(plan.mask, plan.world_size):
        return plan
    travelling = replace(plan, travel=True)
    if len(travelling.guests):
        goes, stays = (min(cost(p, name, rates).time for name in schedules) for p in (travelling, plan))
        return travelling if goes < stays else plan
    return plan


def cost(plan: Plan, schedule: str, rates: Rates) -> Cost:
    """The slowest rank's compute (pairs, calls, merges) and what of its transfers does not hide behind it.

    ``exchange`` hides its transfer behind the work on the own shard alone. ``ring`` hides what its relay carries
    behind all work, and pays for every step. ``gather`` hides all but the first heads' transfer; it makes the
    fewest calls, once for each chunk of heads, and copies the own keys.
    """
    turns = HEAD_CHUNKS if schedule == "gather" else 1
    parts, tiles = _parts(plan, schedule)
    calls = turns * tiles
    rows = np.bincount(plan.world.data[:, TAG], parts * plan.world.data[:, QN], plan.world_size)
    merged = np.maximum(rows - plan.q_layout.sizes, 0)
    copied = COPIES * plan.k_layout.sizes if schedule == "gather" and plan.received.any() else 0
    compute = plan.work + rates.pairs_per_call * calls + rates.pairs_per_merge * (merged + copied)
    moved, steps = relayed(plan) if schedule == "ring" else (plan.received, turns * bool(plan.received.any()))
    transfer = (moved + QUERY * plan.visited) * rates.pairs_per_token
    first = transfer / turns if turns > 1 else np.zeros(1)
    hider = plan.own_work if schedule == "exchange" else compute
    time = compute + first + unhidden(transfer - first, hider, rates) + rates.pairs_per_step * steps
    work, mean, most = int(plan.work.max()), float(plan.work.mean()), int(plan.received.max())
    balance = work / mean if mean else 1.0
    fits = by_name(schedule).fit(plan, KV_HEADS, two_shards(plan, KV_HEADS)) is not None
    return Cost(float(time.max()), work, most, int(calls.max()), balance, fits)


def unhidden(transfer: Pairs, compute: Pairs, rates: Rates) -> Pairs:
    """Time that transfers add to compute which runs meanwhile."""
    return np.maximum(transfer - compute, 0) + rates.exposed * np.minimum(transfer, compute)


def _parts(plan: Plan, schedule: str) -> tuple[Ints, Ints]:
    """Kernel calls that each band of the world becomes, and each rank's calls, at most: one for each owner of the
    keys in a relay, one for the own and one for the packed foreign keys in an exchange, one in a gather. Keys of
    interleaved owners stay apart."""
    owners, tiles = plan.owned
    if schedule == "ring" or plan.k_layout.interleaved:
        return owners, tiles
    parts = np.minimum(owners, 2 if schedule == "exchange" else 1)
    return parts, np.bincount(plan.world.data[:, TAG], parts, plan.world_size)


def relayed(plan: Plan) -> tuple[Ints, int]:
    """Tokens that a relay brings to each rank, at most (needs of ranks behind count once each, up to the shard),
    and its longest way in hops."""
    world, needs = plan.world_size, plan.world_needs
    hops = (needs[:, 0] - needs[:, 1]) % world
    wanted = np.bincount(needs[:, 1] * world + hops, needs[:, 3], world * world).reshape(world, world)
    carried = np.minimum(wanted[:, ::-1].cumsum(1)[:, ::-1], plan.k_layout.sizes[:, None])[:, 1:]
    stop = (np.arange(world)[:, None] + np.arange(1, world)) % world
    return np.bincount(stop.reshape(-1), carried.reshape(-1), world).astype(np.int64), int(hops.max(initial=0))
