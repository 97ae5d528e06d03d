"""A stage's tiles as a kernel is given them, and what computes them call by call.

The table of tiles is there whole, for a kernel that launches a list of tiles at once. The others compute one tile, or
one stack of equal tiles, a call: rows are views where they are slices, and gathered where tokens are scattered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ringattn.geometry.frames import Frame
from ringattn.geometry.tiles import RowIndex, Tiles
from ringattn.kernels.base import Call, Grads, Kernel, Needs, Rows
from ringattn.kernels.partial import Partial
from ringattn.kernels.scores import Place, Scores, TileScores
from ringattn.planning.launches import Launch


@dataclass(frozen=True, eq=False, slots=True)
class TileCall:
    """``count`` tiles side by side: their rows (a slice, or an index on the device; None is all of them), what becomes
    of their scores, and whether nothing was written yet to their rows of the result (dq), and of dk and dv."""

    q: slice | Tensor | None
    k: slice | Tensor | None
    count: int
    scores: TileScores
    fresh: bool
    fresh_keys: bool
    plain: bool  # all its rows are views


@dataclass(frozen=True, eq=False)
class TileCalls:
    """The tiles of one piece of work: the table, and the calls that compute it, in order. ``launches`` are what the
    calls were made of, ``place`` is where all local rows and columns lie, where scores ask for it."""

    tiles: Tiles
    launches: tuple[Launch, ...]
    calls: tuple[TileCall, ...]
    scores: Scores
    place: Place | None
    device: torch.device

    def scored(self, scores: Scores) -> TileCalls:
        """The same for a call with a bias or dropout of its own."""
        made = (replace(call, scores=replace(call.scores, call=scores)) for call in self.calls)
        return replace(self, calls=tuple(made), scores=scores)


def tile_calls(
    tiles: Tiles, launches: tuple[Launch, ...], frames: tuple[Frame, Frame], scores: Scores, heads: slice,
    device: torch.device, first_head: int = 0,
) -> TileCalls:  # fmt: skip
    """Launches made ready for a device. ``frames``: of the queries and the keys; ``heads``: the query heads;
    ``first_head``: the one at which a bias tensor begins. Where tiles must know where they lie, they are to be
    :meth:`~TileCalls.scored` for each call."""
    sizes = [frame.size for frame in frames]
    positions = [torch.from_numpy(f.positions()).to(device) for f in frames] if scores.positional else []
    calls = []
    for launch in launches:
        rows = [_ready(side, size, device) for side, size in zip((launch.q, launch.k), sizes, strict=True)]
        place = None
        if positions:
            q, k = (at if r is None else at[r] for at, r in zip(positions, rows, strict=True))
            place = Place(launch.q, q, k, heads, first_head)
        made = TileScores(launch.window, scores.scale, scores.softcap, None, place)
        plain = launch.count == 1 and not any(isinstance(side, Tensor) for side in rows)
        calls.append(TileCall(rows[0], rows[1], launch.count, made, launch.fresh, launch.fresh_keys, plain))
    whole = Place(slice(0, sizes[0]), positions[0], positions[1], heads, first_head) if positions else None
    return TileCalls(tiles, launches, tuple(calls), Scores(scores.scale, scores.softcap), whole, device)


def _ready(rows: RowIndex, size: int, device: torch.device) -> slice | Tensor | None:
    if isinstance(rows, slice):
        return None if len(range(rows.start, rows.stop, rows.step)) == size and rows.step == 1 else rows
    return torch.from_numpy(rows).to(device)


class TileKernel:
    """A kernel that computes a tile a call."""

    name = ""
    reads_delta = False
    needs = Needs()
    leaves_sms, takes_lists = False, False
    named_only: frozenset[str] = frozenset()

    def fitted(self, call: Call) -> Kernel:
        """See `Kernel`."""
        return self

    def direct(self, call: Call) -> bool:
        """See `Kernel`: a tile may be several parts that add up."""
        return False

    def ready(self, calls: TileCalls, call: Call) -> TileCalls:
        """See `Kernel`."""
        return calls

    def forward_tile(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores, acc: Partial, fresh: bool) -> None:
        """Folds one tile into ``acc``, its rows of the running result; ``fresh``: nothing is in them yet."""
        raise NotImplementedError

    def refuse(self, call: Call) -> str | None:
        """See `Kernel`."""
        raise NotImplementedError

    def backward_tile(self, rows: Rows, k: Tensor, v: Tensor, scores: TileScores, grads: Grads) -> None:
        """Adds one tile's dq, dk, dv, or writes what is fresh, given the global out, lse and delta."""
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, calls: TileCalls, acc: Partial) -> None:
        """See `Kernel`."""
        for call in calls.calls:
            self.forward_call(q, k, v, call, acc)

    def forward_call(self, q: Tensor, k: Tensor, v: Tensor, call: TileCall, acc: Partial) -> None:
        """One of them."""
        if call.plain:
            queries, part = (q, acc) if call.q is None else (q[:, call.q], acc.rows(call.q))
            keys, values = (k, v) if call.k is None else (k[:, call.k], v[:, call.k])
            self.forward_tile(queries, keys, values, call.scores, part, call.fresh)
            return
        with _acc_rows(acc, call.q, call.count) as part:
            queries, keys, values = (_rows(x, at, call.count) for x, at in ((q, call.q), (k, call.k), (v, call.k)))
            self.forward_tile(queries, keys, values, call.scores, part, call.fresh)

    def backward(self, rows: Rows, k: Tensor, v: Tensor, calls: TileCalls, grads: Grads) -> None:
        """See `Kernel`."""
        for call in calls.calls:
            if call.plain:
                part = rows if call.q is None else rows.rows(call.q)
                keys, values = (k, v) if call.k is None else (k[:, call.k], v[:, call.k])
                self.backward_tile(part, keys, values, call.scores, _views(grads, call))
                continue
            n = call.count
            part = rows.map(lambda x: _rows(x, call.q, n), lambda x: _rows(x, call.q, n, 2))  # noqa: B023
            fresh, fresh_keys = call.fresh, call.fresh_keys
            with (
                _grad_rows(grads.dq, call.q, n, fresh) as dq,
                _grad_rows(grads.dk, call.k, n, fresh_keys) as dk,
                _grad_rows(grads.dv, call.k, n, fresh_keys) as dv,
            ):
                keys, values = _rows(k, call.k, n), _rows(v, call.k, n)
                self.backward_tile(part, keys, values, call.scores, Grads(dq, dk, dv, fresh, fresh_keys))


def _views(grads: Grads, call: TileCall) -> Grads:
    q, k = (slice(None) if rows is None else rows for rows in (call.q, call.k))
    return grads.views((slice(None), q), (slice(None), k), call.fresh, call.fresh_keys)


def _rows(x: Tensor, rows: slice | Tensor | None, count: int, dim: int = 1) -> Tensor:
    """Rows of a dim, those of ``count`` tiles side by side in the batch dim."""
    return _stacked(_take(x, rows, dim), count, dim)


def _take(x: Tensor, rows: slice | Tensor | None, dim: int = 1) -> Tensor:
    if rows is None:
        return x
    return x[(slice(None),) * dim + (rows,)] if isinstance(rows, slice) else x.index_select(dim, rows)


def _stacked(x: Tensor, n: int, dim: int = 1) -> Tensor:
    """``n`` equal parts of a dim side by side in the batch dim: ``[B, n * m, ...]`` as ``[B * n, m, ...]``."""
    return x if n == 1 else x.unflatten(dim, (n, -1)).movedim(dim, 1).flatten(0, 1)


def _unstacked(x: Tensor, n: int, dim: int = 1) -> Tensor:
    return x if n == 1 else x.unflatten(0, (-1, n)).movedim(1, dim).flatten(dim, dim + 1)


def _shares(part: Tensor, whole: Tensor) -> bool:
    """Whether a part is a view, so that what is written to it is written to the whole."""
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def _put(whole: Tensor, rows: slice | Tensor | None, part: Tensor, dim: int) -> None:
    """Writes rows back that were copied."""
    if isinstance(rows, Tensor):
        whole.index_copy_(dim, rows, part)
    else:
        _take(whole, rows, dim).copy_(part)


@contextmanager
def _acc_rows(acc: Partial, rows: slice | Tensor | None, n: int) -> Iterator[Partial]:
    """Rows of the accumulator, in ``n`` tiles: views, or copies that are written back."""
    part = Partial(_rows(acc.out, rows, n), _rows(acc.lse, rows, n, 2))
    yield part
    if not _shares(part.out, acc.out):
        _put(acc.out, rows, _unstacked(part.out, n), 1)
    if not _shares(part.lse, acc.lse):
        _put(acc.lse, rows, _unstacked(part.lse, n, 2), 2)


@contextmanager
def _grad_rows(grad: Tensor | None, rows: slice | Tensor | None, n: int, fresh: bool) -> Iterator[Tensor | None]:
    """Rows of a gradient to add into, or to write, in ``n`` tiles: a view, or a part that is added back, or written."""
    if grad is None:
        yield None
        return
    if not isinstance(rows, Tensor):
        view = _stacked(_take(grad, rows), n)
        if _shares(view, grad):
            yield view
            return
    size = grad.shape[1] if rows is None else len(rows) if isinstance(rows, Tensor) else _take(grad, rows).shape[1]
    shape = (grad.shape[0], size, *grad.shape[2:])
    part = _stacked(grad.new_empty(shape) if fresh else grad.new_zeros(shape), n)
    yield part
    whole = _unstacked(part, n)
    if fresh:
        _put(grad, rows, whole, 1)
    elif isinstance(rows, Tensor):
        grad.index_add_(1, rows, whole)  # a key may lie in several tiles
    else:
        _take(grad, rows).add_(whole)
