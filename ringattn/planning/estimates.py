"""How many kernel calls a schedule makes of a plan, on every rank at once and without compiling any.

All ranks' shards are laid end to end on one axis, and the key buffers of all their steps on another, with gaps between
them, so that the tiles of the whole world come and join in one go as those of one program do. It is a program's own
count but for a relay's buffers, which also hold what the ranks behind need, for the last few joins, and for worlds of
so many pieces that some ranks tell of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ringattn.geometry.bands import K_AXIS, Q_AXIS, TAG
from ringattn.geometry.spans import Ints, columns
from ringattn.geometry.tiles import coalesce
from ringattn.planning.contacts import Contacts, laid_out, local
from ringattn.planning.launches import Stacking, stacks
from ringattn.planning.plan import Plan
from ringattn.planning.schedules import Schedule

# Tiles are joined until a turn joins no more than this part of them: a program's take two or three times as many turns.
ENOUGH = 0.02


@dataclass(frozen=True)
class Estimate:
    """Of each rank's forward pass: its kernel calls, and the query rows that all of them compute."""

    calls: Ints
    rows: Ints


Way = tuple[Schedule, int]  # a schedule and its cut


def estimate(plan: Plan, schedule: Schedule, cut: int, stacking: Stacking) -> Estimate:
    """Calls and rows of every rank for a schedule's cut."""
    return estimates(plan, [(schedule, cut)], stacking)[0]


def estimates(plan: Plan, ways: Sequence[Way], stacking: Stacking) -> list[Estimate]:
    """The same for each of several ways, whose tiles join in one go, too, where their keys lie alike."""
    if plan.lattice_contacts is plan.contacts:
        return _estimates(plan, plan.contacts, ways, stacking)
    found: dict[Way, Estimate] = {}
    for made, lattice in ((plan.contacts, False), (plan.lattice_contacts, True)):
        some = [way for way in ways if way[0].on_lattice == lattice]
        if some:
            found |= dict(zip(some, _estimates(plan, made, some, stacking), strict=True))
    return [found[way] for way in ways]


def _estimates(plan: Plan, made: Contacts, ways: Sequence[Way], stacking: Stacking) -> list[Estimate]:
    world = plan.world_size
    slot, turns = _slots(made, ways, world)
    boxes, of = _boxes(made, slot, [int(turns_of_one[-1]) > 0 for turns_of_one in turns])
    steps, size = 1 + int(turns.max()), len(ways) * world
    calls = np.bincount(stacks(boxes, of, stacking) // steps, minlength=size).reshape(-1, world)
    rows = np.bincount(of // steps, boxes[:, 1], size).astype(np.int64).reshape(-1, world)
    if len(made.products):
        holder, key, band, queries = made.products.T
        for number, slots in enumerate(slot):
            kinds = np.unique(columns(holder, slots[key], band, queries), axis=0)
            calls[number] += np.bincount(kinds[:, 0], minlength=world)
            rows[number] += np.bincount(kinds[:, 0], kinds[:, 3], world).astype(np.int64)
    if not made.known.all():
        calls, rows = (np.stack([_spread(found, made) for found in many]) for many in (calls, rows))
    takes_part = np.bincount(plan.world_needs[:, :2].reshape(-1), minlength=world) > 0
    times = [np.where(takes_part, cut, 1) if schedule.by_heads else 1 for schedule, cut in ways]
    hosted = _hosted(plan) if len(plan.guests) else 0
    return [Estimate(n * c + hosted, r) for n, c, r in zip(times, calls, rows, strict=True)]


def _hosted(plan: Plan) -> Ints:
    """Calls for the queries that travel to each rank. Their rows lie side by side, and so do the rank's keys: what has
    the same queries, or the same keys, joins."""
    data, world = plan.guests.data, plan.world_size
    host = data[:, TAG] % world
    sides = (np.unique(columns(host, data[:, axis]), axis=0)[:, 0] for axis in (Q_AXIS, K_AXIS))
    return np.minimum(*(np.bincount(side, minlength=world) for side in sides))


def _slots(made: Contacts, ways: Sequence[Way], world: int) -> tuple[Ints, Ints]:
    """For each way, the number that keys have in common which a rank computes in one step; and the step by the number
    of ranks that the owner is before."""
    turns = np.stack([schedule.turn(np.arange(world), cut) for schedule, cut in ways])
    rank, owner = made.keys[:, 0], made.keys[:, 1]
    first = world * np.arange(len(ways))[:, None]
    return (first + rank) * (1 + int(turns.max())) + turns[:, (rank - owner) % world], turns


def _boxes(made: Contacts, slot: Ints, in_storage_order: Sequence[bool]) -> tuple[Ints, Ints]:
    """The tiles of all ways, ranks and steps as boxes, joined, and the slot of each. Every way has the queries once
    more, behind those of the ways before."""
    ways, count = slot.shape
    rank, owner, start, length, step = np.tile(made.keys.T, ways)
    group = slot.reshape(-1)
    stored = (rank == owner) & np.repeat(in_storage_order, count)
    place = np.where(stored, np.arange(len(start)), start)
    # as keys are packed: in global order, or owner by owner where spans interleave
    by = (place, owner, group) if bool((made.keys[:, 4] > 1).any()) else (place, group)
    order = np.lexsort(by)
    at = np.empty(len(order), np.int64)
    at[order] = begins = laid_out(length[order], group[order], made.step)
    number = np.repeat(np.arange(ways), len(made.of))
    of = np.tile(made.of, ways) + number * count
    queries, spans, bounds = (np.tile(each, (ways, 1)) for each in (made.queries, made.spans, made.bounds))
    queries[:, 0] += number * (made.rows + made.step)
    keys = local(spans, columns(start, length, step), at, of)
    boxes = coalesce(columns(queries, keys, bounds), ENOUGH)
    return boxes, group[order][np.searchsorted(begins, boxes[:, 3], "right") - 1]


def _spread(found: Ints, made: Contacts) -> Ints:
    """What some ranks tell of the others, by the pieces they have."""
    each = found[made.known].sum() / max(made.weights[made.known].sum(), 1)
    return np.where(made.known, found, np.ceil(each * made.weights)).astype(np.int64)
