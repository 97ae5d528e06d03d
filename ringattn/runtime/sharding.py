"""Sharding: between a tensor that every rank holds whole and each rank's tokens of it, differentiably.

The semantics are those of replication: the backward of a shard gathers, the backward of a gather slices,
so that gradients equal one process's on every rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ringattn.arguments.tensors import dim_of, plain
from ringattn.arguments.values import shown
from ringattn.comm import together, told
from ringattn.geometry.frames import Frame
from ringattn.geometry.layouts import Layout
from ringattn.runtime.link import Link, Moved

GRADIENTS = ("whole", "share")


def shard(link: Link, layout: Layout, x: Tensor, dim: int, name: str, grad: str) -> Tensor:
    """This rank's part of ``x`` along ``dim``; ``name`` is the length in error texts."""
    with told(link.transport, "shard"):
        at = dim_of(plain("x", x), dim)
        if grad not in GRADIENTS:
            raise ValueError(f"grad={shown(grad)}: must be one of {', '.join(GRADIENTS)}")
        if x.size(at) != layout.seqlen:
            raise ValueError(f"x.size({dim})={x.size(at)} but {name}={layout.seqlen}: shard() takes the whole sequence")
        return _Shard.apply(x, link, layout, at, grad)


def unshard(link: Link, layout: Layout, local: Tensor, dim: int, name: str) -> Tensor:
    """The whole tensor from every rank's part along ``dim``."""
    with together(link.transport, "unshard"):
        at = dim_of(plain("local", local), dim)
        size = int(layout.sizes[link.transport.rank])
        if local.size(at) != size:
            raise ValueError(f"local.size({dim})={local.size(at)} but {name}={size}: unshard() takes this rank's shard")
        return _Unshard.apply(local, link, layout, at)


def position_ids(frame: Frame, offset: int) -> Tensor:
    """The global position of every local index, plus the offset, int64 on the CPU."""
    with torch.inference_mode(False):  # kept, and later used where gradients are wanted
        return torch.from_numpy(frame.positions() + offset)


def _slices(frame: Frame) -> list[slice]:
    return [slice(s, s + (n - 1) * step + 1, step) for s, n, step in frame.spans.tolist()]


def _pick(x: Tensor, frame: Frame, dim: int) -> Tensor:
    parts = [x[(slice(None),) * dim + (rows,)] for rows in _slices(frame)]
    return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0).clone()


def _spread(local: Tensor, frame: Frame, seqlen: int, dim: int) -> Tensor:
    """A shard at its place in zeros of the whole length; differentiable."""
    rows = torch.from_numpy(frame.positions()).to(local.device)
    shape = [*local.shape]
    shape[dim] = seqlen
    return local.new_zeros(shape).index_copy(dim, rows, local)


def _gather(local: Tensor, link: Link, layout: Layout, dim: int, name: str) -> Tensor:
    """Every rank's shard put in global order, the sequence moved to the front for the wire."""
    transport = link.transport
    with together(transport, name):
        calls, mine = link.timeline or link, local.movedim(dim, 0).resolve_conj().resolve_neg().contiguous()
        what = (layout.digest, *(sort := (tuple(mine.shape[1:]), mine.dtype, dim)))
        facts = partial(_facts, what)
        calls.begin(name, what, facts, mine.device.type, sort=(name, sort))
        others = [r for r in range(transport.world_size) if r != transport.rank]
        parts = {r: mine.new_empty((int(layout.sizes[r]), *mine.shape[1:])) for r in others}
        sends, recvs = (
            [(mine, r) for r in others if mine.numel()],
            [(parts[r], r) for r in others if parts[r].numel()],
        )
        link.traffic.count([Moved.of("unshard", sends, recvs)])
        calls.wait(transport.post(sends, recvs, "all shards"))
        whole = _assembled({**parts, transport.rank: mine}, layout)
        calls.finish(mine.device.type)
    return whole.movedim(0, dim)


def _assembled(parts: dict[int, Tensor], layout: Layout) -> Tensor:
    """The shards of all ranks, by rank, tokens first, in global order."""
    some = next(iter(parts.values()))
    whole = some.new_empty((layout.seqlen, *some.shape[1:]))
    for rank, part in parts.items():
        at = 0
        for rows in _slices(layout.frame(rank)):
            n = len(range(rows.start, rows.stop, rows.step))
            whole[rows] = part[at : at + n]
            at += n
    return whole


def _facts(what: tuple[object, ...]) -> dict[str, str]:
    return dict(zip(("layout", "shape of a token", "dtype", "dim of the tokens"), map(str, what), strict=True))


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, link: Link, layout: Layout, dim: int, grad: str) -> Tensor:
        ctx.link, ctx.layout, ctx.dim, ctx.grad = link, layout, dim, grad
        return _pick(x, layout.frame(link.transport.rank), dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad == "whole":
            whole = _gather(grad, ctx.link, ctx.layout, ctx.dim, "backward of shard")
        else:
            with together(ctx.link.transport, "backward of shard"):
                whole = _spread(grad, ctx.layout.frame(ctx.link.transport.rank), ctx.layout.seqlen, ctx.dim)
        return whole, None, None, None, None


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, link: Link, layout: Layout, dim: int) -> Tensor:
        ctx.link, ctx.layout, ctx.dim = link, layout, dim
        return _gather(local, link, layout, dim, "unshard")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with together(ctx.link.transport, "backward of unshard"):
            mine = _pick(grad, ctx.layout.frame(ctx.link.transport.rank), ctx.dim)
        return mine, None, None, None
