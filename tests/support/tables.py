"""Masks whose tables hold tiles of every kind: many, strided, scattered, and of steps that share rows; the tables that
ranks have of them, and their pairs."""

import numpy as np

import ringattn as ra
from ringattn.comm import PlanningRank
from tests.support.tiles import attends

MASKS = {
    "full": ra.full(),
    "causal": ra.causal(),
    "window": ra.sliding_window(9),
    "documents and window": ra.documents((0, 3, 40, 61, 120)) & ra.sliding_window(12),
    "scattered globals": ra.sliding_window(5) | ra.global_tokens([1, 7, 30, 31, 77]),
    "longformer": ra.longformer(6, [2, 9, 50, 51, 118]),
    "bigbird": ra.bigbird(8, 3, 1, 2),
    "chunked": ra.chunked(11),
    "strided": ra.strided(7),
    "dilated": ra.dilated(3, 5),
    "steps within steps": ra.strided(6) | (ra.dilated(2, 9) & ra.causal()),
}
SEQLEN = 120


def works(mask, seqlen=SEQLEN, world=1, rank=0, **settings):
    """What a rank of a world computes, step by step."""
    cp = ra.ContextParallel(PlanningRank(rank, world), seqlen, mask=mask, **settings)
    return [work for turn in cp.program(mask).forward for work in turn.work]


def expected(tiles, shape):
    """How often tiles have each pair of local rows and columns."""
    want = np.zeros(shape, int)
    for tile in tiles:
        rows, cols = np.arange(shape[0])[tile.q], np.arange(shape[1])[tile.k]
        want[np.ix_(rows, cols)] += attends(len(rows), len(cols), tile.window).numpy()
    return want
