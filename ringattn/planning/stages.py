"""Stages: one rank's steps in local rows. What a step computes, and which rows of which shard or buffer its messages
take and fill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ringattn.geometry.frames import Frame
from ringattn.geometry.spans import Ints
from ringattn.geometry.tiles import NO_TILES, Tiles
from ringattn.planning.launches import Launch, Stacking, launches
from ringattn.planning.plan import Plan
from ringattn.planning.schedules import Step, Transfer

NOTHING = Frame(np.empty((0, 3), np.int64))


class Heads(NamedTuple):
    """Part ``part`` of ``parts`` of the KV heads."""

    part: int = 0
    parts: int = 1

    def of(self, number: int) -> slice:
        """Which of so many heads: earlier parts are the larger ones."""
        return slice(-(-number * self.part // self.parts), -(-number * (self.part + 1) // self.parts))


ALL = Heads()


@dataclass(frozen=True)
class Move:
    """One message of this rank: ``rows`` (slices, in message order) of a buffer, ``tokens`` in all, of the global
    positions ``spans``.

    ``home`` says whether the buffer is the rank's own shard (its K/V, or its dK/dV); else it is the buffer of a step:
    K/V are sent from the step before and arrive in this one, gradients leave this step and arrive in the next one.
    ``apart``: turns earlier, or for gradients later, than beside the step.
    """

    peer: int
    rows: tuple[slice, ...]
    spans: Ints = field(compare=False)
    home: bool
    apart: int = 0

    @property
    def tokens(self) -> int:
        return int(self.spans[:, 1].sum())


Moves = tuple[Move, ...]


@dataclass(frozen=True)
class Stage:
    """One step: the frame of its keys, the tiles against them and in which launches these are computed, the part of the
    KV heads, the messages around it, and the own rows it holds, as pairs (rows of the shard, rows of the frame)."""

    frame: Frame
    tiles: Tiles = NO_TILES
    launches: tuple[Launch, ...] = ()
    heads: Heads = ALL
    kv_sends: Moves = ()
    kv_recvs: Moves = ()
    grad_sends: Moves = ()
    grad_recvs: Moves = ()
    copies: tuple[tuple[slice, slice], ...] = ()


@dataclass(frozen=True)
class Visits:
    """What a rank does with travelling queries: ``sends`` are rows of its shard that go to hosts, ``recvs`` rows of
    ``frame``, the guests it hosts, and ``launches`` compute the guests' ``tiles`` against its own keys."""

    frame: Frame = NOTHING
    sends: Moves = ()
    recvs: Moves = ()
    tiles: Tiles = NO_TILES
    launches: tuple[Launch, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.sends or self.recvs)


def stages_of(plan: Plan, rank: int, steps: list[Step], stacking: Stacking) -> tuple[list[Stage], bool]:
    """A rank's stages, and whether its result has to start from the identity: some query rows are not written whole by
    a fresh launch first."""
    own = plan.k_layout.frame(rank)
    frames = [NOTHING, *(step.frame for step in steps), NOTHING]
    parts = len({step.heads for step in steps if step.keys}) or 1
    touched = np.zeros((parts, plan.q_frame(rank).size), bool)
    stages: list[Stage] = []
    blank, known = False, dict[bytes, tuple[Tiles, list[Launch]]]()
    for step, before, here, after in zip(steps, frames, frames[1:], frames[2:], strict=False):
        key = here.spans.tobytes()  # parts of the heads hold the same keys
        if key not in known:
            tiles = plan.tiles(rank, here) if here.size else NO_TILES
            known[key] = tiles, launches(tiles, stacking)
        tiles, calls = known[key]
        rows, made = touched[step.heads[0]], []
        for launch in calls:
            seen = rows[launch.q]
            made.append(launch if seen.any() else launch.as_fresh())
            blank |= bool(seen.any() and not seen.all())
            rows[launch.q] = True
        moves = (*_kv_moves(step, rank, own, before, here), *_grad_moves(step, rank, own, here, after))
        copies = _copies(step, rank, own, here) if stages else ()
        stages.append(Stage(here, tiles, tuple(made), Heads(*step.heads), *moves, copies))
    return stages, blank or not touched.all()


def visits_of(plan: Plan, rank: int, stacking: Stacking) -> Visits:
    """A rank's part in the travels of queries."""
    if not plan.travel:
        return Visits()
    rows, own = plan.visits, plan.q_frame(rank)
    leaving, coming = rows[rows[:, 0] == rank, 1:], rows[rows[:, 1] == rank]
    frame = Frame(coming[:, 2:])
    sends = [_rows_move(host, own, leaving[leaving[:, 0] == host, 1:]) for host in np.unique(leaving[:, 0]).tolist()]
    recvs = [_rows_move(home, frame, coming[coming[:, 0] == home, 2:]) for home in np.unique(coming[:, 0]).tolist()]
    tiles = plan.guest_tiles(rank, frame) if len(coming) else NO_TILES
    return Visits(frame, tuple(sends), tuple(recvs), tiles, tuple(launches(tiles, stacking)))


def _rows_move(peer: int, frame: Frame, spans: Ints) -> Move:
    return Move(peer, _slices(frame.rows(spans)), spans, True)


def _copies(step: Step, rank: int, own: Frame, here: Frame) -> tuple[tuple[slice, slice], ...]:
    """The rank's own keys in a buffer: pairs of slices of equal length, of the shard and of the buffer."""
    pairs = []
    for owner, spans in step.keys:
        if owner == rank:
            for span in spans:
                pairs.append((_slices(own.rows(span[None]))[0], _slices(here.rows(span[None]))[0]))
    return tuple(pairs)


def _kv_moves(step: Step, rank: int, own: Frame, before: Frame, here: Frame) -> tuple[Moves, Moves]:
    """Keys leave the own shard or the step before, and arrive in this step."""
    sends = [_move(t, t.dst, own if t.owner == rank else before, t.owner == rank) for t in step.kv if t.src == rank]
    recvs = [_move(t, t.src, here, False) for t in step.kv if t.dst == rank]
    return tuple(sends), tuple(recvs)


def _grad_moves(step: Step, rank: int, own: Frame, here: Frame, after: Frame) -> tuple[Moves, Moves]:
    """Gradients leave this step, and arrive in the own shard or in the step after."""
    sends = [_move(t, t.dst, here, False) for t in step.grads if t.src == rank]
    recvs = [_move(t, t.src, own if t.owner == rank else after, t.owner == rank) for t in step.grads if t.dst == rank]
    return tuple(sends), tuple(recvs)


def _move(transfer: Transfer, peer: int, frame: Frame, home: bool) -> Move:
    return Move(peer, _slices(frame.rows(transfer.spans)), transfer.spans, home, transfer.apart)


def _slices(runs: Ints) -> tuple[slice, ...]:
    """Runs (start, length, step) as slices, runs that continue each other joined."""
    joined: list[list[int]] = []
    for start, length, step in runs.tolist():
        if joined and step == joined[-1][2] == 1 and start == joined[-1][0] + joined[-1][1]:
            joined[-1][1] += length
        else:
            joined.append([start, length, step])
    return tuple(slice(start, start + (length - 1) * step + 1, step) for start, length, step in joined)
