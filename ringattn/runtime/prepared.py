"""Prepared calls: a program made ready for calls of one kind.

What follows from program, shapes, dtypes and device alone is made at the first call and looked up afterwards: buffers
and views of them, indices on the device, lists of messages and their bytes. A later call makes views of its own q, k
and v, and calls kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.geometry.masks import Expression
from ringattn.kernels import Grads, Selection, tile_calls
from ringattn.kernels.partial import Partial
from ringattn.kernels.scores import Scores
from ringattn.planning import program as planned
from ringattn.planning.program import Parcel, Program, Row
from ringattn.runtime.heads import Seat
from ringattn.runtime.link import Expected, Moved
from ringattn.runtime.wire import Action, Kind, Memory
from ringattn.runtime.work import Hosting, OwnWork, Shares, Work
from ringattn.runtime.workspace import Workspace

NAMES = {Row.QUERY: "q", Row.DK: "grad", Row.DV: "grad"}  # as traffic counts them


class Turn(NamedTuple):
    """A turn of a program, with views in place of rows. ``what`` names its messages, ``moved`` their bytes: of each
    kind the sent and the received ones."""

    what: str
    copies: Sequence[Action]
    sends: Sequence[tuple[Tensor, int]]
    recvs: Sequence[tuple[Tensor, int]]
    moved: Sequence[Moved]
    zeros: Sequence[Tensor]
    work: Sequence[Work]
    adds: Sequence[Action]
    expected: Sequence[Expected]


Turns = list[Turn]


class Prepared:
    """A program, its kernels and the kind of call they are for, under a mask. ``scores`` tells how logits are made, but
    for what each call brings along (a bias, dropout's seed). ``asked``: the kind of the call, ``kind``: of what this
    rank computes of it. ``eager``: why its calls are in no CUDA graph. ``parts``: of a call's first part all of them,
    in order, where heads go by chunks."""

    parts: tuple[Prepared, ...]

    def __init__(
        self, program: Program, kernels: Selection, asked: Kind, mask: Expression, scores: Scores, seat: Seat
    ) -> None:
        self.program, self.kernels, self.asked, self.mask, self.seat = program, kernels, asked, mask, seat
        self.kind = kind = seat.computed(asked)
        self.positional, self.wide = scores.positional, kind.wide
        self.eager: str | None = None
        self.signature = mask.digest, asked, program.schedule, program.cut, kernels.name, scores.scale, scores.softcap
        once = (not program.merges, not program.sums.queries, not program.sums.keys)
        self._dtypes = tuple(kind.dtype if kernels.direct and alone else kind.wide for alone in once)
        directions = (program.forward, False), (program.backward, True)
        self._shares = {
            work: self._ready(work, scores, backward)
            for turns, backward in directions
            for turn in turns
            for work in turn.work
        }

    def result(self, seqlen: int, whole: bool) -> Partial:
        """Where forward's result is gathered. ``whole``: nothing (sinks) changes it behind the last turn."""
        kind, dtype = self.kind, self._dtypes[0] if whole else self.wide
        shape = kind.batch, seqlen, kind.num_heads, kind.v_head_dim
        if self.program.blank:
            return Partial.empty(*shape, dtype, kind.device)
        return Partial.unset(*shape, dtype, kind.device, torch.float64 if self.program.merges else self.wide)

    def gradients(self, q: Tensor, k: Tensor, v: Tensor) -> Grads:
        """Where those of backward that are wanted are gathered, laid in memory as the inputs are."""
        (_, of_q, of_k), zeros = self._dtypes, self.program.zeros
        make_q, make_k = (torch.zeros_like if blank else torch.empty_like for blank in zeros)
        made = (make_q, q, of_q), (make_k, k, of_k), (make_k, v, of_k)
        wanted = zip(made, self.program.wanted.inputs, strict=True)
        dq, dk, dv = (make(x, dtype=of) if asked else None for (make, x, of), asked in wanted)
        return Grads(dq, dk, dv)

    def _ready(self, work: planned.Work, scores: Scores, backward: bool) -> Shares:
        frames = work.q_frame, work.k_frame
        heads, first = self._q_heads(work), self.seat.first_head
        whole = slice(first + heads.start, first + heads.stop)  # as the user counts them
        calls = tile_calls(work.tiles, work.launches, frames, scores, whole, self.kind.device, first)
        shares = self.kernels.shares(work.launches, calls, backward)
        return tuple((kernel, kernel.ready(some, self.kernels.call)) for kernel, some in shares)

    def _q_heads(self, work: planned.Work) -> slice:
        heads, group = work.heads.of(self.kind.num_kv_heads), self.kind.num_heads // self.kind.num_kv_heads
        return slice(heads.start * group, heads.stop * group)

    def turns(self, workspace: Workspace) -> tuple[Turns, Turns]:
        """Forward's and backward's turns, on buffers of the workspace."""
        views = workspace.views(self)
        if views is None:
            kind = self.kind
            for buffer in self.program.buffers:
                workspace.reserve(buffer.slot, math.prod(kind.shape(buffer)), kind.dtype_of(buffer.row), kind.device)
            memory = Memory(workspace, kind, self.seat.ring)
            views = tuple(
                [self._turn(f"{direction} step {t + 1}", turn, memory) for t, turn in enumerate(turns)]
                for direction, turns in (("forward", self.program.forward), ("backward", self.program.backward))
            )
            workspace.keep(self, views)
        return views  # type: ignore[return-value]

    def _turn(self, what: str, turn: planned.Turn, memory: Memory) -> Turn:
        sends, recvs = ([memory.message(parcel) for parcel in parcels] for parcels in (turn.sends, turn.recvs))
        rows = dict.fromkeys(parcel.buffer.row for parcel in (*turn.sends, *turn.recvs))
        moved = []
        for row in rows:
            sent, received = _bytes(row, turn.sends, sends), _bytes(row, turn.recvs, recvs)
            moved.append(Moved(f"{what.split()[0]} {NAMES.get(row, row.value)}", sent, received))
        return Turn(
            what,
            [action for copy in turn.copies for action in memory.laying(copy)],
            sends,
            recvs,
            moved,
            [memory.whole(buffer) for buffer in turn.zeros],
            [self._work(work, memory) for work in turn.work if _some(self._q_heads(work))],
            [action for copy in turn.adds for action in memory.adding(copy)],
            [Expected(peer, p.buffer.row.value, p.spans) for p, (_, peer) in zip(turn.recvs, recvs, strict=True)],
        )

    def _work(self, work: planned.Work, memory: Memory) -> Work:
        shares = self._shares[work]
        if work.queries is not None:
            result = None if work.result is None else memory.whole(work.result)
            return Hosting(shares, memory.whole(work.queries), result)
        keys = None if work.keys is None else memory.pair(memory.whole(work.keys))
        grads = None if work.grads is None else memory.gradients(memory.whole(work.grads), work.grads.row)
        if work.heads.parts == 1:
            return OwnWork(shares, None, None, keys, grads)
        heads = work.heads.of(self.kind.num_kv_heads)
        return OwnWork(shares, self._q_heads(work), (slice(None), slice(None), heads), keys, grads)


def _bytes(row: Row, parcels: Sequence[Parcel], messages: Sequence[tuple[Tensor, int]]) -> int:
    return sum(tensor.nbytes for parcel, (tensor, _) in zip(parcels, messages, strict=True) if parcel.buffer.row is row)


def _some(heads: slice) -> bool:
    """Half of one head is none."""
    return bool(heads.stop > heads.start)
