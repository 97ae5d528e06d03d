"""The head all-to-all: between a rank's own tokens of all heads, and all tokens of its team of its own heads.

Of every tensor each member receives the heads that it computes, once, straight into the memory where they are computed
from; results and gradients go back the same way. What several members have computed of one KV head is added up where
it belongs, in the dtype of the accumulators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.kernels.scores import Scores
from ringattn.planning.heads import HeadShare, Split
from ringattn.runtime.link import Link, Moved
from ringattn.runtime.wire import Kind

Slices = tuple[slice, ...]
Given = tuple[Tensor, Tensor, Tensor, Tensor | None, Scores]  # q, k, v, sinks, and how logits are made
Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]  # q, k, v, out, lse, dout, dlse
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Scores], tuple[Tensor, Tensor]]
Differentiate = Callable[[Saved, Scores, Sequence[torch.dtype]], tuple[Tensor, ...]]


class Batch(NamedTuple):
    """The messages of an all-to-all."""

    what: str
    sends: list[tuple[Tensor, int]]
    recvs: list[tuple[Tensor, int]]
    moved: list[Moved]


class Axis(NamedTuple):
    """Which tokens each member of a team holds, of those it holds together, and which heads each of them computes."""

    tokens: Slices
    heads: Slices

    @property
    def shared(self) -> bool:
        """Whether members compute the same heads, so that what they found is added up."""
        return any(a.stop > b.start for a, b in pairwise(self.heads))


@dataclass(frozen=True, eq=False)
class HeadSwap:
    """The all-to-all of a call of one kind. ``q_sizes``, ``k_sizes``: the queries and keys that each member holds."""

    split: Split
    shares: tuple[HeadShare, ...]
    q_sizes: Sequence[int]
    k_sizes: Sequence[int]

    @property
    def share(self) -> HeadShare:
        """What this rank computes."""
        return self.shares[self.split.member]

    @property
    def queries(self) -> Axis:
        return Axis(_runs(self.q_sizes), tuple(share.queries for share in self.shares))

    @property
    def keys(self) -> Axis:
        return Axis(_runs(self.k_sizes), tuple(share.keys for share in self.shares))

    def biases(self, heads: int) -> Axis:
        """That of a bias, whose heads are the queries', or one for all of them."""
        return self.queries if heads > 1 else Axis(_runs(self.q_sizes), (slice(0, 1),) * self.split.ulysses)

    def forward(self, link: Link, given: Given, attend: Attend) -> tuple[Tensor, Tensor]:
        """``out`` and ``lse`` of the own tokens, with what ``attend`` finds for the team's tokens and the own heads."""
        q, k, v, sinks, scores = given
        axes = (q, self.queries), (k, self.keys), (v, self.keys)
        tensors, scores = self._team(link, "forward", axes, scores)
        own = None if sinks is None else sinks[self.share.queries]
        out, lse = attend(*self._spread(*tensors), own, scores)
        like = q.new_empty((*q.shape[:3], v.shape[3])), lse.new_empty((*q.shape[:3], 1))
        found = (out, self.queries, like[0]), (_column(lse), self.queries, like[1])
        out, lse = self.scatter(link, "forward", found)
        return out, lse.squeeze(3).transpose(1, 2).contiguous()

    def backward(self, link: Link, saved: Saved, scores: Scores, differentiate: Differentiate) -> tuple[Tensor, ...]:
        """``dq, dk, dv`` of the own tokens. Adds to ``scores.dbias`` where there is one."""
        q, k, v, out, lse, dout, dlse = saved
        axes = [(q, self.queries), (k, self.keys), (v, self.keys), (out, self.queries), (_column(lse), self.queries)]
        axes += [(dout, self.queries), *([] if dlse is None else [(_column(dlse), self.queries)])]
        (q_, k_, v_, out_, lse_, dout_, *dlse_), inner = self._team(link, "backward", axes, scores)
        k_, v_ = self._spread(q_, k_, v_)[1:]
        rows = [_row(x) for x in (lse_, *dlse_)]
        kept = torch.float64 if q.dtype == torch.float64 else torch.float32
        dtypes = q.dtype, *((kept if self.keys.shared or self.share.of else q.dtype,) * 2)
        dq, dk, dv = differentiate((q_, k_, v_, out_, rows[0], dout_, rows[1] if dlse_ else None), inner, dtypes)
        dk, dv = self._summed(dk), self._summed(dv)
        found = [(dq, self.queries, q), (dk, self.keys, k), (dv, self.keys, v)]
        if scores.dbias is not None and inner.dbias is not None:
            axis = self.biases(scores.dbias.shape[1])
            found.append((inner.dbias.transpose(1, 2), axis, scores.dbias.transpose(1, 2)))
        grads = self.scatter(link, "backward", found)
        if scores.dbias is not None:
            scores.dbias.add_(grads.pop().transpose(1, 2))
        return tuple(grads)

    def _team(
        self, link: Link, what: str, axes: Sequence[tuple[Tensor, Axis]], scores: Scores
    ) -> tuple[list[Tensor], Scores]:
        """The team's tokens, and scores for them."""
        if scores.bias is None:
            return self.gather(link, what, axes), scores
        bias = scores.bias.transpose(1, 2), self.biases(scores.bias.shape[1])
        *found, whole = self.gather(link, what, (*axes, bias))
        whole = whole.transpose(1, 2)
        dbias = None if scores.dbias is None else torch.zeros_like(whole, dtype=scores.dbias.dtype)
        return found, replace(scores, bias=whole, dbias=dbias)

    def _spread(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values as they are computed with: one for each query head, where KV heads serve unequal numbers."""
        if self.share.of is None:
            return q, k, v
        of = torch.tensor(self.share.of, device=k.device)
        return q, k.index_select(2, of), v.index_select(2, of)

    def _summed(self, grad: Tensor) -> Tensor:
        """The gradients of what :meth:`_spread` has spread."""
        if self.share.of is None:
            return grad
        shape = list(grad.shape)
        shape[2] = self.share.keys.stop - self.share.keys.start
        return grad.new_zeros(shape).index_add_(2, torch.tensor(self.share.of, device=grad.device), grad)

    def gather(self, link: Link, what: str, given: Sequence[tuple[Tensor, Axis]]) -> list[Tensor]:
        """Tensors ``[batch, own tokens, all heads, width]`` as ``[batch, the team's tokens, own heads, width]``, in
        buffers that the next call uses again."""
        batch, found = Batch(f"{what} heads in", [], [], []), []
        for number, (x, axis) in enumerate(given):
            rows, width = axis.tokens[-1].stop, x.shape[3]
            own = axis.heads[self.split.member]
            whole = _buffer(link, f"team {number}", (rows, x.shape[0], own.stop - own.start, width), x)
            for member, peer in enumerate(self.split.team):
                part = x[:, :, axis.heads[member]].transpose(0, 1)
                if peer == self.split.rank:
                    whole[axis.tokens[member]].copy_(part)
                    continue
                packed = _buffer(link, f"heads {number} to {member}", part.shape, x).copy_(part)
                batch.sends.append((packed, peer))
                batch.recvs.append((whole[axis.tokens[member]], peer))
            found.append(whole.transpose(0, 1))
        _exchange(link, batch, what)
        return found

    def scatter(self, link: Link, what: str, computed: Sequence[tuple[Tensor, Axis, Tensor]]) -> list[Tensor]:
        """The way back. Each tensor comes with one like which the result is laid in memory."""
        batch, here = Batch(f"{what} heads out", [], [], []), []
        for number, (x, axis, like) in enumerate(computed):
            parts = []
            for member, peer in enumerate(self.split.team):
                part = x[:, axis.tokens[member]].transpose(0, 1)
                if peer == self.split.rank:
                    parts.append(part)
                    continue
                packed = _buffer(link, f"tokens {number} to {member}", part.shape, x).copy_(part)
                theirs = axis.heads[member]
                shape = like.shape[1], x.shape[0], theirs.stop - theirs.start, x.shape[3]
                parts.append(_buffer(link, f"tokens {number} from {member}", shape, x))
                batch.sends.append((packed, peer))
                batch.recvs.append((parts[-1], peer))
            here.append(parts)
        _exchange(link, batch, what)
        return [_joined(parts, axis, x, like) for parts, (x, axis, like) in zip(here, computed, strict=True)]


class Seat(NamedTuple):
    """From where a rank computes calls of one kind: the ranks of its ring in order, and what it does before and after
    where heads are split."""

    ring: Sequence[int]
    swap: HeadSwap | None = None

    def computed(self, kind: Kind) -> Kind:
        """The kind of what this rank computes."""
        if self.swap is None:
            return kind
        heads, kv_heads = self.swap.share.sizes
        return kind._replace(num_heads=heads, num_kv_heads=kv_heads)

    def kv_heads(self, kind: Kind) -> int:
        """The most KV heads that a rank computes with."""
        return kind.num_kv_heads if self.swap is None else max(share.sizes[1] for share in self.swap.shares)

    @property
    def first_head(self) -> int:
        """The query head at which this rank's begin."""
        return 0 if self.swap is None else self.swap.share.queries.start


def _joined(parts: Sequence[Tensor], axis: Axis, x: Tensor, like: Tensor) -> Tensor:
    """All heads of the own tokens, in the dtype in which they are to be kept."""
    make = torch.zeros_like if axis.shared else torch.empty_like
    whole = make(like, dtype=x.dtype if axis.shared else like.dtype)
    for part, heads in zip(parts, axis.heads, strict=True):
        home, found = whole[:, :, heads], part.transpose(0, 1)
        home.add_(found) if axis.shared else home.copy_(found)
    return whole.to(like.dtype)


def _exchange(link: Link, batch: Batch, what: str) -> None:
    sends, recvs = ([entry for entry in side if entry[0].numel()] for side in (batch.sends, batch.recvs))
    pending = link.post(Batch(batch.what, sends, recvs, [Moved.of(f"{what} heads", sends, recvs)]))
    if pending is not None:
        link.wait(pending)


def _buffer(link: Link, slot: str, shape: Sequence[int], like: Tensor) -> Tensor:
    link.workspace.reserve(slot, torch.Size(shape).numel(), like.dtype, like.device)
    return link.workspace.view(slot, shape, like.dtype, like.device)


def _column(x: Tensor) -> Tensor:
    """Numbers of rows, ``[batch, heads, tokens]``, as a tensor of one column."""
    return x.transpose(1, 2).unsqueeze(3)


def _row(x: Tensor) -> Tensor:
    return x.squeeze(3).transpose(1, 2)


def _runs(sizes: Sequence[int]) -> Slices:
    return tuple(slice(a, b) for a, b in pairwise(accumulate(sizes, initial=0)))
