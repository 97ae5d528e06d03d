"""All ranks at once, as tables for those who look on: what the programs of a world compute and move turn by turn, read
from the programs themselves where they are few, and from the plan where compiling them would take minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ringattn.geometry.bands import K_AXIS, TAG, Bands
from ringattn.geometry.regular import areas, regular
from ringattn.geometry.spans import Ints, meeting
from ringattn.planning.plan import Plan
from ringattn.planning.program import Parcel, Program, Turn
from ringattn.planning.schedules import by_name
from ringattn.planning.shape import BYTES, Shape

PROGRAMS = 32  # ranks whose programs are compiled to be looked at: seconds
TOGETHER = 256  # bands that are cut by all keys at once


@dataclass(frozen=True, eq=False)
class Pass:
    """One loop of all ranks. ``pairs``, ``calls``: ``[ranks, turns]``, pairs by the part of the heads that is computed.
    ``messages``: rows (turn, src, dst, bytes), and what each holds."""

    pairs: Ints
    calls: Ints
    messages: Ints
    kinds: tuple[str, ...]

    @property
    def turns(self) -> int:
        return self.pairs.shape[1]


def passes(programs: Sequence[Program], shape: Shape) -> tuple[Pass, Pass]:
    """The forward and the backward loop of a world, of which ``programs`` are all, in order of ranks."""
    return _pass([p.forward for p in programs], shape), _pass([p.backward for p in programs], shape)


def _pass(ranks: Sequence[tuple[Turn, ...]], shape: Shape) -> Pass:
    turns = max(map(len, ranks), default=0)
    pairs, calls = (np.zeros((len(ranks), turns), np.int64) for _ in range(2))
    rows, kinds = [], []
    for rank, loop in enumerate(ranks):
        for t, turn in enumerate(loop):
            calls[rank, t] = len(turn.launches)
            pairs[rank, t] = sum(sum(launch.area for launch in w.launches) // w.heads.parts for w in turn.work)
            for parcel in turn.sends:
                rows.append((t, rank, parcel.peer, parcel_bytes(parcel, shape)))
                kinds.append(parcel.buffer.row.value)
    return Pass(pairs, calls, np.array(rows, np.int64).reshape(-1, 4), tuple(kinds))


def parcel_bytes(parcel: Parcel, shape: Shape) -> int:
    """Bytes of a message in calls of a shape."""
    row, rows = parcel.buffer.row, parcel.rows.stop - parcel.rows.start
    heads = parcel.buffer.heads.of(shape.num_kv_heads if row.keys else shape.num_heads)
    numbers = rows * (heads.stop - heads.start) * row.width(shape.head_dim, shape.values) * shape.batch
    return numbers * (BYTES[shape.dtype] if row.kept else shape.wide)


@dataclass(frozen=True, eq=False)
class Meetings:
    """Who computes with whose keys, and when: ``pairs [rank, owner]``, ``needs [rank, owner]`` in K/V tokens, and
    ``turn [rank, owner]``, the turn of the forward loop in which they are computed, the first of ``parts``. ``hosted``:
    pairs of each rank of queries that came to it, which it computes in turn 1."""

    pairs: Ints
    needs: Ints
    turn: Ints
    hosted: Ints
    parts: int = 1

    @cached_property
    def by_turn(self) -> Ints:
        """Pairs ``[ranks, turns]`` by the part of the heads, as :class:`Pass` has them."""
        world, turns = len(self.pairs), int(self.turn[self.pairs > 0].max(initial=0)) + 1
        found = np.zeros((world, max(turns, 2 * bool(self.hosted.any()))), np.int64)
        np.add.at(found, (np.arange(world)[:, None], np.minimum(self.turn, turns - 1)), self.pairs)
        if self.parts > 1:
            found = np.concatenate((found[:, :-1], np.repeat(found[:, -1:] // self.parts, self.parts, 1)), 1)
        if self.hosted.any():
            found[:, 1] += self.hosted
        return found


def meetings(plan: Plan, schedule: str, part: int) -> Meetings:
    """Those of a plan whose keys come as the schedule says with the cut ``part``; queries that travel are
    ``hosted``."""
    known, world = by_name(schedule), plan.world_size
    pairs, ranks = np.zeros(world * world, np.int64), np.arange(world)
    for first in range(0, len(plan.world), TOGETHER):
        _add_pairs(pairs, plan, plan.world.take(slice(first, first + TOGETHER)))
    guests = plan.guests
    hosted = np.zeros(world, np.int64)
    np.add.at(hosted, guests.data[:, TAG] % world, areas(guests))
    needs = np.zeros((world, world), np.int64)
    np.add.at(needs, tuple(plan.world_needs[:, :2].T), plan.world_needs[:, 3])
    turn = np.asarray(known.turn((ranks[:, None] - ranks[None]) % world, part), np.int64)
    by_heads = known.by_heads and bool(plan.received.any())
    if by_heads:  # what a rank needs comes before anything is computed; one without messages computes at once
        takes_part = np.bincount(plan.world_needs[:, :2].reshape(-1), minlength=world) > 0
        turn = turn + takes_part[:, None]
    return Meetings(pairs.reshape(world, world), needs, turn, hosted, part if by_heads else 1)


def _add_pairs(pairs: Ints, plan: Plan, bands: Bands) -> None:
    """Adds those of some bands of the world to ``pairs [rank * world + owner]``."""
    table, data = plan.k_layout.table, bands.data
    i, j, met = meeting(data[:, list(K_AXIS[:3])], table[:, 1:])
    data = data[i]
    data[:, list(K_AXIS[:3])] = met
    data[:, TAG] = data[:, TAG] * plan.world_size + table[j, 0]
    pieces = regular(Bands(data, bands.sets))
    np.add.at(pairs, pieces.data[:, TAG], areas(pieces))
