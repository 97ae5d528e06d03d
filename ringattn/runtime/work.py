"""What one rank computes of one attention call: tiles of queries against keys, by its kernel.

Rows are views where they are slices, and gathered where tokens are scattered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.geometry.frames import Frame
from ringattn.geometry.tiles import Rows as RowIndex
from ringattn.geometry.tiles import Tile
from ringattn.kernels import Grads, Kernel, Rows
from ringattn.kernels.partial import Partial
from ringattn.kernels.scores import Place, Scores, TileScores
from ringattn.planning.launches import Launch
from ringattn.planning.program import Program, Stage
from ringattn.runtime.link import Link


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

    def forward(self, launch: Launch, q: Tensor, k: Tensor, v: Tensor, acc: Partial) -> None:
        """Folds a launch into ``acc``; ``k`` and ``v`` hold these heads only, ``q`` and ``acc`` all."""
        q, acc = q[:, :, self.q_heads], acc.heads(self.q_heads)
        n = len(launch.tiles)
        with _acc_rows(acc, launch.q, n) as rows:
            queries, keys, values = (
                _stacked(_take(x, at), n) for x, at in ((q, launch.q), (k, launch.k), (v, launch.k))
            )
            scores = self.scores(launch.tiles[0], q.device)
            self.run.kernel.forward(queries, keys, values, scores, rows, launch.fresh)

    def backward(self, launch: Launch, rows: Rows, k: Tensor, v: Tensor, grads: Grads) -> None:
        """Adds a launch's gradients; ``k``, ``v``, ``dk`` and ``dv`` hold these heads only, the rest all."""
        rows = rows.heads(self.q_heads)
        n = len(launch.tiles)
        part = rows.map(_taker(launch.q, n), _taker(launch.q, n, 2))
        with (
            _grad_rows(grads.dq[:, :, self.q_heads], launch.q, n) as dq,
            _grad_rows(grads.dk, launch.k, n) as dk,
            _grad_rows(grads.dv, launch.k, n) as dv,
        ):
            keys, values = (_stacked(_take(x, launch.k), n) for x in (k, v))
            self.run.kernel.backward(part, keys, values, self.scores(launch.tiles[0], k.device), Grads(dq, dk, dv))


def _index(rows: RowIndex, device: torch.device) -> Tensor:
    if isinstance(rows, slice):
        return torch.arange(rows.start, rows.stop, rows.step, device=device)
    return torch.as_tensor(rows, device=device)


def _take(x: Tensor, rows: RowIndex, dim: int = 1) -> Tensor:
    if isinstance(rows, slice):
        return x[(slice(None),) * dim + (rows,)]
    return x.index_select(dim, _index(rows, x.device))


def _stacked(x: Tensor, n: int, dim: int = 1) -> Tensor:
    """``n`` equal parts of a dim side by side in the batch dim: ``[B, n * m, ...]`` as ``[B * n, m, ...]``."""
    return x if n == 1 else x.unflatten(dim, (n, -1)).movedim(dim, 1).flatten(0, 1)


def _unstacked(x: Tensor, n: int, dim: int = 1) -> Tensor:
    return x if n == 1 else x.unflatten(0, (-1, n)).movedim(1, dim).flatten(dim, dim + 1)


def _taker(rows: RowIndex, n: int, dim: int = 1) -> Callable[[Tensor], Tensor]:
    return lambda x: _stacked(_take(x, rows, dim), n, dim)


def _shares(part: Tensor, whole: Tensor) -> bool:
    """Whether a part is a view, so that what is written to it is written to the whole."""
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@contextmanager
def _acc_rows(acc: Partial, rows: RowIndex, n: int) -> Iterator[Partial]:
    """Rows of the accumulator, in ``n`` tiles: views, or copies that are written back."""
    part = Partial(_stacked(_take(acc.out, rows), n), _stacked(_take(acc.lse, rows, 2), n, 2))
    yield part
    if not _shares(part.out, acc.out):
        acc.out.index_copy_(1, _index(rows, acc.out.device), _unstacked(part.out, n))
    if not _shares(part.lse, acc.lse):
        acc.lse.index_copy_(2, _index(rows, acc.lse.device), _unstacked(part.lse, n, 2))


@contextmanager
def _grad_rows(grad: Tensor, rows: RowIndex, n: int) -> Iterator[Tensor]:
    """Rows of a gradient to add into, in ``n`` tiles: a view, or zeros that are added back."""
    if isinstance(rows, slice) and _shares(view := _stacked(_take(grad, rows), n), grad):
        yield view
        return
    index = _index(rows, grad.device)
    part = _stacked(grad.new_zeros((grad.shape[0], len(index), *grad.shape[2:])), n)
    yield part
    grad.index_add_(1, index, _unstacked(part, n))
