"""What one rank computes of one attention call: tiles of queries against keys, by its kernel.

Rows are views where they are slices, and gathered where tokens are scattered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.kernels import Grads, Kernel, Rows
from ringattn.layouts import Frame
from ringattn.merge import Partial
from ringattn.program import Program, Stage
from ringattn.scores import Place, Scores, TileScores
from ringattn.tiles import Rows as RowIndex
from ringattn.tiles import Tile
from ringattn.wire import Link


@dataclass(frozen=True)
class Run:
    """One attention call on one rank: what to do, with what, and how logits are made. ``sinks`` is ``[num_heads]``."""

    program: Program
    kernel: Kernel
    scores: Scores
    link: Link
    sinks: Tensor | None = None

    def stage(self, t: int) -> Stage | None:
        """Stage ``t``, if there is one."""
        return self.program.stages[t] if 0 <= t < len(self.program.stages) else None


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """``rowsum(dout * out) - dlse``, ``[B, H, S]``: what the softmax's backward subtracts (D of FlashAttention-2)."""
    delta = (dout * out).sum(-1).transpose(1, 2).contiguous()
    return delta if dlse is None else delta - dlse


@dataclass(frozen=True)
class Area:
    """Queries against keys: where both lie, and which KV heads of ``group`` query heads each are computed."""

    run: Run
    q_frame: Frame
    k_frame: Frame
    heads: slice
    group: int

    @property
    def q_heads(self) -> slice:
        return slice(self.heads.start * self.group, self.heads.stop * self.group)

    def scores(self, tile: Tile, device: torch.device) -> TileScores:
        """What the kernel is told of a tile."""
        scores = self.run.scores
        if not scores.positional:
            return TileScores(tile.window, scores.scale, scores.softcap)
        q, k = (
            torch.from_numpy(frame.positions()[rows]).to(device)
            for frame, rows in ((self.q_frame, tile.q), (self.k_frame, tile.k))
        )
        return TileScores(tile.window, scores.scale, scores.softcap, scores, Place(tile.q, q, k, self.q_heads))

    def forward(self, tile: Tile, q: Tensor, k: Tensor, v: Tensor, acc: Partial) -> None:
        """Folds one tile into ``acc``; ``k`` and ``v`` hold these heads only, ``q`` and ``acc`` all."""
        q, acc = q[:, :, self.q_heads], acc.heads(self.q_heads)
        with _acc_rows(acc, tile) as rows:
            scores = self.scores(tile, q.device)
            self.run.kernel.forward(_take(q, tile.q), _take(k, tile.k), _take(v, tile.k), scores, rows, tile.fresh)

    def backward(self, tile: Tile, rows: Rows, k: Tensor, v: Tensor, grads: Grads) -> None:
        """Adds one tile's gradients; ``k``, ``v``, ``dk`` and ``dv`` hold these heads only, the rest all."""
        rows = rows.heads(self.q_heads).map(lambda x: _take(x, tile.q), lambda x: _take(x, tile.q, 2))
        with (
            _grad_rows(grads.dq[:, :, self.q_heads], tile.q) as dq,
            _grad_rows(grads.dk, tile.k) as dk,
            _grad_rows(grads.dv, tile.k) as dv,
        ):
            scores = self.scores(tile, k.device)
            self.run.kernel.backward(rows, _take(k, tile.k), _take(v, tile.k), scores, Grads(dq, dk, dv))


def _index(rows: RowIndex, device: torch.device) -> Tensor:
    return torch.as_tensor(rows, device=device)


def _take(x: Tensor, rows: RowIndex, dim: int = 1) -> Tensor:
    if isinstance(rows, slice):
        return x[(slice(None),) * dim + (rows,)]
    return x.index_select(dim, _index(rows, x.device))


@contextmanager
def _acc_rows(acc: Partial, tile: Tile) -> Iterator[Partial]:
    """The tile's rows of the accumulator: a view, or a copy that is written back."""
    if isinstance(tile.q, slice):
        yield acc.rows(tile.q)
        return
    part = Partial(_take(acc.out, tile.q), _take(acc.lse, tile.q, 2))
    yield part
    index = _index(tile.q, acc.out.device)
    acc.out.index_copy_(1, index, part.out)
    acc.lse.index_copy_(2, index, part.lse)


@contextmanager
def _grad_rows(grad: Tensor, rows: RowIndex) -> Iterator[Tensor]:
    """Rows of a gradient to add into: a view, or zeros that are added back."""
    if isinstance(rows, slice):
        yield grad[:, rows]
        return
    index = _index(rows, grad.device)
    part = grad.new_zeros((grad.shape[0], len(index), *grad.shape[2:]))
    yield part
    grad.index_add_(1, index, part)
