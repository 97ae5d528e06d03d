"""Who holds the positions of a stretch: in words, and as the mean of their colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringattn.geometry.frames import Frame
from ringattn.geometry.layouts import Layout
from ringattn.geometry.spans import Ints, clip_spans, overlapping
from ringattn.pictures.colours import Colours, of_ranks

NAMED = 4  # ranks that are named one by one


@dataclass(frozen=True, eq=False)
class Owners:
    """Of ``n`` stretches: ``tokens [m, 3]`` rows (stretch, rank, tokens) by stretch and rank; ``colours [n, 3]``."""

    tokens: Ints
    colours: Colours

    @property
    def words(self) -> tuple[str, ...]:
        """Of each stretch: rank 3; ranks 0, 1 and 7; 64 ranks from 0 to 63."""
        cuts = np.searchsorted(self.tokens[:, 0], np.arange(1, len(self.colours)))
        return tuple(_named(part[:, 1].tolist()) for part in np.split(self.tokens, cuts))

    @property
    def first(self) -> list[int]:
        """The rank that holds most of each stretch; -1 where several hold as much."""
        stretch, rank, count = self.tokens.T
        largest = np.zeros(len(self.colours), np.int64)
        np.maximum.at(largest, stretch, count)
        most = count == largest[stretch]
        found = np.full(len(self.colours), -1)
        found[stretch[most]] = rank[most]
        found[np.bincount(stretch[most], minlength=len(found)) > 1] = -1
        return [int(one) for one in found]


def owners(layout: Layout, edges: Ints, offset: int = 0) -> Owners:
    """Who holds each stretch between two edges, of which a layout's positions begin at ``offset``."""
    spans = layout.table[:, 1:] + np.array([offset, 0, 0])
    i, j = overlapping(*Frame(spans).hull, edges[:-1], edges[1:])
    count = clip_spans(spans[i], edges[j], edges[j + 1] - 1)[:, 1]
    key = j * layout.world_size + layout.table[i, 0]
    keys, which = np.unique(key[count > 0], return_inverse=True)
    tokens = np.zeros(len(keys), np.int64)
    np.add.at(tokens, which.reshape(-1), count[count > 0])
    stretch, rank = np.divmod(keys, layout.world_size)
    mixed = np.zeros((len(edges) - 1, 3))
    np.add.at(mixed, stretch, of_ranks(layout.world_size)[rank] * tokens[:, None].astype(float))
    colours = np.rint(mixed / np.maximum(np.diff(edges), 1)[:, None]).astype(np.uint8)
    return Owners(np.stack((stretch, rank, tokens), 1), colours)


def _named(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > NAMED:
        return f"{len(ranks):,} ranks from {min(ranks)} to {max(ranks)}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
