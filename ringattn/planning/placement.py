"""Placement: the layout and the schedule with which the masks of a stack cost least.

``contiguous``, ``zigzag`` and ``striped`` know nothing of the mask. ``balanced`` cuts the sequence into equal
chunks, a few for each rank, and deals them out so that every rank has equally many of them and about the same
area. Evenness is not free, a scattered shard needs more foreign keys and more kernel calls, so of several deals,
and of the layouts that know no mask, the one of least cost is taken. Bounds (``deals.py``) say which are worth a
plan; the plans that were made for the choice are those the context runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ringattn.geometry.bands import HI, K_AXIS, KN, KS, LO, Q_AXIS, QN, QS
from ringattn.geometry.layouts import LAYOUTS, NAMED, Layout, chunks, contiguous, dealt
from ringattn.geometry.masks import BoundMask
from ringattn.geometry.spans import Ints, columns
from ringattn.planning.cost import Cost, Seconds, Terms, cheaper, costs, settled
from ringattn.planning.deals import Cells, deal_by_rounds, deal_by_weight
from ringattn.planning.estimates import estimates
from ringattn.planning.launches import SMALL, SOME, Stacking
from ringattn.planning.plan import Plan
from ringattn.planning.schedules import by_name
from ringattn.planning.travel import worthwhile

# Kernel calls a rank beyond which a layout is avoided, or refused where it was asked for.
CALL_BUDGET = 20_000
# Pieces that the ranks' queries may cut the bands of one mask into, and how often these may meet a span of keys, for
# a layout to be compared with others: more cost seconds.
PIECE_BUDGET = 500_000
MEETING_BUDGET = 2_500_000
# The same for a layout that was asked for, whatever it is compared with: more cost minutes and gigabytes.
ASKED_BUDGET = 20_000_000
# Chunks a rank that are tried: more are more even, and need more foreign keys and kernel calls.
CHUNKS = (2, 4, 8, 16, 32, 64)
# A layout that costs less than this times the mean work is good enough: no better one is searched for.
GOOD = 1.05
# Chunks are not cut finer once the most work of a rank is at most this times the mean.
EVEN = 1.01
# ``auto`` takes the simpler layout, in the order contiguous, zigzag, striped, dealt, and the schedule of fewer calls,
# at up to this times the cost.
SIMPLER = 1.02
# Deals that are planned to the end, best bound first.
FINALISTS = 2


@dataclass(frozen=True)
class Problem:
    """What is to be placed: the masks of a stack, bound, over ``world_size`` ranks, the schedules allowed, and the
    layout of the keys where that is settled."""

    masks: tuple[BoundMask, ...]
    world_size: int
    terms: Terms
    schedules: tuple[str, ...] = ("exchange", "gather", "ring")
    limited: bool = True  # buffers must fit the room of `terms`; else a call decides what fits its own limit
    k_layout: Layout | None = None

    @property
    def q_len(self) -> int:
        return self.masks[0].q_len

    @property
    def kv_len(self) -> int:
        return self.masks[0].kv_len

    @property
    def ranks_per_node(self) -> int | None:
        """Of several whole nodes of several ranks; None where the world is not that."""
        return None if self.terms.topology.flat(self.world_size) else self.terms.topology.ranks_per_node


@dataclass(frozen=True)
class Offer:
    """What all masks together cost on one layout under one schedule; ``out`` says why it may not be taken."""

    schedule: str
    seconds: float
    balance: float
    received: int
    calls: int
    moved: tuple[int, int]
    out: str = ""

    @staticmethod
    def of(schedule: str, costs: Sequence[Cost], seconds: float, shards: int | None) -> Offer:
        """``shards``: of K/V are what buffers may take; None: what they like."""
        calls, out = max(c.calls for c in costs), ""
        if calls > CALL_BUDGET:
            out = f"about {calls:,} kernel calls a rank, budget {CALL_BUDGET:,}"
        elif shards is not None and not any(c.fits for c in costs):
            out = f"its buffers do not fit the room of {'two' if shards == 2 else shards} shards"
        most = max(c.received for c in costs)
        inside, between = (sum(c.moved[level] for c in costs) for level in range(2))
        return Offer(schedule, seconds, max(c.balance for c in costs), most, calls, (inside, between), out)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A pair of layouts, a lower bound of what the masks cost on it, and, once asked for, plans and costs."""

    problem: Problem
    q_layout: Layout
    k_layout: Layout
    bound: float = 0.0

    @cached_property
    def plans(self) -> tuple[Plan, ...]:
        nodes = self.problem.ranks_per_node
        plans = (Plan(mask, self.q_layout, self.k_layout, ranks_per_node=nodes) for mask in self.problem.masks)
        return tuple(cheaper(plan, self.problem.schedules, self.problem.terms) for plan in plans)

    @cached_property
    def offers(self) -> tuple[Offer, ...]:
        """One for each schedule, best first: of those that take about as long the one of fewest calls; those that may
        not be taken last."""
        names, terms = self.problem.schedules, self.problem.terms
        free = len(names) == 1 or not self.problem.limited
        of_masks = [costs(plan, names, terms) for plan in self.plans]
        # a mask for whose buffers there is no room takes the best schedule for whose there is
        instead = [min((c.seconds for c in each if c.fits), default=0.0) for each in of_masks]
        offers = []
        for name, *each in zip(names, *of_masks, strict=True):
            seconds = sum(
                c.seconds if free or c.fits else max(c.seconds, other) for c, other in zip(each, instead, strict=True)
            )
            offers.append(Offer.of(name, each, seconds, None if free else terms.shards))
        good = SIMPLER * min((o.seconds for o in offers if not o.out), default=0.0)
        return tuple(
            sorted(offers, key=lambda o: (bool(o.out), o.seconds > good, o.calls * (o.seconds <= good), o.seconds))
        )

    @property
    def seconds(self) -> float:
        """What candidates are compared by: those of the fastest schedule that may be taken."""
        return min((offer.seconds for offer in self.offers if not offer.out), default=float("inf"))


@dataclass(frozen=True)
class Line:
    """A layout that was looked at, in figures: its offers; or only a bound; or why it was left out."""

    layout: str
    offers: tuple[Offer, ...] = ()
    bound: float = 0.0
    out: str = ""


@dataclass(frozen=True, eq=False)
class Choice:
    """The candidate taken and its schedules, best first; ``asked`` is the layout's name that led to it."""

    taken: Candidate
    schedules: tuple[str, ...]
    asked: str
    others: tuple[Line, ...] = ()

    @property
    def lines(self) -> tuple[Line, ...]:
        """What was looked at, the layout taken first."""
        return Line(self.taken.q_layout.name, self.taken.offers), *self.others


def choose(problem: Problem, name: str) -> Choice:
    """The layouts and schedules with the least summed cost over the masks.

    ``name`` is ``auto``, ``balanced`` or one of the layouts that know no mask. Self-attention uses one layout for
    both sides. Raises ``ValueError`` for a named layout that would take more kernel calls than the budget.
    """
    if name not in ("auto", "balanced"):
        build = {known.__name__: known for known in NAMED}[name]
        return given(problem, *_pair(problem, build))
    plain, lines = _plain(problem)
    taken, looked_at = _cheapest(problem, plain, search=name == "balanced")
    others = {line.layout: line for line in reversed(looked_at)}
    lines += [line for layout, line in others.items() if layout != taken.q_layout.name]
    return Choice(taken, _ranking(taken), name, tuple(lines))


def given(problem: Problem, q_layout: Layout, k_layout: Layout) -> Choice:
    """A layout that was asked for. Nothing is planned if the schedule was, too."""
    calls, fewest = (_calls(problem, *pair) for pair in ((q_layout, k_layout), _pair(problem, contiguous)))
    if calls > CALL_BUDGET >= fewest:
        raise ValueError(
            f"layout={q_layout.name!r} would take about {calls:,} kernel calls on each rank and the budget is "
            f"{CALL_BUDGET:,}: every piece of the mask on every span of the layout is one; use layout='auto', or "
            f"'contiguous' (about {fewest:,} calls)"
        )
    meetings = max(_meetings(mask, q_layout, k_layout) for mask in problem.masks)
    if meetings > ASKED_BUDGET:
        raise ValueError(
            f"layout={q_layout.name!r} cuts {problem.q_len:,} queries into {len(q_layout.table):,} runs, which meet "
            f"runs of keys about {meetings:,} times under this mask, and the budget is {ASKED_BUDGET:,}: more take "
            "minutes to plan; use layout='auto', or 'zigzag'"
        )
    taken = Candidate(problem, q_layout, k_layout)
    return Choice(taken, problem.schedules if len(problem.schedules) == 1 else _ranking(taken), "asked for")


def _ranking(taken: Candidate) -> tuple[str, ...]:
    """Schedules that may be taken; where none may, the one of fewest calls."""
    allowed = tuple(o.schedule for o in taken.offers if not o.out)
    return allowed or (min(taken.offers, key=lambda o: (o.calls, o.seconds)).schedule,)


Pair = tuple[Layout, Layout]


def _cheapest(problem: Problem, layouts: list[Pair], search: bool) -> tuple[Candidate, list[Line]]:
    """The candidate of least cost, and all in figures. Deals are looked for if asked to, or if no plain layout is
    good."""
    cells = _cells(problem, layouts)
    plain = [Candidate(problem, *pair, _bound(problem, cells, *pair)) for pair in layouts]
    good = GOOD * cells.even(problem.terms) / problem.world_size
    if not search and min((c.bound for c in plain), default=good) < good:
        best, lines = _race(plain, SIMPLER)
        if best.seconds <= good:
            return best, lines
    candidates = [*plain, *_deals(problem, cells)] or [Candidate(problem, *_pair(problem, contiguous))]
    return _race(candidates, 1.0 if search else SIMPLER)


def _race(candidates: list[Candidate], slack: float) -> tuple[Candidate, list[Line]]:
    """The cheapest, or an earlier one that costs at most ``slack`` times as much; and all in figures. Candidates whose
    bound leaves them no chance are not planned."""
    taken, *others = sorted(candidates, key=lambda c: c.bound)
    least, planned = taken.seconds, [taken]
    for other in others:
        limit = least * slack if candidates.index(other) < candidates.index(taken) else taken.seconds / slack
        if other.bound >= limit:
            continue
        planned.append(other)
        least = min(least, other.seconds)
        if other.seconds < limit:
            taken = other
    return taken, [Line(c.q_layout.name, c.offers if c in planned else (), c.bound) for c in candidates]


def _pair(problem: Problem, build: Callable[[int, int], Layout]) -> Pair:
    """A layout of the queries and one of the keys."""
    q_layout = build(problem.q_len, problem.world_size)
    if problem.k_layout is not None:
        return q_layout, problem.k_layout
    return q_layout, q_layout if problem.kv_len == problem.q_len else build(problem.kv_len, problem.world_size)


def _plain(problem: Problem) -> tuple[list[Pair], list[Line]]:
    """The layouts that know no mask; and those that are left out, before a plan of theirs can fill the memory."""
    pairs: list[Pair] = []
    lines: list[Line] = []
    for build in LAYOUTS:
        pair = _pair(problem, build)
        pieces = _pieces(problem, *pair)
        if pairs and pieces * problem.world_size > PIECE_BUDGET:
            budget = f"at most {PIECE_BUDGET:,} on all ranks are compared"
            lines.append(Line(build.__name__, out=f"left out, about {pieces:,} pieces a rank ({budget})"))
        else:
            pairs.append(pair)
    return pairs, lines


def _pieces(problem: Problem, q_layout: Layout, k_layout: Layout) -> int:
    """Tiles of an average rank before any are joined, from the bands of the masks alone: a band is cut by the queries'
    spans and, where spans interleave, by every owner of its keys."""
    return max(int(_parts(mask, q_layout, k_layout).sum()) // problem.world_size for mask in problem.masks)


def _parts(mask: BoundMask, q_layout: Layout, k_layout: Layout) -> Ints:
    data = mask.whole.data
    parts = q_layout.met(*(data[:, Q_AXIS[:3]] - np.array([mask.q_offset, 0, 0])).T)
    if not k_layout.interleaved:
        return parts
    met = np.minimum(k_layout.met(*data[:, K_AXIS[:3]].T), k_layout.world_size)
    return np.asarray(parts * np.minimum(met, data[:, HI] - data[:, LO] + 1), np.int64)


def _meetings(mask: BoundMask, q_layout: Layout, k_layout: Layout) -> int:
    """How often a run of queries meets a run of keys that it needs, about: of the runs of keys that a band meets, those
    that lie within its bounds of a run of queries."""
    data = mask.whole.data
    runs = np.maximum(q_layout.met(*(data[:, Q_AXIS[:3]] - np.array([mask.q_offset, 0, 0])).T), 1)
    keys, length = k_layout.met(*data[:, K_AXIS[:3]].T), data[:, KN] * data[:, KS]
    reach = (data[:, QN] * data[:, QS] // runs + data[:, HI] - data[:, LO]) / np.maximum(length, 1)
    return int((runs * np.minimum(keys, keys * reach + 1)).sum())


def _calls(problem: Problem, q_layout: Layout, k_layout: Layout) -> int:
    """Kernel calls of the rank that has most, under the schedule of fewest; pieces, where these are within the budget
    of calls or too many to be planned."""
    pieces = _pieces(problem, q_layout, k_layout)
    if pieces <= CALL_BUDGET or pieces * problem.world_size > PIECE_BUDGET:
        return pieces
    heads, stacking = problem.terms.shape.num_kv_heads, problem.terms.stacking
    plans = [Plan(mask, q_layout, k_layout, ranks_per_node=problem.ranks_per_node) for mask in problem.masks]
    known = [by_name(name) for name in problem.schedules]
    made = [estimates(p, [(s, settled(p, s, heads)[0]) for s in known], stacking) for p in plans]
    return min(max(int(one.calls.max()) for one in of_plans) for of_plans in zip(*made, strict=True))


def _bound(problem: Problem, cells: Cells, q_layout: Layout, k_layout: Layout) -> float:
    terms = problem.terms
    if _spared(problem) or (k_layout.interleaved and not q_layout.interleaved):
        return cells.even(terms) / problem.world_size
    if not (q_layout.interleaved or k_layout.interleaved):
        return cells.bound(q_layout, k_layout, terms)
    # A tile of a triangle is there for half of the pairs of spans.
    calls = sum(_shapes(mask, q_layout, k_layout, terms.stacking) for mask in problem.masks) // 2
    return cells.striped_bound(k_layout, terms, calls)


def _spared(problem: Problem) -> bool:
    """Whether keys may stay where they are, because queries travel."""
    return any(worthwhile(mask, problem.world_size, problem.terms.shape.thin) for mask in problem.masks)


def _shapes(mask: BoundMask, q_layout: Layout, k_layout: Layout, stacking: Stacking) -> int:
    """Pieces of an average rank on stripes; where small ones are stacked, those of one band for each shape that several
    have."""
    world, parts, sizes = q_layout.world_size, _parts(mask, q_layout, k_layout), mask.whole.data[:, [QN, KN]]
    if stacking is Stacking.NONE:
        return int(parts.sum()) // world
    _, first, times = np.unique(sizes // world, axis=0, return_index=True, return_counts=True)
    many = (times >= SOME) & (sizes[first].max(1) // world <= SMALL)
    return int((np.where(many, 1, times) * parts[first]).sum()) // world


def _cells(problem: Problem, plain: list[Pair]) -> Cells:
    """The sequence cut at the borders of the plain layouts and of all chunks that may be dealt."""
    borders = [q_layout.table[:, 1] for q_layout, _ in plain if not q_layout.interleaved]
    borders += [chunks(problem.q_len, count)[:, 0] for count in _counts(problem)]
    return Cells(problem.masks, np.concatenate([np.zeros(1, np.int64), *borders]))


def _counts(problem: Problem) -> list[int]:
    """Numbers of chunks that leave no chunk empty and stay within the budget of pieces."""
    counts = [count * problem.world_size for count in CHUNKS]
    bands = max(float(mask.whole.data[:, QN] @ mask.whole.data[:, QS]) for mask in problem.masks) / problem.q_len
    return [count for count in counts if count <= problem.q_len and count * bands <= PIECE_BUDGET]


def _deals(problem: Problem, cells: Cells) -> list[Candidate]:
    """The deals of least bound, best first. Where the keys are another sequence, they lie contiguously."""
    world, same = problem.world_size, problem.k_layout is None and problem.kv_len == problem.q_len
    other = None if same else problem.k_layout or contiguous(problem.kv_len, world)
    deals, best = _dealt(problem, cells), list[Candidate]()
    bounds = _bounds_of(deals, problem, cells, other)
    for number in np.argsort(bounds, kind="stable").tolist():
        layout = dealt("balanced", problem.q_len, world, *deals[number])
        pair = layout, other or layout
        if cells.meetings(*pair) <= MEETING_BUDGET:
            best.append(Candidate(problem, *pair, float(bounds[number])))
        if len(best) == FINALISTS:
            break
    return best


Deal = tuple[Ints, Ints]  # chunks, and the rank of each


def _dealt(problem: Problem, cells: Cells) -> list[Deal]:
    """Chunks dealt out in several ways, finer ones until they are even, by the most work of a rank."""
    world, made = problem.world_size, list[tuple[float, Deal]]()
    for count in _counts(problem):
        spans = chunks(problem.q_len, count)
        weights = cells.weights(spans[:, 0])
        for deal in (deal_by_rounds, deal_by_weight):
            rank = deal(weights, world)
            load = float(np.bincount(rank, weights, world).max())
            made.append((load, (spans, rank)))
        if load * world <= EVEN * cells.total:
            break
    return [deal for _, deal in sorted(made, key=lambda one: one[0])]


def _bounds_of(deals: Sequence[Deal], problem: Problem, cells: Cells, keys: Layout | None) -> Seconds:
    """What each costs at least; ``keys``: the layout of the keys, where it is another."""
    world, terms = problem.world_size, problem.terms
    if not deals or _spared(problem) or (keys is not None and keys.interleaved):
        return np.full(len(deals), cells.even(terms) / world)
    ranks = np.stack([rank[np.searchsorted(spans[:, 0], cells.starts, "right") - 1] for spans, rank in deals])
    held = [columns(rank, spans) if keys is None else keys.table for spans, rank in deals]
    return cells.bounds(ranks, held, world, terms)


PLACEMENTS: Sequence[str] = ("auto", "balanced", *(build.__name__ for build in NAMED))
