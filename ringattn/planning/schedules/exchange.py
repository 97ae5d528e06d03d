"""Exchange: everything that a rank needs comes to it in one step."""

from __future__ import annotations

import numpy as np

from ringattn.geometry.spans import Ints
from ringattn.planning.plan import Plan
from ringattn.planning.schedules.base import Flow, Schedule, Step, collected, own_step, returned, straight


def exchange(plan: Plan, rank: int, cut: int = 1) -> list[Step]:
    """Every rank receives just the spans its mask needs, in one step; partial dK/dV return to the owners.

    Buffers: the needed foreign K/V once, and their gradients once. There is nothing to cut.
    """
    keys, kv = collected(plan.world_needs, rank)
    if not kv:
        return [own_step(plan, rank)]
    return [own_step(plan, rank), Step(keys, kv, returned(kv))]


def _buffers(plan: Plan, cut: int, kv_heads: int) -> int:
    return int(plan.received.max(initial=0)) * kv_heads


def _turn(hops: Ints, cut: int) -> Ints:
    return np.minimum(hops, 1)


def _flow(plan: Plan, cut: int) -> Flow:
    moved = straight(plan)
    return Flow(moved, int(len(moved) > 0), hider="own")


EXCHANGE = Schedule("exchange", exchange, lambda plan, kv_heads: (1,), _buffers, _turn, _flow)
