"""Programs: one rank's schedule compiled to local indices, ready to run without looking at the plan.

Everything the loops of ``ring.py`` do is decided here once: which rows of which buffer a message
fills or takes, which tiles a step computes, which of them meet untouched rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ringattn.geometry.frames import Frame
from ringattn.geometry.spans import Ints
from ringattn.geometry.tiles import Tile
from ringattn.planning.launches import Launch, Stacking, launches
from ringattn.planning.plan import Plan
from ringattn.planning.schedules import Schedule, Step, Transfer

# Messages of less than this part of a shard are not worth a second turn.
HIDDEN = 8


@dataclass(frozen=True)
class Move:
    """One message of this rank: ``rows`` (slices, in message order) of a buffer, ``tokens`` in all.

    ``home`` says whether the buffer is the rank's own shard (its K/V, or its dK/dV); else it is the
    buffer of a step: K/V are sent from the step before and arrive in this one, gradients leave this
    step and arrive in the next one.
    """

    peer: int
    rows: tuple[slice, ...]
    tokens: int
    home: bool


@dataclass(frozen=True)
class Stage:
    """One step in local indices: the frame of its keys, its kernel calls, the chunk ``(i, n)`` of the KV heads it
    computes, the messages around it, and the own rows it holds, as pairs (rows of the shard, rows of the frame)."""

    frame: Frame
    launches: tuple[Launch, ...]
    heads: tuple[int, int] = (0, 1)
    kv_sends: tuple[Move, ...] = ()
    kv_recvs: tuple[Move, ...] = ()
    grad_sends: tuple[Move, ...] = ()
    grad_recvs: tuple[Move, ...] = ()
    copies: tuple[tuple[slice, slice], ...] = ()

    @property
    def tiles(self) -> list[Tile]:
        """The tiles of all launches."""
        return [tile for launch in self.launches for tile in launch.tiles]

    @property
    def size(self) -> int:
        """Key rows of its buffer."""
        return self.frame.size

    def kv_heads(self, number: int) -> slice:
        """Its part of that many KV heads."""
        i, n = self.heads
        return slice(number * i // n, number * (i + 1) // n)


@dataclass(frozen=True)
class Visits:
    """What a rank does with travelling queries: ``sends`` are rows of its shard that go to hosts, ``recvs`` rows of
    ``frame``, the guests it hosts, and ``launches`` compute the guests against its own keys."""

    sends: tuple[Move, ...]
    recvs: tuple[Move, ...]
    frame: Frame
    launches: tuple[Launch, ...]

    # They travel before this turn of a loop computes, are computed in the second, and results go home in the third.
    INVITE, HOST, RETURN = 0, 1, 2


@dataclass(frozen=True)
class Program:
    """All stages of one rank for one mask. ``stages[0]`` needs no message; it computes on the rank's own shard, or
    not at all.

    ``blank`` says that some query rows are not written whole by a fresh tile first, so the result has
    to start from the identity. ``alone`` says that no rank needs anything of another. ``schedule``, ``cut`` and
    ``travel`` say what it was compiled from.
    """

    rank: int
    q_frame: Frame
    k_frame: Frame
    stages: tuple[Stage, ...]
    visits: Visits
    blank: bool
    alone: bool
    schedule: str
    cut: int
    travel: bool

    @property
    def two_turns(self) -> bool:
        """Whether the backward pass computes its own shard in two turns, one while the first keys arrive and one
        while the last gradients come home. It costs twice the calls, so it must hide some share of the shard."""
        first = self.stages[1].size if len(self.stages) > 1 else 0
        last = sum(move.tokens for move in self.stages[-1].grad_recvs)
        return HIDDEN * max(first, last) >= max(self.k_frame.size, 1)

    @property
    def calls(self) -> int:
        """Kernel calls of one forward pass."""
        return sum(len(stage.launches) for stage in self.stages) + len(self.visits.launches)

    def tokens(self, messages: str) -> int:
        """Tokens moved by one kind of message: kv_sends, kv_recvs, grad_sends or grad_recvs. A token whose heads
        travel in chunks counts once."""
        parts = (Fraction(move.tokens, s.heads[1]) for s in self.stages for move in getattr(s, messages))
        return int(sum(parts))


def compile_program(plan: Plan, schedule: Schedule, cut: int, rank: int, stacking: Stacking = Stacking.ALL) -> Program:
    """The local form of a rank's steps."""
    steps = schedule.steps(plan, rank, cut)
    own, q_frame, nothing = plan.k_layout.frame(rank), plan.q_frame(rank), Frame(np.empty((0, 3), np.int64))
    frames = [nothing, *(step.frame for step in steps), nothing]
    touched = np.zeros((len({step.heads for step in steps if step.keys}) or 1, q_frame.size), bool)
    stages: list[Stage] = []
    blank, known = False, dict[bytes, list[Launch]]()
    for step, before, here, after in zip(steps, frames, frames[1:], frames[2:], strict=False):
        key = here.spans.tobytes()  # chunks of heads hold the same keys
        if key not in known:
            known[key] = launches(plan.tiles(rank, here), stacking) if here.size else []
        rows = touched[step.heads[0]]
        made = []
        for launch in known[key]:
            seen = rows[launch.q]
            made.append(launch if seen.any() else launch.as_fresh())
            blank |= bool(seen.any() and not seen.all())
            rows[launch.q] = True
        moves = (*_kv_moves(step, rank, own, before, here), *_grad_moves(step, rank, own, here, after))
        stages.append(Stage(here, tuple(made), step.heads, *moves, _copies(step, rank, own, here) if stages else ()))
    visits = _visits(plan, rank, stacking)
    if visits.sends or visits.recvs:
        stages += [Stage(nothing, ())] * (Visits.RETURN + 1 - len(stages))
    blank |= not touched.all()
    alone = not (plan.received.any() or len(plan.visits))
    return Program(rank, q_frame, own, tuple(stages), visits, blank, alone, schedule.name, cut, plan.travel > 0)


def _visits(plan: Plan, rank: int, stacking: Stacking) -> Visits:
    if not plan.travel:
        return Visits((), (), Frame(np.empty((0, 3), np.int64)), ())
    rows, own = plan.visits, plan.q_frame(rank)
    leaving, coming = rows[rows[:, 0] == rank, 1:], rows[rows[:, 1] == rank]
    frame = Frame(coming[:, 2:])
    sends = [_rows_move(host, own, leaving[leaving[:, 0] == host, 1:]) for host in np.unique(leaving[:, 0]).tolist()]
    recvs = [_rows_move(home, frame, coming[coming[:, 0] == home, 2:]) for home in np.unique(coming[:, 0]).tolist()]
    tiles = plan.guest_tiles(rank, frame) if len(coming) else ()
    return Visits(tuple(sends), tuple(recvs), frame, tuple(launches(tiles, stacking)))


def _rows_move(peer: int, frame: Frame, spans: Ints) -> Move:
    return Move(peer, _slices(frame.rows(spans)), int(spans[:, 1].sum()), True)


def _copies(step: Step, rank: int, own: Frame, here: Frame) -> tuple[tuple[slice, slice], ...]:
    """The rank's own keys in a buffer: pairs of slices of equal length, of the shard and of the buffer."""
    pairs = []
    for owner, spans in step.keys:
        if owner == rank:
            for span in spans:
                pairs.append((_slices(own.rows(span[None]))[0], _slices(here.rows(span[None]))[0]))
    return tuple(pairs)


Moves = tuple[Move, ...]


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
    return Move(peer, _slices(frame.rows(transfer.spans)), transfer.tokens, home)


def _slices(runs: Ints) -> tuple[slice, ...]:
    """Runs (start, length, step) as slices, runs that continue each other joined."""
    joined: list[list[int]] = []
    for start, length, step in runs.tolist():
        if joined and step == joined[-1][2] == 1 and start == joined[-1][0] + joined[-1][1]:
            joined[-1][1] += length
        else:
            joined.append([start, length, step])
    return tuple(slice(start, start + (length - 1) * step + 1, step) for start, length, step in joined)
