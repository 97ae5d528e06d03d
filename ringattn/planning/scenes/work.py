"""Work: each rank's pairs, bytes and seconds, and the rank that all wait for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ringattn.geometry.mask_words import words_of
from ringattn.pictures import numbers
from ringattn.pictures.charts import Series, bars
from ringattn.pictures.colours import BLUE, GREEN, OKABE_ITO, ORANGE
from ringattn.pictures.scene import Level, Panel, Scene
from ringattn.planning.cost import Spent
from ringattn.planning.plan import Plan
from ringattn.planning.scenes.plan import pairs
from ringattn.planning.shape import Shape
from ringattn.planning.survey import Pass

NAMES = {
    "kv": "keys and values", "grad": "gradients of K/V", "dk": "gradients of K", "dv": "gradients of V",
    "q": "queries that travel", "partial": "their results", "query": "their rows, backward", "dq": "their gradients",
}  # fmt: skip


def picture(plan: Plan, spent: Spent, shape: Shape, loops: Sequence[Pass], notes: Sequence[str]) -> Scene:
    """``loops``: both passes of all ranks' programs; none where these are too many."""
    moved = received(plan, loops) if loops else needed(plan, shape)
    return Scene(
        f"work of {words_of(plan.mask.mask)}",
        tuple(notes),
        ((pairs(plan.work),), (moved,), (seconds(spent),)),
    )


def received(plan: Plan, loops: Sequence[Pass]) -> Panel:
    """Bars of the bytes that each rank receives in the messages of its programs, forward and backward, by kind."""
    total: dict[str, np.ndarray] = {}
    for loop in loops:
        for (_, _, dst, size), kind in zip(loop.messages.tolist(), loop.kinds, strict=True):
            total.setdefault(kind, np.zeros(plan.world_size, np.int64))[dst] += size
    series = [
        Series(NAMES[kind], colour, values)
        for (kind, values), colour in zip(total.items(), (ORANGE, *OKABE_ITO[3:]), strict=False)
    ]
    nothing = [Series("nothing", ORANGE, np.zeros(plan.world_size, np.int64))]
    return bars("bytes that each rank receives, forward and backward", "B", series or nothing, label="bytes")


def needed(plan: Plan, shape: Shape) -> Panel:
    """The same by what each needs, the least that any schedule brings it; a relay carries more."""
    series = [
        Series("keys and values, forward", ORANGE, plan.received * shape.forward.token),
        Series("keys, values and gradients, backward", OKABE_ITO[3], plan.received * shape.backward.token),
    ]
    return bars("bytes that each rank needs of others", "B", series, label="bytes")


def seconds(spent: Spent) -> Panel:
    """Bars of where each rank's seconds go, and the slowest."""
    slowest = int(np.argmax(spent.total))
    series = [
        Series("compute", BLUE, spent.compute),
        Series("transfers that nothing hides", ORANGE, np.maximum(spent.device - spent.compute, 0)),
        Series("steps, calls and messages", GREEN, np.maximum(spent.total - spent.device, 0)),
    ]
    most = float(spent.total[slowest])
    level = Level(most, f"critical path: rank {slowest:,}, {numbers.seconds(most)}")
    return bars("seconds of each rank, forward and backward, estimated", "s", series, [level], label="seconds")
