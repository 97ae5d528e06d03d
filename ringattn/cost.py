"""What a plan costs on a schedule, in one function that serves every ``auto``, and the choices made with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ringattn.bands import Q_AXIS
from ringattn.layouts import LAYOUTS, Layout
from ringattn.masks import BoundMask
from ringattn.plan import Plan

# Cutting every band by every rank's spans beyond this many pieces costs seconds and plans tiny tiles.
PIECE_BUDGET = 2_000_000


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


def cost(plan: Plan, rates: Rates) -> Cost:
    """The slowest rank's max(compute, transfer), plus the part of the shorter one that does not hide."""
    work, received = plan.work, plan.received
    transfer = received * rates.pairs_per_token
    slowest = (np.maximum(work, transfer) + rates.exposed * np.minimum(work, transfer)).max(initial=0)
    mean = work.mean() if len(work) else 0.0
    return Cost(
        int(work.max(initial=0)),
        int(received.max(initial=0)),
        float(slowest),
        float(work.max() / mean) if mean else 1.0,
    )


def choose_layout(
    masks: Sequence[BoundMask], q_len: int, kv_len: int, world_size: int, rates: Rates
) -> tuple[Layout, Layout, list[str]]:
    """The query and key layouts with the least summed cost over the masks, and a table of why.

    Self-attention uses one layout for both sides. Layouts that would break the piece budget are left out.
    """
    best: tuple[float, Layout, Layout] | None = None
    table = []
    for build in LAYOUTS:
        q_layout = build(q_len, world_size)
        k_layout = q_layout if kv_len == q_len else build(kv_len, world_size)
        pieces = max(_pieces(mask, q_layout) for mask in masks)
        if pieces > PIECE_BUDGET and best is not None:
            table.append(f"{build.__name__}: left out, about {pieces:,} pieces (budget {PIECE_BUDGET:,})")
            continue
        costs = [cost(Plan(mask, q_layout, k_layout), rates) for mask in masks]
        total = sum(c.time for c in costs)
        table.append(
            f"{build.__name__}: slowest rank takes the time of {total:,.0f} pairs "
            f"(balance {max(c.balance for c in costs):.2f}, receives {max(c.received for c in costs):,} tokens)"
        )
        if best is None or total < best[0]:
            best = (total, q_layout, k_layout)
    assert best is not None
    return best[1], best[2], table


def _pieces(mask: BoundMask, layout: Layout) -> int:
    """How many band pieces a world plan would hold, at most: bands that meet spans, by their hulls."""
    start, stop = mask.bands(mask.q_offset, mask.q_offset + mask.q_len).hull(Q_AXIS)
    first = np.sort(layout.table[:, 1] + mask.q_offset)
    last = np.sort(layout.table[:, 1] + (layout.table[:, 2] - 1) * layout.table[:, 3] + mask.q_offset)
    return int((np.searchsorted(first, stop, "left") - np.searchsorted(last, start, "left")).sum())


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
