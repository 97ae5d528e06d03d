"""How a program is compiled: a rank's steps become turns, with all that is copied, sent, filled and added in them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from ringattn.geometry.frames import Frame
from ringattn.planning.launches import Stacking
from ringattn.planning.plan import Plan
from ringattn.planning.program import Buffer, Copy, Parcel, Program, Row, Turn, Work
from ringattn.planning.schedules import Schedule
from ringattn.planning.stages import ALL, Heads, Move, Stage, Visits, stages_of, visits_of
from ringattn.planning.wanted import ALL_WANTED, Wanted
from ringattn.planning.writes import first_writes

# Messages of less than this part of a shard are not worth a second turn.
HIDDEN = 8


def compile_program(
    plan: Plan, schedule: Schedule, cut: int, rank: int, stacking: Stacking = Stacking.ALL, hides: bool = True,
    wanted: Wanted = ALL_WANTED,
) -> Program:  # fmt: skip
    """The turns of a rank's steps. ``hides``: messages move while a rank computes, at no cost of its own. What is not
    ``wanted`` does not travel backward, and where nothing is there is no backward loop."""
    stages, blank = stages_of(plan, rank, schedule.steps(plan, rank, cut), stacking)
    visits = visits_of(plan, rank, stacking)
    own = Own(plan.q_frame(rank), plan.k_layout.frame(rank))
    turns = backward_turns(own, stages, visits, hides, wanted) if any(wanted) else []
    backward, zeros, sums = first_writes(turns, own.queries.size, own.keys.size)
    return Program(
        rank,
        own.queries,
        own.keys,
        _trimmed(forward_turns(own, stages, visits)),
        _trimmed(backward),
        blank,
        zeros,
        sums,
        not (plan.received.any() or len(plan.visits)),
        schedule.name,
        cut,
        plan.travel > 0,
        stacking,
        wanted,
    )


def _trimmed(turns: list[Turn]) -> tuple[Turn, ...]:
    while turns and not turns[-1]:
        turns.pop()
    return tuple(turns)


@dataclass(frozen=True)
class Own:
    """The rank's own queries and keys."""

    queries: Frame
    keys: Frame


def forward_turns(own: Own, stages: Sequence[Stage], visits: Visits) -> list[Turn]:
    """At turn ``t`` stage ``t`` is computed while the keys of the next arrive. Travelling queries leave at turn 0, are
    computed at turn 1 and return at turn 2; their results are merged last, when all rows have been written."""
    turns, due = [], _due(stages)
    out, back = _Visit(visits, Row.Q, Row.PARTIAL), 3 if visits else 0
    for t in range(max(len(stages), back)):
        post = _fetch(stages, t, due)
        work = []
        if t < len(stages) and stages[t].launches:
            stage = stages[t]
            work.append(_work(own, stage, None if t == 0 else _keys(stage, t), None))
        turns.append(out.turn(t, post, work, own))
    if out.home:
        turns[-1] = replace(turns[-1], adds=(*turns[-1].adds, *out.home))
    return turns


def backward_turns(own: Own, stages: Sequence[Stage], visits: Visits, hides: bool, wanted: Wanted) -> list[Turn]:
    """At turn ``t`` stage ``t`` is computed while the keys of the next arrive and the gradients of the last leave.

    Where there is enough to hide, and it does, half of the own shard's heads are computed first, while the first keys
    arrive, and half last, while the last gradients come home.
    """
    turns, count, row = [], len(stages), _gradients(wanted)
    due, leaving = _due(stages), _due(stages, gradients=True) if row else {}
    out, back = _Visit(visits, Row.QUERY, Row.DQ if wanted.q else None), 3 if visits else 0
    halves = (Heads(0, 2), Heads(1, 2)) if hides and _worth_two_turns(own, stages, row) else (ALL, None)
    for t in range(max(count, *leaving, back - 1) + 1):
        stage = stages[t] if 0 < t < count else None
        grads = None if stage is None or row is None or not stage.frame.size else _grads(stage, t, row)
        coming = _bring_home(stages, t, grads, leaving, row) if row else Turn()
        post = _joined(_fetch(stages, t, due), coming)
        work = []
        if stage is not None and stage.launches:
            work.append(_work(own, stage, _keys(stage, t), grads))
        heads = halves[0] if t == 0 else halves[1] if t == count else None
        if heads is not None and stages[0].launches:
            work.append(_work(own, stages[0], None, None, heads))
        homes: tuple[Copy, ...] = ()
        if grads is not None and stage is not None and stage.copies:
            homes = (Copy(grads, None, tuple((here, home) for home, here in stage.copies)),)
        zeros = () if grads is None else (grads,)
        turns.append(out.turn(t, replace(post, zeros=zeros, adds=(*homes, *post.adds)), work, own))
    if out.home:
        turns[-1] = replace(turns[-1], adds=(*turns[-1].adds, *out.home))
    return turns


def _gradients(wanted: Wanted) -> Row | None:
    """What a row of gradients of keys is, None where neither is wanted."""
    if wanted.k and wanted.v:
        return Row.GRAD
    return Row.DK if wanted.k else Row.DV if wanted.v else None


def _worth_two_turns(own: Own, stages: Sequence[Stage], row: Row | None) -> bool:
    """It costs twice the calls, so it must hide some share of the shard."""
    first = stages[1].frame.size if len(stages) > 1 else 0
    last = sum(move.tokens for move in stages[-1].grad_recvs) if row else 0
    return HIDDEN * max(first, last) >= max(own.keys.size, 1)


def _work(own: Own, stage: Stage, keys: Buffer | None, grads: Buffer | None, heads: Heads | None = None) -> Work:
    return Work(stage.tiles, stage.launches, own.queries, stage.frame, heads or stage.heads, keys, grads)


# -- messages -----------------------------------------------------------------------------------


Due = dict[int, list[int]]  # by turn, the stages whose messages are posted in it


def _due(stages: Sequence[Stage], gradients: bool = False) -> Due:
    """When messages are on their way: keys in the turn before their stage or earlier, gradients in the one behind it or
    later."""
    due: Due = {}
    for s, stage in enumerate(stages):
        moves = (stage.grad_sends, stage.grad_recvs) if gradients else (stage.kv_sends, stage.kv_recvs)
        for apart in {0, *(move.apart for move in chain(*moves))}:
            due.setdefault(s + 1 + apart if gradients else s - 1 - apart, []).append(s)
    return due


def _keys(stage: Stage, t: int) -> Buffer:
    """Where the keys of stage ``t`` lie; those of the stage after are arriving in another slot, and those that take
    several turns to arrive in a third."""
    slot = "kv ahead" if any(move.apart for move in stage.kv_recvs) else f"kv {t % 2}"
    return Buffer(slot, Row.KV, stage.frame.size, stage.heads)


def _grads(stage: Stage, t: int, row: Row) -> Buffer:
    """Where their gradients do; those that take several turns to leave in a third slot."""
    slot = "grads behind" if any(move.apart for move in stage.grad_sends) else f"grads {t % 2}"
    return Buffer(slot, row, stage.frame.size, stage.heads)


def _fetch(stages: Sequence[Stage], t: int, due: Due) -> Turn:
    """Sends this rank's part of the keys that travel in turn ``t`` and receives its own."""
    copies: list[Copy] = []
    sends, recvs = list[Parcel](), list[Parcel]()
    packed: dict[Hashable, Buffer] = {}  # the same rows may go to many ranks
    for s in due.get(t, ()):
        stage, apart = stages[s], s - 1 - t
        held = _keys(stages[s - 1], s - 1) if s > 1 else None
        for move in (move for move in stage.kv_sends if move.apart == apart):
            source = None if move.home else held
            if source is not None and _in_place(move.rows):
                sends.append(_part(move, source))
                continue
            rows = move.home, *((r.start, r.stop, r.step) for r in move.rows)
            if rows not in packed:
                packed[rows] = Buffer(f"kv out {len(packed)}", Row.KV, move.tokens, stage.heads)
                copies.append(Copy(source, packed[rows], _packing(move.rows)))
            sends.append(_whole(move, packed[rows]))
        if stage.frame.size:
            arriving = _keys(stage, s)
            recvs += [_part(move, arriving) for move in stage.kv_recvs if move.apart == apart]
            if stage.copies and not apart:
                copies.append(Copy(None, arriving, stage.copies))
    return Turn(tuple(copies), tuple(sends), tuple(recvs))


def _bring_home(stages: Sequence[Stage], t: int, after: Buffer | None, leaving: Due, row: Row) -> Turn:
    """Sends the gradients that travel in turn ``t``, rows of that kind, on their way and receives those that come here:
    home, or to the stage computed ``after``."""
    copies, sends, recvs, adds = list[Copy](), list[Parcel](), list[Parcel](), list[Copy]()
    for s in leaving.get(t, ()):
        stage, apart = stages[s], t - 1 - s
        for move in (move for move in stage.grad_sends if move.apart == apart):
            if _in_place(move.rows):
                sends.append(_part(move, _grads(stage, s, row)))
                continue
            message = Buffer(f"grad out {len(copies)}", row, move.tokens, stage.heads)
            copies.append(Copy(_grads(stage, s, row), message, _packing(move.rows)))
            sends.append(_whole(move, message))
        for move in (move for move in stage.grad_recvs if move.apart == apart):
            message = Buffer(f"grad in {len(recvs)}", row, move.tokens, stage.heads)
            recvs.append(_whole(move, message))
            adds.append(Copy(message, None if move.home else after, _unpacking(move.rows)))
    return Turn(tuple(copies), tuple(sends), tuple(recvs), adds=tuple(adds))


class _Visit:
    """The two ways of a visit, the same forward and backward: rows go out and rows of results come back. They travel
    before turn 0 computes, are computed in turn 1, and results go home in turn 2, or stay where nothing comes ``back``.
    ``home`` is what then is done."""

    def __init__(self, visits: Visits, out: Row, back: Row | None) -> None:
        self.visits = visits
        self.guests = Buffer(f"{out.value} in", out, visits.frame.size)
        self.leaving = [Buffer(f"{out.value} out {i}", out, move.tokens) for i, move in enumerate(visits.sends)]
        self.results: Buffer | None = None
        self.returning: list[Buffer] = []
        if back is not None:
            self.results = Buffer(f"{back.value} out", back, visits.frame.size)
            self.returning = [Buffer(f"{back.value} in {i}", back, move.tokens) for i, move in enumerate(visits.sends)]
        self.home: tuple[Copy, ...] = tuple(
            Copy(message, None, _unpacking(move.rows))
            for message, move in zip(self.returning, visits.sends, strict=False)
        )

    def turn(self, t: int, post: Turn, work: list[Work], own: Own) -> Turn:
        """A turn with its part of the visits added."""
        visits = self.visits
        if not visits:
            return replace(post, work=tuple(work))
        if t == 0:
            moves = list(zip(self.leaving, visits.sends, strict=True))
            post = _joined(
                post,
                Turn(
                    tuple(Copy(None, message, _packing(move.rows)) for message, move in moves),
                    tuple(_whole(move, message) for message, move in moves),
                    tuple(_part(move, self.guests) for move in visits.recvs),
                ),
            )
        if t == 1 and visits.recvs:
            frames = visits.frame, own.keys
            guests = Work(visits.tiles, visits.launches, *frames, queries=self.guests, result=self.results)
            work = [*work, guests]
        if t == 2 and self.results is not None:
            sends = tuple(_part(move, self.results) for move in visits.recvs)
            arrivals = zip(self.returning, visits.sends, strict=True)
            recvs = tuple(_whole(move, message) for message, move in arrivals)
            post = _joined(post, Turn(sends=sends, recvs=recvs))
        return replace(post, work=tuple(work))


def _joined(*turns: Turn) -> Turn:
    """The messages of several as those of one turn, in this order."""
    columns = ((t.copies, t.sends, t.recvs, t.zeros, t.work, t.adds) for t in turns)
    return Turn(*(tuple(chain(*column)) for column in zip(*columns, strict=True)))


def _part(move: Move, of: Buffer) -> Parcel:
    """A message that is one run of a buffer's rows."""
    return Parcel(move.peer, of, move.rows[0], move.spans)


def _whole(move: Move, message: Buffer) -> Parcel:
    """A message with a buffer for itself."""
    return Parcel(move.peer, message, slice(0, move.tokens, 1), move.spans)


def _in_place(rows: tuple[slice, ...]) -> bool:
    """Whether a buffer holds the message already, in one run."""
    return len(rows) == 1 and rows[0].step in (None, 1)


def _packing(rows: tuple[slice, ...]) -> tuple[tuple[slice, slice], ...]:
    """Each of these rows and where it comes to lie in a message."""
    pairs, at = [], 0
    for part in rows:
        n = len(range(part.start, part.stop, part.step))
        pairs.append((part, slice(at, at + n, 1)))
        at += n
    return tuple(pairs)


def _unpacking(rows: tuple[slice, ...]) -> tuple[tuple[slice, slice], ...]:
    return tuple((there, here) for here, there in _packing(rows))
