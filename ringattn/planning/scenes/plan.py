"""A plan: the mask over its layout, and each rank's pairs and foreign keys."""

from __future__ import annotations

import numpy as np

from ringattn.geometry.mask_words import words_of
from ringattn.geometry.spans import Ints
from ringattn.pictures import mask, numbers
from ringattn.pictures.charts import Series, bars
from ringattn.pictures.colours import BLUE, ORANGE
from ringattn.pictures.scene import Level, Panel, Scene
from ringattn.planning.plan import Plan


def picture(plan: Plan) -> Scene:
    """The mask over the layout, and below it what each rank computes and needs."""
    over = mask.over_layout(plan.mask, plan.q_layout, plan.k_layout)
    needs = bars(
        "K/V tokens of other ranks that each needs", "tokens", [Series("needed", ORANGE, plan.received)],
        label="tokens", width=512,
    )  # fmt: skip
    return Scene(f"plan of {words_of(plan.mask.mask)}", over.notes, (*over.rows, (pairs(plan.work, 512),), (needs,)))


def pairs(work: Ints, width: int = 560) -> Panel:
    """Bars of the pairs that each rank computes, and their mean."""
    mean = float(work.mean())
    name = f"mean {numbers.amount(mean)}, largest {balance(work):.3f} x as much"
    return bars(
        "pairs that each rank computes", "pairs", [Series("pairs", BLUE, work)], [Level(mean, name)], width=width
    )


def balance(work: Ints) -> float:
    """Largest over mean."""
    mean = float(np.mean(work))
    return float(work.max()) / mean if mean else 1.0
