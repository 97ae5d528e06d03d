"""Queries that travel: sent to the ranks that hold their keys, computed there, and what comes back merged at home.

Which queries those are is in the program. Messages are rows ``[tokens, batch, num_heads, *]`` in the accumulators'
precision; an lse travels as two numbers, so that fp32 messages carry what the fp64 running lse holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ringattn.kernels import Grads, Rows
from ringattn.kernels.partial import Partial, fold
from ringattn.planning.program import Move, Visits
from ringattn.runtime.wire import Batch
from ringattn.runtime.work import Area, Run, accumulator_dtype, row_delta

Message = tuple[Move, Tensor]


class _Guesthouse:
    """The two ways of a visit, the same forward and backward: rows go out and rows of results come back."""

    def __init__(self, run: Run, q: Tensor, k: Tensor, v: Tensor, wide: torch.dtype) -> None:
        self.run, self.q, self.k, self.v, self.wide = run, q, k, v, wide
        self.visits = run.program.visits
        self.any = bool(self.visits.sends or self.visits.recvs)
        self.guests: Tensor | None = None
        self.returned: list[Message] = []

    def area(self, num_heads: int) -> Area:
        """The guests against the own shard."""
        kv_heads, own = self.k.shape[2], self.run.program.k_frame
        return Area(self.run, self.visits.frame, own, slice(0, kv_heads), num_heads // kv_heads)

    def invite(self, messages: Batch, kind: str, rows: Callable[[slice], Tensor], like: tuple[Tensor, int]) -> None:
        """Sends own rows to their hosts and makes room for the guests that come here: ``rows`` of a slice of the
        shard are ``[n, batch, num_heads, width]`` in the dtype of ``like = (tensor, width)``."""
        sends, recvs = messages.of(kind)
        for move in self.visits.sends:
            sends.append((torch.cat([rows(part) for part in move.rows]), move.peer))
        if self.visits.recvs:
            (tensor, width), q = like, self.q
            shape = (self.visits.frame.size, q.shape[0], q.shape[2], width)
            guests = messages.buffer(f"{kind} in", shape, tensor, tensor.dtype)
            recvs += [(guests[move.rows[0]], move.peer) for move in self.visits.recvs]
            self.guests = guests

    def send_home(self, messages: Batch, kind: str, results: Tensor | None, width: int, like: Tensor) -> None:
        """Sends results ``[N, B, H, width]`` to the guests' ranks and makes room for those that come home."""
        sends, recvs = messages.of(kind)
        for move in self.visits.recvs:
            assert results is not None, "guests were computed in the turn before"
            sends.append((results[move.rows[0]], move.peer))
        for i, move in enumerate(self.visits.sends):
            shape = (move.tokens, like.shape[0], like.shape[2], width)
            message = messages.buffer(f"{kind} in {i}", shape, like, self.wide)
            recvs.append((message, move.peer))
            self.returned.append((move, message))


class ForwardVisits(_Guesthouse):
    """The visits of a forward pass: q goes out, partial results come home."""

    def __init__(self, run: Run, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().__init__(run, q, k, v, accumulator_dtype(q.dtype))
        self.results: Tensor | None = None

    def post(self, t: int, messages: Batch) -> None:
        """Adds the messages of this turn."""
        if t == Visits.INVITE and self.any:
            self.invite(messages, "q", lambda part: self.q[:, part].transpose(0, 1), (self.q, self.q.shape[-1]))
        elif t == Visits.RETURN and self.any:
            self.send_home(messages, "partial", self.results, self.v.shape[-1] + 2, self.q)

    def compute(self, t: int) -> None:
        """Computes the guests, in their turn."""
        if t != Visits.HOST or self.guests is None:
            return
        batch, _, num_heads, _ = self.q.shape
        acc = Partial.empty(batch, len(self.guests), num_heads, self.v.shape[-1], self.wide, self.q.device)
        area = self.area(num_heads)
        for launch in self.visits.launches:
            area.forward(launch, self.guests.transpose(0, 1), self.k, self.v, acc)
        self.results = torch.cat((acc.out.transpose(0, 1), _split_lse(acc.lse, self.wide)), -1)

    def merge_into(self, acc: Partial) -> None:
        """Folds what came home into the running result."""
        for move, message in self.returned:
            at, width = 0, self.v.shape[-1]
            for rows in move.rows:
                home = acc.rows(rows)
                part = message[at : at + home.out.shape[1]]
                fold(home, part[..., :width].transpose(0, 1), _joined_lse(part[..., width:]))
                at += len(part)


class BackwardVisits(_Guesthouse):
    """The visits of a backward pass: all that a tile's backward reads goes out, dq comes home; dk and dv are already
    where they belong."""

    def __init__(self, run: Run, rows: Rows, k: Tensor, v: Tensor, own: Grads) -> None:
        super().__init__(run, rows.q, k, v, own.dq.dtype)
        self.rows, self.own = rows, own
        self.dq: Tensor | None = None

    def post(self, t: int, messages: Batch) -> None:
        """Adds the messages of this turn."""
        if t == Visits.INVITE and self.any:
            width = self.own.dq.shape[-1] + 2 * self.v.shape[-1] + 3
            self.invite(messages, "q", self._packed, (self.own.dq, width))
        elif t == Visits.RETURN and self.any:
            self.send_home(messages, "dq", self.dq, self.own.dq.shape[-1], self.rows.q)

    def compute(self, t: int) -> None:
        """Computes the guests' gradients, in their turn."""
        if t != Visits.HOST or self.guests is None:
            return
        guests = self._unpacked(self.guests)
        self.dq = self.guests.new_zeros(*self.guests.shape[:3], self.own.dq.shape[-1])
        grads, area = Grads(self.dq.transpose(0, 1), self.own.dk, self.own.dv), self.area(guests.q.shape[2])
        for launch in self.visits.launches:
            area.backward(launch, guests, self.k, self.v, grads)

    def add_home(self) -> None:
        """Adds the dq that came home."""
        for move, message in self.returned:
            at = 0
            for rows in move.rows:
                part = self.own.dq[:, rows]
                n = part.shape[1]
                part.add_(message[at : at + n].transpose(0, 1))
                at += n

    def _packed(self, part: slice) -> Tensor:
        """``q, dout, out, lse, delta, dlse`` of some rows side by side, ``[n, B, H, *]``."""
        r = self.rows.rows(part)
        delta = row_delta(r.dout.to(self.wide), r.out, r.dlse) if r.delta is None else r.delta
        dlse = torch.zeros_like(r.lse) if r.dlse is None else r.dlse
        heads_last = [x.permute(2, 0, 1).unsqueeze(-1) for x in (r.lse, delta, dlse)]
        rows_first = [x.transpose(0, 1) for x in (r.q, r.dout, r.out)]
        return torch.cat([x.to(self.wide) for x in (*rows_first, *heads_last)], -1)

    def _unpacked(self, guests: Tensor) -> Rows:
        dtype, d, dv = self.rows.q.dtype, self.rows.q.shape[-1], self.rows.out.shape[-1]
        q, dout, out, rest = guests.split((d, dv, dv, 3), -1)
        q, dout, out = (x.transpose(0, 1).to(dtype) for x in (q, dout, out))
        lse, delta, dlse = (x.permute(1, 2, 0) for x in rest.unbind(-1))
        return Rows(q, dout, out, lse, delta, dlse)


def _split_lse(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, H, N]`` as ``[N, B, H, 2]``: rounded, and what rounding left."""
    high = lse.to(dtype)
    low = (lse - high).masked_fill_(high == -math.inf, 0.0).to(dtype)
    return torch.stack((high, low), -1).permute(2, 0, 1, 3)


def _joined_lse(pair: Tensor) -> Tensor:
    """``[n, B, H, 2]`` as ``[B, H, n]`` in fp64."""
    return pair.double().sum(-1).permute(1, 2, 0)
