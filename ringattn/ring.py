"""The forward loop, the backward loop, and the thin autograd function around them.

Both loops walk the stages of a program. Before a stage computes, the keys of the next stage are posted
(and, backward, the gradients of the stage before); after it, they are waited for. The loops know no
mask, layout or schedule: those are in the program. Sums are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringattn.comm import Pending
from ringattn.kernels import Grads, Kernel, Rows
from ringattn.merge import Partial
from ringattn.program import Move, Program, Stage
from ringattn.scores import TileScores
from ringattn.tiles import Rows as RowIndex
from ringattn.tiles import Tile
from ringattn.wire import Link, add_rows, in_place, pack_rows, pack_shard, rows_kv

NOTHING = Stage(0, ())


@dataclass(frozen=True)
class Run:
    """One attention call on one rank: what to do, with what, and the softmax scale."""

    program: Program
    kernel: Kernel
    scale: float
    link: Link


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(q: Tensor, k: Tensor, v: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """``out`` in the dtype of ``q`` and ``lse`` ``[B, H, S]`` in the accumulator dtype."""
    batch, seqlen, num_heads, _ = q.shape
    start = Partial.empty if run.program.blank else Partial.unset
    acc = start(batch, seqlen, num_heads, v.shape[-1], accumulator_dtype(q.dtype), q.device)
    stages = run.program.stages
    held: Tensor | None = None
    for t, stage in enumerate(stages):
        arriving = _Exchange(run, f"forward step {t + 1}")
        fetched = arriving.fetch(t + 1, stages[t + 1] if t + 1 < len(stages) else NOTHING, k, v, held)
        pending = arriving.post()
        keys, values = (k, v) if t == 0 else _held_kv(held, k, v)
        for tile in stage.tiles:
            with _acc_rows(acc, tile) as rows:
                run.kernel.forward(
                    _take(q, tile.q),
                    _take(keys, tile.k),
                    _take(values, tile.k),
                    TileScores(tile.window, run.scale),
                    rows,
                    tile.fresh,
                )
        run.link.traffic.wait(pending)
        held = fetched
    return acc.out.to(q.dtype), acc.lse.to(acc.out.dtype)


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` in the dtypes of the inputs. K/V travel again; dK/dV come home as the program says.

    Where there is enough to hide, half of the own shard's heads are computed first, while the first keys
    arrive, and half last, while the last gradients come home.
    """
    wide = accumulator_dtype(q.dtype)
    delta = _delta(dout.to(wide), out, dlse) if run.kernel.reads_delta else None
    rows = Rows(q, dout, out, lse, delta, dlse)
    own = Grads(*(torch.zeros_like(x, dtype=wide) for x in (q, k, v)))  # laid in memory as the inputs are
    stages = run.program.stages
    held: Tensor | None = None
    left: Tensor | None = None  # gradients of the stage before, on their way out
    for t in range(len(stages) + 1):
        stage = stages[t] if t < len(stages) else NOTHING
        batch = _Exchange(run, f"backward step {t + 1}")
        fetched = batch.fetch(t + 1, stages[t + 1] if t + 1 < len(stages) else NOTHING, k, v, held)
        returned = batch.bring_home(t, stages[t - 1] if t else NOTHING, left, own)
        pending = batch.post()
        grads, gathered = own, None
        if 0 < t < len(stages) and stage.size:
            gathered = _zeros(run, f"grads {t % 2}", stage.size, k, v, wide)
            grads = Grads(own.dq, *rows_kv(gathered, k.shape[-1]))
        keys, values = (k, v) if t in (0, len(stages)) else _held_kv(held, k, v)
        for heads in _turn(t, run.program, k.shape[2]):
            for tile in (stages[0] if t == len(stages) else stage).tiles:
                _tile_backward(run, tile, heads, rows, keys, values, grads)
        run.link.traffic.wait(pending)
        for move, message in returned:
            _add_home(own, move, message) if move.home else add_rows(_present(gathered), move, message)
        held, left = fetched, gathered
    return own.dq.to(q.dtype), own.dk.to(k.dtype), own.dv.to(v.dtype)


def _delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """``rowsum(dout * out) - dlse``, ``[B, H, S]``: what the softmax's backward subtracts (D of FlashAttention-2)."""
    delta = (dout * out).sum(-1).transpose(1, 2).contiguous()
    return delta if dlse is None else delta - dlse


class _Exchange:
    """The messages of one batch, collected in plan order (keys, then gradients) and posted at once."""

    def __init__(self, run: Run, what: str) -> None:
        self.run, self.what = run, what
        self.batch: dict[str, tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]] = {}

    def fetch(self, t: int, stage: Stage, k: Tensor, v: Tensor, held: Tensor | None) -> Tensor | None:
        """Sends this rank's part of stage ``t``'s keys and receives its own: the buffer they arrive in."""
        sends, recvs = self._kind("kv")
        shape = (k.shape[0], k.shape[2], k.shape[3] + v.shape[3])
        packed: dict[tuple[tuple[int, int, int], ...], Tensor] = {}
        for i, move in enumerate(stage.kv_sends):
            ready = None if move.home else in_place(_present(held), move)
            if ready is None:
                rows = tuple((r.start, r.stop, r.step) for r in move.rows)
                if rows not in packed:  # the same rows may go to many ranks
                    buffer = self._take(f"kv out {t % 2} {i}", (move.tokens, *shape), k, k.dtype)
                    packed[rows] = (
                        pack_shard(k, v, move, buffer) if move.home else pack_rows(_present(held), move, buffer)
                    )
                ready = packed[rows]
            sends.append((ready, move.peer))
        if not stage.size:
            return None
        arriving = self._take(f"kv {t % 2}", (stage.size, *shape), k, k.dtype)
        recvs += [(arriving[move.rows[0]], move.peer) for move in stage.kv_recvs]
        return arriving

    def bring_home(self, t: int, stage: Stage, left: Tensor | None, own: Grads) -> list[tuple[Move, Tensor]]:
        """Sends the gradients of a stage on their way and receives those that come here."""
        sends, recvs = self._kind("grad")
        shape = (own.dk.shape[0], own.dk.shape[2], own.dk.shape[3] + own.dv.shape[3])
        for i, move in enumerate(stage.grad_sends):
            ready = in_place(_present(left), move)
            if ready is None:
                buffer = self._take(f"grad out {t % 2} {i}", (move.tokens, *shape), own.dk, own.dk.dtype)
                ready = pack_rows(_present(left), move, buffer)
            sends.append((ready, move.peer))
        returned = []
        for i, move in enumerate(stage.grad_recvs):
            buffer = self._take(f"grad in {t % 2} {i}", (move.tokens, *shape), own.dk, own.dk.dtype)
            recvs.append((buffer, move.peer))
            returned.append((move, buffer))
        return returned

    def post(self) -> Pending:
        sends, recvs = [], []
        for kind, (out, back) in self.batch.items():
            self.run.link.traffic.count(f"{self.what.split()[0]} {kind}", out, back)
            sends += out
            recvs += back
        return self.run.link.transport.post(sends, recvs, self.what)

    def _kind(self, kind: str) -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]:
        return self.batch.setdefault(kind, ([], []))

    def _take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        return self.run.link.workspace.take(name, shape, like, dtype)


def _zeros(run: Run, name: str, size: int, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (size, k.shape[0], k.shape[2], k.shape[3] + v.shape[3])
    return run.link.workspace.take(name, shape, k, dtype).zero_()


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a message refers to the buffer of a stage that holds nothing"
    return tensor


def _held_kv(held: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return (k[:, :0], v[:, :0]) if held is None else rows_kv(held, k.shape[-1])


def _add_home(own: Grads, move: Move, message: Tensor) -> None:
    dk, dv = rows_kv(message, own.dk.shape[-1])
    at = 0
    for rows in move.rows:
        part = own.dk[:, rows]
        n = part.shape[1]
        part.add_(dk[:, at : at + n])
        own.dv[:, rows].add_(dv[:, at : at + n])
        at += n


# -- tiles: rows are views where they are slices, and gathered where tokens are scattered ----------


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


def _turn(t: int, program: Program, kv_heads: int) -> list[slice]:
    """The KV heads computed at turn ``t`` of a backward pass; the last turn is the own shard's second."""
    first = (kv_heads + 1) // 2 if program.two_turns else kv_heads
    if t == 0:
        return [slice(0, first)]
    if t == len(program.stages):
        return [slice(first, kv_heads)] if first < kv_heads else []
    return [slice(0, kv_heads)]


def _tile_backward(run: Run, tile: Tile, heads: slice, rows: Rows, k: Tensor, v: Tensor, grads: Grads) -> None:
    group = rows.q.shape[2] // k.shape[2]
    rows = rows.heads(slice(heads.start * group, heads.stop * group))
    rows = rows.map(lambda x: _take(x, tile.q), lambda x: _take(x, tile.q, 2))
    with (
        _grad_rows(grads.dq[:, :, heads.start * group : heads.stop * group], tile.q) as dq,
        _grad_rows(grads.dk[:, :, heads], tile.k) as dk,
        _grad_rows(grads.dv[:, :, heads], tile.k) as dv,
    ):
        keys, values = _take(k[:, :, heads], tile.k), _take(v[:, :, heads], tile.k)
        run.kernel.backward(rows, keys, values, TileScores(tile.window, run.scale), Grads(dq, dk, dv))


class RingAttention(torch.autograd.Function):
    """``out, lse = RingAttention.apply(q, k, v, run)``: differentiable in both results."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        with torch.autocast(q.device.type, enabled=False):
            out, lse = forward(q, k, v, run)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.run = run
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("attention() is differentiable once: leave out create_graph=True")
        q, k, v, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            dout = torch.zeros_like(out) if dout is None else dout
            dout = dout if dout.stride(-1) == 1 else dout.contiguous()
            return (*backward(q, k, v, out, lse, dout, dlse, ctx.run), None)
