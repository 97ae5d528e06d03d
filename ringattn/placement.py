"""Placement: the layout in which the masks of a stack cost least.

``contiguous``, ``zigzag`` and ``striped`` know nothing of the mask. ``balanced`` cuts the sequence into equal
chunks, a few for each rank, measures each chunk's exact area under the masks, and deals the chunks out so that
every rank has equally many of them and about the same area; of several such deals, and of the layouts that know
no mask, it is the one of least cost: evenness is not free, a scattered shard needs more foreign keys.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ringattn.bands import Q_AXIS, TAG, areas, regular
from ringattn.cost import Cost, Rates, cost
from ringattn.layouts import LAYOUTS, Layout, chunks, dealt
from ringattn.masks import BoundMask
from ringattn.plan import Plan
from ringattn.spans import Ints
from ringattn.tiles import cut

# Cutting every band by every rank's spans beyond this many pieces costs seconds and plans tiny tiles.
PIECE_BUDGET = 2_000_000
# Chunks a rank that are tried: more are more even, and need more foreign keys and kernel calls.
CHUNKS = (2, 4, 8, 16, 32)
# A layout that costs less than this times the mean work is good enough: no better one is searched for.
GOOD = 1.05


@dataclass(frozen=True)
class Problem:
    """What is to be placed: the masks of a stack, bound, over ``world_size`` ranks."""

    masks: tuple[BoundMask, ...]
    world_size: int
    rates: Rates

    @property
    def q_len(self) -> int:
        return self.masks[0].q_len

    @property
    def kv_len(self) -> int:
        return self.masks[0].kv_len


@dataclass(frozen=True)
class Candidate:
    """A pair of layouts and what each mask costs on them."""

    q_layout: Layout
    k_layout: Layout
    costs: tuple[Cost, ...]

    @property
    def time(self) -> float:
        return sum(c.time for c in self.costs)

    @property
    def least(self) -> float:
        """What perfectly even work would cost without any transfer."""
        return sum(c.work / c.balance for c in self.costs)

    @property
    def balance(self) -> float:
        return max(c.balance for c in self.costs)

    def __str__(self) -> str:
        return (
            f"slowest rank takes the time of {self.time:,.0f} pairs (balance {self.balance:.2f}, "
            f"receives {max(c.received for c in self.costs):,} tokens)"
        )


def choose_layout(problem: Problem) -> tuple[Layout, Layout, list[str]]:
    """The query and key layouts with the least summed cost over the masks, and a table of why.

    Self-attention uses one layout for both sides. Layouts that would break the piece budget are left out.
    """
    found, table = _plain(problem)
    best = min(found, key=lambda c: c.time)
    if best.time > GOOD * best.least:
        better = min(_deals(problem), key=lambda c: c.time, default=best)
        table.append(f"balanced: {better}")
        best = min(best, better, key=lambda c: c.time)
    else:
        table.append(
            f"balanced: not searched, {best.q_layout.name} is within {GOOD - 1:.0%} of even work without transfers"
        )
    return best.q_layout, best.k_layout, table


def balanced(problem: Problem) -> tuple[Layout, Layout, list[str]]:
    """The least costly deal of chunks, or the plain layout that costs less than any; and why."""
    plain, table = _plain(problem)
    best = min([*_deals(problem), *plain], key=lambda c: c.time)
    return best.q_layout, best.k_layout, [f"asked for balanced, found {best.q_layout.name}: {best}", *table]


def _plain(problem: Problem) -> tuple[list[Candidate], list[str]]:
    """The layouts that know no mask."""
    found: list[Candidate] = []
    table = []
    for build in LAYOUTS:
        q_layout = build(problem.q_len, problem.world_size)
        pieces = max(_pieces(mask, q_layout) for mask in problem.masks)
        if pieces > PIECE_BUDGET and found:
            table.append(f"{build.__name__}: left out, about {pieces:,} pieces (budget {PIECE_BUDGET:,})")
            continue
        k_layout = q_layout if problem.kv_len == problem.q_len else build(problem.kv_len, problem.world_size)
        found.append(_candidate(problem, q_layout, k_layout))
        table.append(f"{build.__name__}: {found[-1]}")
    return found, table


def _candidate(problem: Problem, q_layout: Layout, k_layout: Layout) -> Candidate:
    costs = tuple(cost(Plan(mask, q_layout, k_layout), problem.rates) for mask in problem.masks)
    return Candidate(q_layout, k_layout, costs)


def _deals(problem: Problem) -> Iterator[Candidate]:
    """Chunks dealt out in several ways. Where the keys are another sequence, they lie contiguously."""
    world = problem.world_size
    other = None if problem.kv_len == problem.q_len else LAYOUTS[0](problem.kv_len, world)
    for count in CHUNKS:
        if count * world > problem.q_len:
            break
        spans = chunks(problem.q_len, count * world)
        weights = np.sum([_areas(mask, spans) for mask in problem.masks], 0)
        for rank in (_deal_by_rounds(weights, world), _deal_by_weight(weights, world)):
            layout = dealt("balanced", problem.q_len, world, spans, rank)
            yield _candidate(problem, layout, other or layout)


def _areas(mask: BoundMask, spans: Ints) -> Ints:
    """Attending pairs of the queries in each span."""
    bands = mask.bands(mask.q_offset, mask.q_offset + mask.q_len)
    rows = regular(cut(bands, Q_AXIS, spans + np.array([mask.q_offset, 0, 0]), np.arange(len(spans))))
    return np.bincount(rows.data[:, TAG], areas(rows), len(spans)).astype(np.int64)


def _deal_by_weight(weights: Ints, world: int) -> Ints:
    """The heaviest chunk left goes to the rank with the least work among those that may have more chunks."""
    rank, most = np.empty(len(weights), np.int64), len(weights) // world
    load = [(0, 0, r) for r in range(world)]  # work, chunks, rank
    for chunk in np.argsort(-weights, kind="stable").tolist():
        work, count, r = heapq.heappop(load)
        rank[chunk] = r
        if count + 1 < most:
            heapq.heappush(load, (work + int(weights[chunk]), count + 1, r))
    return rank


def _deal_by_rounds(weights: Ints, world: int) -> Ints:
    """Each round deals one chunk to every rank from one stretch of the sequence, the heaviest to the rank with the
    least work: less even than by weight, but equal stretches go to equal places."""
    rank, load = np.empty(len(weights), np.int64), np.zeros(world, np.int64)
    for stretch in np.split(np.arange(len(weights)), len(weights) // world):
        heavy_first = stretch[np.argsort(-weights[stretch], kind="stable")]
        light_first = np.argsort(load, kind="stable")
        rank[heavy_first] = light_first
        load[light_first] += weights[heavy_first]
    return rank


def _pieces(mask: BoundMask, layout: Layout) -> int:
    """How many pieces a world plan would cut, at most: bands that meet spans, by their hulls, and each of these that
    meets the spans of the keys' owners, which are all of them where the spans interleave."""
    start, stop = mask.bands(mask.q_offset, mask.q_offset + mask.q_len).hull(Q_AXIS)
    first = np.sort(layout.table[:, 1] + mask.q_offset)
    last = np.sort(layout.table[:, 1] + (layout.table[:, 2] - 1) * layout.table[:, 3] + mask.q_offset)
    met = int((np.searchsorted(first, stop, "left") - np.searchsorted(last, start, "left")).sum())
    return met * (layout.world_size if (layout.table[:, 3] > 1).any() else 1)


PLACEMENTS: Sequence[str] = ("auto", "balanced", *(build.__name__ for build in LAYOUTS))
