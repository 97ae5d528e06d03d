"""What is copied on the way between a rank's own tensors and its buffers, ready to be called.

A row of a buffer is one token for all batch rows, ``[rows, batch, heads, width]``, so a message is one run of rows, and
messages from several owners laid end to end are still one K and one V (strided views, no copy). A query that travels
backward takes along all that its gradient is made of; its lse travels as two numbers, so that fp32 messages carry what
the fp64 running lse holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.comm import Homeward
from ringattn.kernels import Grads, Rows
from ringattn.kernels.base import row_delta
from ringattn.kernels.largest import lift
from ringattn.kernels.partial import Partial, accumulator_dtype, fold
from ringattn.kernels.passes import accumulate
from ringattn.planning.program import Buffer, Copy, Parcel, Row
from ringattn.runtime.workspace import Workspace

Index = tuple[slice, ...]
Action = Callable[["Own"], None]


class Kind(NamedTuple):
    """The shapes, dtype and device of a call. One without values, ``v_head_dim`` 0, asks for its rows' largest logits,
    in the place of their lse."""

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def wide(self) -> torch.dtype:
        """That of the accumulators."""
        return accumulator_dtype(self.dtype)

    @property
    def valueless(self) -> bool:
        return self.v_head_dim == 0

    def dtype_of(self, row: Row) -> torch.dtype:
        return self.dtype if row.kept else self.wide

    def shape(self, buffer: Buffer) -> tuple[int, int, int, int]:
        """``[rows, batch, heads, width]``."""
        heads = buffer.heads.of(self.num_kv_heads) if buffer.row.keys else slice(0, self.num_heads)
        return buffer.rows, self.batch, heads.stop - heads.start, buffer.row.width(self.head_dim, self.v_head_dim)


class Own:
    """A rank's own tensors in one pass: forward fills ``acc``, backward reads ``rows`` and adds to ``grads``."""

    __slots__ = ("acc", "grads", "k", "q", "rows", "v")
    acc: Partial
    rows: Rows
    grads: Grads

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.q, self.k, self.v = q, k, v


class Memory:
    """The buffers of one program for one kind of call. ``ring``: the ranks that a program counts from 0."""

    def __init__(self, workspace: Workspace, kind: Kind, ring: Sequence[int]) -> None:
        self.workspace, self.kind, self.ring = workspace, kind, ring

    def whole(self, buffer: Buffer) -> Tensor:
        kind = self.kind
        return self.workspace.view(buffer.slot, kind.shape(buffer), kind.dtype_of(buffer.row), kind.device)

    def pair(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``[n, B, H, D + Dv]`` seen as ``k [B, n, H, D]`` and ``v [B, n, H, Dv]``."""
        kv = rows.transpose(0, 1)
        return kv[..., : self.kind.head_dim], kv[..., self.kind.head_dim :]

    def gradients(self, rows: Tensor, row: Row) -> tuple[Tensor | None, Tensor | None]:
        """Rows of that kind seen as ``dk`` and ``dv`` in the same way, None for what they do not hold."""
        if row is Row.GRAD:
            return self.pair(rows)
        keys = rows.transpose(0, 1)
        return (keys, None) if row is Row.DK else (None, keys)

    def message(self, parcel: Parcel) -> tuple[Tensor, int]:
        rows, peer = self.whole(parcel.buffer)[parcel.rows], self.ring[parcel.peer]
        return Homeward(rows, peer) if parcel.buffer.row.homeward else (rows, peer)

    def laying(self, copy: Copy) -> list[Action]:
        """What writes the rows of a copy."""
        assert copy.target is not None, "rows are laid into a buffer"
        target = self.whole(copy.target)
        if copy.source is not None:
            source = self.whole(copy.source)
            return [_Lay(target[here], source[there]) for there, here in copy.pairs]
        if copy.row is Row.KV:
            heads = copy.heads.of(self.kind.num_kv_heads)
            return [_LayKeys(*self.pair(target[here]), (slice(None), there, heads)) for there, here in copy.pairs]
        make = _LayQueries if copy.row is Row.Q else _LayRows
        return [make(target[here], there) for there, here in copy.pairs]

    def adding(self, copy: Copy) -> list[Action]:
        """What adds the rows of a copy, or merges them where they are partial results."""
        assert copy.source is not None, "rows of a buffer are added"
        source = self.whole(copy.source)
        if copy.target is not None:
            target = self.whole(copy.target)
            return [_Add(target[here], source[there]) for there, here in copy.pairs]
        if copy.row.gradient:
            heads = copy.heads.of(self.kind.num_kv_heads)
            parts = [self.gradients(source[there], copy.row) for there, _ in copy.pairs]
            rows = [(slice(None), here, heads) for _, here in copy.pairs]
            return [_AddHome(*part, index) for part, index in zip(parts, rows, strict=True)]
        make = self._merge if copy.row is Row.PARTIAL else _AddQueries
        return [make(source[there], here) for there, here in copy.pairs]

    @property
    def _merge(self) -> type[_Merge] | type[_Lift]:
        return _Lift if self.kind.valueless else _Merge


@dataclass(frozen=True, slots=True)
class _Lay:
    """Rows of one buffer laid into another."""

    target: Tensor
    source: Tensor

    def __call__(self, own: Own) -> None:
        self.target.copy_(self.source)


@dataclass(frozen=True, slots=True)
class _LayKeys:
    """Own keys and values laid into a buffer."""

    k: Tensor
    v: Tensor
    index: Index

    def __call__(self, own: Own) -> None:
        accumulate(((self.k, own.k[self.index]), (self.v, own.v[self.index])), fresh=True)


@dataclass(frozen=True, slots=True)
class _LayQueries:
    """Own queries laid into a message, as forward computes with them."""

    target: Tensor
    rows: slice

    def __call__(self, own: Own) -> None:
        self.target.copy_(own.q[:, self.rows].transpose(0, 1))


@dataclass(frozen=True, slots=True)
class _LayRows:
    """Own queries laid into a message with all that backward reads: ``q, dout, out, lse, delta, dlse`` side by side."""

    target: Tensor
    rows: slice

    def __call__(self, own: Own) -> None:
        r, wide = own.rows.rows(self.rows), self.target.dtype
        delta = row_delta(r.dout.to(wide), r.out, r.dlse) if r.delta is None else r.delta
        dlse = torch.zeros_like(r.lse) if r.dlse is None else r.dlse
        heads_last = [x.permute(2, 0, 1).unsqueeze(-1) for x in (r.lse, delta, dlse)]
        rows_first = [x.transpose(0, 1) for x in (r.q, r.dout, r.out)]
        torch.cat([x.to(wide) for x in (*rows_first, *heads_last)], -1, out=self.target)


def unpacked_rows(guests: Tensor, dtype: torch.dtype, head_dim: int, v_head_dim: int) -> Rows:
    """What :class:`_LayRows` has laid side by side."""
    q, dout, out, rest = guests.split((head_dim, v_head_dim, v_head_dim, 3), -1)
    q, dout, out = (x.transpose(0, 1).to(dtype) for x in (q, dout, out))
    lse, delta, dlse = (x.permute(1, 2, 0) for x in rest.unbind(-1))
    return Rows(q, dout, out, lse, delta, dlse)


@dataclass(frozen=True, slots=True)
class _Add:
    """Rows of one buffer added to another."""

    target: Tensor
    source: Tensor

    def __call__(self, own: Own) -> None:
        self.target.add_(self.source)


@dataclass(frozen=True, slots=True)
class _AddHome:
    """Gradients of own keys, come home."""

    dk: Tensor | None
    dv: Tensor | None
    index: Index

    def __call__(self, own: Own) -> None:
        pairs = (own.grads.dk, self.dk), (own.grads.dv, self.dv)
        accumulate([(home[self.index], x) for home, x in pairs if home is not None and x is not None])


@dataclass(frozen=True, slots=True)
class _AddQueries:
    """Gradients of own queries, come home."""

    source: Tensor
    rows: slice

    def __call__(self, own: Own) -> None:
        assert own.grads.dq is not None, "it comes home where it is wanted"
        own.grads.dq[:, self.rows].add_(self.source.transpose(0, 1))


@dataclass(frozen=True, slots=True)
class _Merge:
    """Results of own queries, come home."""

    source: Tensor
    rows: slice

    def __call__(self, own: Own) -> None:
        out, lse = self.source[..., :-2], self.source[..., -2:]
        fold(own.acc.rows(self.rows), out.transpose(0, 1), lse.double().sum(-1).permute(1, 2, 0))


@dataclass(frozen=True, slots=True)
class _Lift:
    """The largest logits of own queries, come home."""

    source: Tensor
    rows: slice

    def __call__(self, own: Own) -> None:
        lift(own.acc.lse[:, :, self.rows], self.source.double().sum(-1).permute(1, 2, 0))


def pack_partial(acc: Partial, target: Tensor) -> None:
    """A result laid into a message, ``[rows, batch, heads, v_head_dim + 2]``: the lse rounded, and what rounding
    left."""
    target[..., :-2].copy_(acc.out.transpose(0, 1))
    high = acc.lse.to(target.dtype)
    low = (acc.lse - high).masked_fill_(high == -math.inf, 0.0)
    target[..., -2].copy_(high.permute(2, 0, 1))
    target[..., -1].copy_(low.permute(2, 0, 1))
