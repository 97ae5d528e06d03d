"""The forward loop and the backward loop.

Both walk the stages of a program. Before a stage computes, the keys of the next stage are posted (and,
backward, the gradients of the stage before); after it, they are waited for. The loops know no mask, layout or
schedule: those are in the program. Sums are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.kernels import Grads, Kernel, Rows
from ringattn.layouts import Frame
from ringattn.merge import Partial, add_sinks
from ringattn.program import Program, Stage
from ringattn.scores import Place, Scores, TileScores
from ringattn.tiles import Rows as RowIndex
from ringattn.tiles import Tile
from ringattn.wire import Batch, Link, add_rows, add_shard, present, rows_kv


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


def forward(q: Tensor, k: Tensor, v: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """``out`` in the dtype of ``q`` and ``lse`` ``[B, H, S]`` in the accumulator dtype."""
    batch, seqlen, num_heads, _ = q.shape
    start = Partial.empty if run.program.blank else Partial.unset
    acc = start(batch, seqlen, num_heads, v.shape[-1], accumulator_dtype(q.dtype), q.device)
    held: Tensor | None = None
    for t, stage in enumerate(run.program.stages):
        messages = Batch(run.link, "forward", t + 1)
        fetched = messages.fetch(run.stage(t + 1), k, v, held)
        pending = messages.post()
        area = Area(run, run.program.q_frame, stage.frame, stage.kv_heads(k.shape[2]), q.shape[2] // k.shape[2])
        keys, values = (k, v) if t == 0 else _held_kv(held, k, v)
        for tile in stage.tiles:
            area.forward(tile, q, keys, values, acc)
        run.link.traffic.wait(pending)
        held = fetched
    if run.sinks is not None:
        add_sinks(acc, run.sinks)
    return acc.out.to(q.dtype), acc.lse.to(acc.out.dtype)


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` in the dtypes of the inputs. K/V travel again; dK/dV come home as the program says.

    Where there is enough to hide, half of the own shard's heads are computed first, while the first keys
    arrive, and half last, while the last gradients come home.
    """
    wide = accumulator_dtype(q.dtype)
    delta = row_delta(dout.to(wide), out, dlse) if run.kernel.reads_delta else None
    rows = Rows(q, dout, out, lse, delta, dlse)
    own = Grads(*(torch.zeros_like(x, dtype=wide) for x in (q, k, v)))  # laid in memory as the inputs are
    turns, group = len(run.program.stages), q.shape[2] // k.shape[2]
    held: Tensor | None = None
    left: Tensor | None = None  # gradients of the stage before, on their way out
    for t in range(turns + 1):
        messages = Batch(run.link, "backward", t + 1)
        fetched = messages.fetch(run.stage(t + 1), k, v, held)
        returned = messages.bring_home(run.stage(t - 1), left, own.dk, own.dv)
        pending = messages.post()
        stage, heads = run.program.stages[t % turns], _turn(t, run.program, k.shape[2])
        gathered = _zeros(run, f"grads {t % 2}", stage, k, v, wide) if 0 < t < turns and stage.size else None
        keys, values = _held_kv(held, k, v) if 0 < t < turns else (k[:, :, heads], v[:, :, heads])
        grads = own.kv_heads(heads) if gathered is None else Grads(own.dq, *rows_kv(gathered, k.shape[-1]))
        area = Area(run, run.program.q_frame, stage.frame, heads, group)
        for tile in stage.tiles if keys.shape[2] else ():
            area.backward(tile, rows, keys, values, grads)
        if gathered is not None:
            _add_copies(stage, gathered, own.kv_heads(heads))
        run.link.traffic.wait(pending)
        for move, message in returned:
            if move.home:
                home = own.kv_heads(run.program.stages[t - 1].kv_heads(k.shape[2]))
                add_shard(home.dk, home.dv, move, message)
            else:
                add_rows(present(gathered), move, message)
        held, left = fetched, gathered
    return own.dq.to(q.dtype), own.dk.to(k.dtype), own.dv.to(v.dtype)


def row_delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """``rowsum(dout * out) - dlse``, ``[B, H, S]``: what the softmax's backward subtracts (D of FlashAttention-2)."""
    delta = (dout * out).sum(-1).transpose(1, 2).contiguous()
    return delta if dlse is None else delta - dlse


def _turn(t: int, program: Program, kv_heads: int) -> slice:
    """The KV heads computed at turn ``t`` of a backward pass; the last turn is the own shard's second."""
    first = (kv_heads + 1) // 2 if program.two_turns else kv_heads
    if t == 0:
        return slice(0, first)
    return slice(first, kv_heads) if t == len(program.stages) else program.stages[t].kv_heads(kv_heads)


def _zeros(run: Run, name: str, stage: Stage, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    heads = stage.kv_heads(k.shape[2])
    shape = (stage.size, k.shape[0], heads.stop - heads.start, k.shape[3] + v.shape[3])
    return run.link.workspace.take(name, shape, k, dtype).zero_()


def _held_kv(held: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return (k[:, :0], v[:, :0]) if held is None else rows_kv(held, k.shape[-1])


def _add_copies(stage: Stage, gathered: Tensor, own: Grads) -> None:
    """Gradients of the rank's own keys that lay in the buffer."""
    for home, here in stage.copies:
        dk, dv = rows_kv(gathered[here], own.dk.shape[-1])
        own.dk[:, home].add_(dk)
        own.dv[:, home].add_(dv)


# -- tiles: rows are views where they are slices, and gathered where tokens are scattered ----------


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
