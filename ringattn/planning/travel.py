"""Travelling queries: where few queries need many keys of another rank, the queries go there and the keys stay.

Global query rows without causality need every key, so their rank would receive the whole sequence. Instead each rank
that holds keys is their *host*: it computes their partial result on its own keys and sends that home, to be merged.
"""

from __future__ import annotations

import numpy as np

from ringattn.geometry.bands import K_AXIS, TAG, Bands, concat, counts
from ringattn.geometry.layouts import Layout
from ringattn.geometry.masks import BoundMask
from ringattn.geometry.regular import regular
from ringattn.geometry.spans import meeting


def worthwhile(mask: BoundMask, world_size: int, thin: int) -> bool:
    """Whether the mask has rows that may travel: few queries that need more keys than a rank holds, at least ``thin``
    for each query."""
    nq, nk = counts(mask.whole)
    return bool(((nq * thin <= nk) & (nk * world_size >= mask.kv_len)).any())


def part(bands: Bands, k_layout: Layout, least: int) -> tuple[Bands, Bands]:
    """The world's bands (``TAG`` = rank) as those that are computed at home and those that travel, whose ``TAG`` is
    ``rank * world_size + host``. A query that travels saves its rank at least so many keys each time."""
    nq, nk = counts(bands)
    thin = (nq * least <= nk) & (nk >= k_layout.sizes.max())  # few queries that need more than a shard
    if not thin.any():
        return bands, bands.take(thin)
    world = k_layout.world_size
    pieces = _cut_by_owner(bands.take(thin), k_layout)
    nq, nk = counts(pieces)
    rank, host = np.divmod(pieces.data[:, TAG], world)
    leaves = (nq * least <= nk) & (rank != host)
    home = pieces.take(~leaves)
    home.data[:, TAG] //= world
    return concat((bands.take(~thin), home)), pieces.take(leaves)


def _cut_by_owner(bands: Bands, k_layout: Layout) -> Bands:
    i, j, spans = meeting(bands.data[:, K_AXIS[:3]], k_layout.table[:, 1:])
    data = bands.data[i]
    data[:, K_AXIS[:3]] = spans
    data[:, TAG] = data[:, TAG] * k_layout.world_size + k_layout.table[j, 0]
    return regular(Bands(data, bands.sets))
