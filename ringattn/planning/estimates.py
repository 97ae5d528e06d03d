"""How many kernel calls a schedule makes of a plan, on every rank at once and without compiling any.

All ranks' shards are laid end to end on one axis, and the key buffers of all their steps on another, with gaps between
them, so that the tiles of the whole world come and join in one go as those of one program do. It is a program's own
count but for a relay's buffers, which also hold what the ranks behind need, for the last few joins, and for worlds of
so many pieces that some ranks tell of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringattn.geometry.bands import TAG
from ringattn.geometry.spans import Ints
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


def estimate(plan: Plan, schedule: Schedule, cut: int, stacking: Stacking) -> Estimate:
    """Calls and rows of every rank for a schedule's cut."""
    made, world = plan.contacts, plan.world_size
    rank, owner = made.keys[:, 0], made.keys[:, 1]
    turn, turns = schedule.turn((rank - owner) % world, cut), int(schedule.turn(np.arange(world), cut).max()) + 1
    group = rank * turns + turn
    boxes, of = _boxes(made, group, in_storage_order=int(schedule.turn(np.arange(world), cut)[-1]) > 0)
    calls = np.bincount(stacks(boxes, of, stacking) // turns, minlength=world)
    rows = np.bincount(of // turns, boxes[:, 1], world).astype(np.int64)
    if len(made.products):
        holder, key, band, queries = made.products.T
        kinds = np.unique(np.stack((holder, group[key], band, queries), 1), axis=0)
        calls += np.bincount(kinds[:, 0], minlength=world)
        rows += np.bincount(kinds[:, 0], kinds[:, 3], world).astype(np.int64)
    if not made.known.all():
        calls, rows = (_spread(found, made) for found in (calls, rows))
    if schedule.by_heads:
        needs = plan.world_needs
        moves = np.bincount(needs[:, :2].reshape(-1), minlength=world) > 0
        calls = np.where(moves, cut * calls, calls)
    return Estimate(calls + np.bincount(plan.guests.data[:, TAG] % world, minlength=world), rows)


def _boxes(made: Contacts, group: Ints, in_storage_order: bool) -> tuple[Ints, Ints]:
    """The tiles of all ranks and steps as boxes, joined, and the group of each."""
    rank, owner, start, length, step = made.keys.T
    place = np.where((rank == owner) & in_storage_order, np.arange(len(start)), start)
    # as keys are packed: in global order, or owner by owner where spans interleave
    by = (place, owner, group) if bool((step > 1).any()) else (place, group)
    order = np.lexsort(by)
    at = np.empty(len(order), np.int64)
    at[order] = begins = laid_out(length[order], group[order], made.step)
    keys = local(made.spans, made.keys[:, 2:], at, made.of)
    boxes = coalesce(np.column_stack((made.queries, keys, made.bounds)), ENOUGH)
    return boxes, group[order][np.searchsorted(begins, boxes[:, 3], "right") - 1]


def _spread(found: Ints, made: Contacts) -> Ints:
    """What some ranks tell of the others, by the pieces they have."""
    each = found[made.known].sum() / max(made.weights[made.known].sum(), 1)
    return np.where(made.known, found, np.ceil(each * made.weights)).astype(np.int64)
