"""The roll: to each local token the value of the token a fixed distance further on in the whole sequence.

What predicts several tokens ahead needs its neighbours' embeddings, hidden states or labels, and under context
parallelism these may lie on another rank. Only the tokens that cross between shards travel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringattn.arguments.tensors import dim_of, fits, plain
from ringattn.arguments.values import LARGEST, boundaries, integer, shown
from ringattn.comm import together
from ringattn.context import ContextParallel
from ringattn.geometry.frames import Frame
from ringattn.geometry.layouts import Layout
from ringattn.geometry.spans import Ints, meeting
from ringattn.runtime.link import Link, Moved


def roll(
    cp: ContextParallel,
    local: Tensor,
    by: int,
    dim: int = 1,
    fill: float = 0,
    *,
    cu_seqlens: Iterable[int] | None = None,
) -> Tensor:
    """At each local token the value of the token ``by`` positions later in the sequence; every rank must call it.

    It is ``torch.roll(whole, -by, dim)``, sharded, with ``fill`` where that wraps around. Differentiable, any number
    of times; gradients take the way back, so backward too must run on every rank.

    Args:
        cp: the context by whose layout ``local`` is sharded.
        local: this rank's shard, ``local.size(dim) == cp.local_seqlen``, any dtype and strides.
        by: tokens; positive looks ahead, negative back, and it may exceed a shard or the sequence.
        dim: the dim of the tokens.
        fill: the value where the sequence has no such token.
        cu_seqlens: bounds of documents, from 0 to ``cp.seqlen``; then also where the document has no such token.

    Returns:
        A tensor of the shape, dtype and device of ``local``.

    Raises:
        ValueError: an argument that does not fit, or (at the first call of each kind) ranks that disagree.
        PeerError: a rank that did not take part within the deadline of the context.
    """
    if not isinstance(cp, ContextParallel):
        raise ValueError(f"cp={shown(cp)}: must be a ringattn.ContextParallel")
    with together(cp.link.transport, "roll"):
        dim, by, fill, bounds = _check(cp, local, by, dim, fill, cu_seqlens)
        way = _Way(cp.link, _facts(cp, local, by, dim, fill, bounds), _routes(cp.q_layout, cp.rank, by, bounds))
        return _Roll.apply(local, way, dim, fill)


def _check(
    cp: ContextParallel, local: Tensor, by: int, dim: int, fill: float, cu_seqlens: Iterable[int] | None
) -> tuple[int, int, float, tuple[int, ...]]:
    dim = dim_of(plain("local", local), dim)
    if local.size(dim) != cp.local_seqlen:
        raise ValueError(
            f"local.size({dim})={local.size(dim)} but local_seqlen={cp.local_seqlen}: roll() takes this rank's shard"
        )
    by = integer("by", by, -LARGEST, hint=", a number of tokens either way")
    fill = fits(local.dtype, fill)
    bounds = (0, cp.seqlen) if cu_seqlens is None else boundaries("cu_seqlens", cu_seqlens)
    if bounds[-1] != cp.seqlen:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]} but seqlen={cp.seqlen}: append {cp.seqlen}, or leave it out")
    return dim, by, fill, bounds


def _facts(
    cp: ContextParallel, local: Tensor, by: int, dim: int, fill: float, bounds: tuple[int, ...]
) -> dict[str, str]:
    """What must be alike on all ranks."""
    shape = [*local.shape]
    shape[dim] = -1
    documents = hashlib.sha256(np.array(bounds, np.int64).tobytes()).hexdigest()[:16]
    return {
        "layout": f"{cp.q_layout.name} {cp.q_layout.digest}",
        "by": f"{by}, fill {fill}",
        "documents": f"{len(bounds) - 1} (digest {documents})",
        "shapes": f"{shape}, {local.dtype} on {local.device.type}, tokens in dim {dim}",
        "gradient": "wanted" if local.requires_grad and torch.is_grad_enabled() else "not wanted",
    }


@dataclass(frozen=True)
class _Side:
    """Local rows, int64 on the CPU, those of one peer together and peers ascending, with ``(peer, rows)`` of each."""

    rows: Tensor
    peers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Routes:
    """Which local rows go where: ``leaving`` and ``arriving``, and ``here`` from row to row of this shard."""

    leaving: _Side
    arriving: _Side
    here: tuple[Tensor, Tensor]

    @property
    def back(self) -> _Routes:
        return _Routes(self.arriving, self.leaving, (self.here[1], self.here[0]))


def _routes(layout: Layout, rank: int, by: int, bounds: tuple[int, ...]) -> _Routes:
    """Tokens go from position ``p + by`` to ``p`` where both lie in one document."""
    frame, spans, holder = layout.frame(rank), layout.table[:, 1:], layout.table[:, 0]
    edges = np.array(bounds, np.int64)
    first, stop = edges[:-1] - min(by, 0), edges[1:] - max(by, 0)
    filled = np.stack((first, np.maximum(stop - first, 0), np.ones_like(first)), 1)  # positions with a source

    which, _, targets = meeting(frame.spans, filled)
    i, j, sources = meeting(_moved(targets, by), spans)
    arriving = _by_peer(holder[j], sources[:, 0], frame.local(_moved(sources, -by), which[i]))

    which, _, targets = meeting(spans, filled)
    i, j, sources = meeting(_moved(targets, by), frame.spans)
    leaving = _by_peer(holder[which[i]], sources[:, 0], frame.local(sources, j))
    return _Routes(_side(leaving, rank), _side(arriving, rank), (_rows(leaving, rank), _rows(arriving, rank)))


def _moved(spans: Ints, by: int) -> Ints:
    return spans + np.array([by, 0, 0], np.int64)


_ByPeer = dict[int, Ints]  # spans of local rows


def _by_peer(peer: Ints, source: Ints, rows: Ints) -> _ByPeer:
    """In the order of the sources' positions, which is how sender and receiver come to the same order."""
    order = np.lexsort((source, peer))
    return {int(p): rows[list(group)] for p, group in groupby(order, key=lambda i: peer[i])}


def _rows(spans: _ByPeer, peer: int) -> Tensor:
    return torch.from_numpy(Frame(spans.get(peer, np.empty((0, 3), np.int64))).positions())


def _side(spans: _ByPeer, rank: int) -> _Side:
    rows = {peer: _rows(spans, peer) for peer in spans if peer != rank}
    joined = torch.cat(list(rows.values())) if rows else torch.empty(0, dtype=torch.int64, device="cpu")
    return _Side(joined, tuple((peer, len(part)) for peer, part in rows.items()))


@dataclass(frozen=True)
class _Way:
    """What a roll and the rolls that are its gradients go by; ``name`` says which of them it is."""

    link: Link
    facts: dict[str, str]
    routes: _Routes
    name: str = "roll"

    @property
    def back(self) -> _Way:
        return _Way(self.link, self.facts, self.routes.back, f"backward of {self.name}")


def _move(local: Tensor, way: _Way, dim: int, fill: float) -> Tensor:
    """Carries it out. Messages have the tokens in front, ``[tokens, ...]``."""
    link, routes = way.link.timeline or way.link, way.routes
    with together(link.transport, way.name):
        facts = way.facts
        sort = way.name, facts["shapes"], facts["gradient"]
        link.begin(way.name, tuple(facts.items()), lambda: facts, local.device.type, sort=sort)
        leaving, arriving, here_from, here_to = (
            rows.to(local.device) for rows in (routes.leaving.rows, routes.arriving.rows, *routes.here)
        )
        out = local.index_select(dim, leaving).movedim(dim, 0).contiguous()
        back = out.new_empty((len(arriving), *out.shape[1:]))
        sends, recvs = _parcels(out, routes.leaving), _parcels(back, routes.arriving)
        link.traffic.count([Moved.of("roll", sends, recvs)])
        pending = link.transport.post(sends, recvs, f"roll along dim {dim}")
        rolled = torch.full_like(local, fill, memory_format=torch.contiguous_format)
        rolled.index_copy_(dim, here_to, local.index_select(dim, here_from))
        link.wait(pending)
        link.finish(local.device.type)
    return rolled.index_copy_(dim, arriving, back.movedim(0, dim))


def _parcels(rows: Tensor, side: _Side) -> list[tuple[Tensor, int]]:
    parts = rows.split([count for _, count in side.peers])
    return [(part, peer) for part, (peer, _) in zip(parts, side.peers, strict=True)]


class _Roll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, way: _Way, dim: int, fill: float) -> Tensor:
        ctx.way, ctx.dim = way, dim
        return _move(local, way, dim, fill)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # A token is read by one token at most, so the gradient too is moved and not summed.
        return _Roll.apply(grad, ctx.way.back, ctx.dim, 0), None, None, None
