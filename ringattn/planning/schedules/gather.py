"""Gather: own and needed keys side by side in global order, some KV heads at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ringattn.geometry.spans import Ints
from ringattn.planning.plan import Plan
from ringattn.planning.schedules.base import Flow, Schedule, Step, collected, own_step, returned, straight

HEAD_CHUNKS = 4  # of a gather that room does not force to more: one computes while the next travels


def gather(plan: Plan, rank: int, cut: int = 1) -> list[Step]:
    """The rank's own keys and all it needs are collected in global order, a part of the KV heads at a time, the next
    heads travelling meanwhile: what a chunk of queries sees is one tile, and nothing is merged.

    ``cut``: chunks of the KV heads. Buffers: two chunks of own and needed K/V, and of their gradients.
    """
    table = plan.k_layout.table
    keys, kv = collected(np.concatenate((plan.world_needs, table[:, [0, 0, 1, 2, 3]])), rank)
    if not kv:
        return [own_step(plan, rank)]
    chunk = Step(keys, kv, returned(kv))
    return [Step(()), *(Step(chunk.keys, chunk.kv, chunk.grads, (i, cut)) for i in range(cut))]


def _cuts(plan: Plan, kv_heads: int) -> Sequence[int]:
    return range(min(HEAD_CHUNKS, kv_heads), kv_heads + 1)


def _buffers(plan: Plan, cut: int, kv_heads: int) -> int:
    rows = int((plan.received + plan.k_layout.sizes).max(initial=0))
    return rows * min(2 * -(-kv_heads // cut), kv_heads)


def _turn(hops: Ints, cut: int) -> Ints:
    return np.zeros_like(hops)


def _flow(plan: Plan, cut: int) -> Flow:
    """The first heads arrive before anything is computed."""
    moved = straight(plan)
    takes_part = np.bincount(moved[:, :2].reshape(-1), minlength=plan.world_size) > 0
    return Flow(moved, cut * bool(len(moved)), exposed=1 / cut, copied=plan.k_layout.sizes * takes_part)


GATHER = Schedule("gather", gather, _cuts, _buffers, _turn, _flow, by_heads=True)
