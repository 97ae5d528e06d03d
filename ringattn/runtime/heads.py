"""The head all-to-all: between a rank's own tokens of all heads, and all tokens of its team of its own heads.

Of every tensor each member receives the heads that it computes, once, straight into the memory where they are computed
from; results and gradients go back the same way. What several members have computed of one KV head is added up where
it belongs, in the dtype of the accumulators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.kernels.scores import Scores
from ringattn.planning.heads import HeadShare, Split, head_chunks, head_shares
from ringattn.planning.wanted import Wanted
from ringattn.runtime.link import Expected, Messages, Moved
from ringattn.runtime.wire import Kind

ALIGNED = 64  # numbers: where tensors that share a block begin
Slices = tuple[slice, ...]
Given = tuple[Tensor, Tensor, Tensor, Tensor | None, Scores]  # q, k, v, sinks, and how logits are made
Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]  # q, k, v, out, lse, dout, dlse
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Scores], tuple[Tensor, Tensor]]
Differentiate = Callable[[Saved, Scores, Sequence[torch.dtype]], tuple[Tensor | None, ...]]


class Batch(NamedTuple):
    """Messages between turns: those of an all-to-all, and others of no program."""

    what: str
    sends: list[tuple[Tensor, int]]
    recvs: list[tuple[Tensor, int]]
    moved: list[Moved]
    expected: Sequence[Expected] = ()  # of all positions that the other members hold


class Axis(NamedTuple):
    """Which tokens each member of a team holds, of those it holds together, and which heads each of them computes.
    ``sums``: of some heads several find a part, so these are added up."""

    tokens: Slices
    heads: Slices
    sums: bool = False


@dataclass(frozen=True, eq=False)
class HeadSwap:
    """The all-to-all of a chunk of heads, in calls of one kind.

    shares: what each member computes. ``sizes``: the queries and the keys that each member holds. ``sums``: some KV
    heads are in several shares, of this chunk or of others. ``chunk``: its number, and of how many.
    """

    split: Split
    shares: tuple[HeadShare, ...]
    sizes: Sequence[Sequence[int]]
    sums: bool
    chunk: tuple[int, int]

    @cached_property
    def share(self) -> HeadShare:
        """What this rank computes."""
        return self.shares[self.split.member]

    @cached_property
    def queries(self) -> Axis:
        return Axis(_runs(self.sizes[0]), tuple(share.queries for share in self.shares))

    @cached_property
    def keys(self) -> Axis:
        return Axis(_runs(self.sizes[1]), tuple(share.keys for share in self.shares), self.sums)

    def biases(self, heads: int) -> Axis:
        """That of a bias, whose heads are the queries', or one for all of them."""
        return self.queries if heads > 1 else Axis(_runs(self.sizes[0]), (slice(0, 1),) * self.split.ulysses, True)

    def forward(self, link: Messages, given: Given, attend: Attend, homes: Sequence[Tensor]) -> None:
        """``out`` and ``lse`` of the own tokens and the chunk's heads, with what ``attend`` finds for the team's tokens
        and the own heads. ``homes``: where they belong, the lse as one column."""
        q, k, v, sinks, scores = given
        axes = (q, self.queries), (k, self.keys), (v, self.keys)
        tensors, scores = self._team(link, "forward", axes, scores)
        own = None if sinks is None else sinks[self.share.queries]
        out, lse = attend(*self._spread(*tensors), own, scores)
        self.scatter(link, "forward", [(out, self.queries, homes[0]), (column(lse), self.queries, homes[1])])

    def backward(
        self, link: Messages, saved: Saved, scores: Scores, differentiate: Differentiate, homes: Sequence[Tensor | None]
    ) -> None:
        """Their gradients, written to ``homes``, or added where several members or chunks find a part: those of dq, dk
        and dv that have one, as they are wanted, and of the bias in ``scores`` where it has one."""
        q, k, v, out, lse, dout, dlse = saved
        axes = [(q, self.queries), (k, self.keys), (v, self.keys), (out, self.queries), (column(lse), self.queries)]
        axes += [(dout, self.queries), *([] if dlse is None else [(column(dlse), self.queries)])]
        (q_, k_, v_, out_, lse_, dout_, *dlse_), inner = self._team(link, "backward", axes, scores)
        q_, k_, v_ = self._spread(q_, k_, v_)
        rows = [row(x) for x in (lse_, *dlse_)]
        dtypes = [q.dtype if home is None else home.dtype for home in homes]
        dq, dk, dv = differentiate((q_, k_, v_, out_, rows[0], dout_, rows[1] if dlse_ else None), inner, dtypes)
        wanted = (
            (dq, self.queries, homes[0]),
            (self._summed(dk), self.keys, homes[1]),
            (self._summed(dv), self.keys, homes[2]),
        )
        found = [(x, axis, home) for x, axis, home in wanted if x is not None and home is not None]
        if scores.dbias is not None and inner.dbias is not None:
            axis = self.biases(scores.dbias.shape[1])
            found.append((inner.dbias.transpose(1, 2), axis, scores.dbias.transpose(1, 2)))
        self.scatter(link, "backward", found)

    def _team(
        self, link: Messages, what: str, axes: Sequence[tuple[Tensor, Axis]], scores: Scores
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
        counts = self._served
        k, v = (torch.cat([x[:, :, at : at + 1].expand(-1, -1, n, -1) for at, n in counts], 2) for x in (k, v))
        return q, k, v

    def _summed(self, grad: Tensor | None) -> Tensor | None:
        """The gradients of what :meth:`_spread` has spread."""
        if self.share.of is None or grad is None:
            return grad
        return torch.stack([part.sum(2) for part in grad.split([n for _, n in self._served], 2)], 2)

    @cached_property
    def _served(self) -> list[tuple[int, int]]:
        """Of each KV head how many query heads need it."""
        return sorted(Counter(self.share.of or ()).items())

    def gather(self, link: Messages, what: str, given: Sequence[tuple[Tensor, Axis]]) -> list[Tensor]:
        """Tensors ``[batch, own tokens, all heads, width]`` as ``[batch, the team's tokens, own heads, width]``, in
        buffers that the next call uses again."""
        batch, own_parts = self._batch(what, "in"), []
        wanted = [(self._team_shape(x, axis), x) for x, axis in given]
        parts = [x[:, :, axis.heads[m]].transpose(0, 1) for m in self._others for x, axis in given]
        buffers = _buffers(link, "heads in", [*wanted, *((part.shape, part) for part in parts)])
        wholes, packed = buffers[: len(given)], iter(zip(buffers[len(given) :], parts, strict=True))
        for member in self._others:
            for whole, (_, axis) in zip(wholes, given, strict=True):
                buffer, part = next(packed)
                batch.sends.append((buffer.copy_(part), self.split.team[member]))
                batch.recvs.append((whole[axis.tokens[member]], self.split.team[member]))
        for whole, (x, axis) in zip(wholes, given, strict=True):
            home = whole[axis.tokens[self.split.member]].transpose(0, 1)
            own_parts.append((home, x[:, :, axis.heads[self.split.member]], False))
        with _exchanged(link, batch, what):
            _bring_home(own_parts)
        return [whole.transpose(0, 1) for whole in wholes]

    def scatter(self, link: Messages, what: str, computed: Sequence[tuple[Tensor, Axis, Tensor]]) -> None:
        """The way back: each tensor comes with its home, of the own tokens and all heads, which is written to, or added
        to."""
        batch, others, own = self._batch(what, "out"), [], self.split.member
        parts = [x[:, axis.tokens[m]].transpose(0, 1) for m in self._others for x, axis, _ in computed]
        homes = [home[:, :, axis.heads[m]].transpose(0, 1) for m in self._others for _, axis, home in computed]
        shapes = [home.shape for home in homes]
        wanted = [*((part.shape, part) for part in parts), *zip(shapes, parts, strict=True)]
        buffers = _buffers(link, "heads out", wanted)
        rows = zip(buffers[: len(parts)], parts, buffers[len(parts) :], homes, strict=True)
        ends = [(self.split.team[m], axis.sums) for m in self._others for _, axis, _ in computed]
        for (packed, part, theirs, home), (peer, sums) in zip(rows, ends, strict=True):
            batch.sends.append((packed.copy_(part), peer))
            batch.recvs.append((theirs, peer))
            others.append((home, theirs, sums))
        with _exchanged(link, batch, what):
            _bring_home(
                [(home[:, :, axis.heads[own]], x[:, axis.tokens[own]], axis.sums) for x, axis, home in computed]
            )
        _bring_home(others)

    @cached_property
    def _others(self) -> list[int]:
        """The other members."""
        return [member for member in range(self.split.ulysses) if member != self.split.member]

    def _team_shape(self, x: Tensor, axis: Axis) -> tuple[int, ...]:
        own = axis.heads[self.split.member]
        return axis.tokens[-1].stop, x.shape[0], own.stop - own.start, x.shape[3]

    def _batch(self, what: str, way: str) -> Batch:
        number, count = self.chunk
        return Batch(f"{what} heads {way}" + (f", chunk {number + 1} of {count}" if count > 1 else ""), [], [], [])


class Seat(NamedTuple):
    """From where a rank computes calls of one kind: the ranks of its ring in order, and what it does before and after
    where heads are split or go by chunks."""

    ring: Sequence[int]
    swap: HeadSwap | None = None

    def computed(self, kind: Kind) -> Kind:
        """The kind of what this rank computes."""
        if self.swap is None:
            return kind
        heads, kv_heads = self.swap.share.sizes
        return kind._replace(num_heads=heads, num_kv_heads=kv_heads)

    def kv_heads(self, kind: Kind) -> int:
        """The most KV heads that a member computes with."""
        return kind.num_kv_heads if self.swap is None else max(share.sizes[1] for share in self.swap.shares)

    @property
    def first_head(self) -> int:
        """The query head at which this rank's begin."""
        return 0 if self.swap is None else self.swap.share.queries.start


def seats(split: Split, kind: Kind, count: int, sizes: Sequence[Sequence[int]]) -> tuple[Seat, ...]:
    """From where a rank computes the chunks of a call of a kind, of which there are ``count``. ``sizes``: the queries
    and the keys that each member of its team holds."""
    if split.ulysses == count == 1:
        return (Seat(split.ring),)
    shares = head_shares(kind.num_heads, kind.num_kv_heads, split.ulysses)
    chunks = head_chunks(shares, kind.num_heads // kind.num_kv_heads, count)
    computed = sum(share.keys.stop - share.keys.start for chunk in chunks for share in chunk)
    sums = computed > kind.num_kv_heads
    return tuple(
        Seat(split.ring, HeadSwap(split, chunk, sizes, sums, (number, count))) for number, chunk in enumerate(chunks)
    )


def homes_of_results(q: Tensor, v: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where ``out``, and ``lse`` as one column, are written to."""
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty((*q.shape[:3], 1), dtype=wide)


def homes_of_gradients(
    swap: HeadSwap, inputs: Sequence[Tensor], wide: torch.dtype, wanted: Wanted
) -> list[Tensor | None]:
    """Where ``dq, dk, dv`` are written to, or added up, laid in memory as the inputs are, as far as they are wanted."""
    q, *keys = inputs
    made = [torch.empty_like(q) if wanted.q else None]
    for x, asked in zip(keys, (wanted.k, wanted.v), strict=True):
        home = torch.zeros_like(x, dtype=wide) if swap.sums else torch.empty_like(x)
        made.append(home if asked else None)
    return made


@contextmanager
def _exchanged(link: Messages, batch: Batch, what: str) -> Iterator[None]:
    """Messages that are under way while something else is done."""
    sends, recvs = ([entry for entry in side if entry[0].numel()] for side in (batch.sends, batch.recvs))
    pending = link.post(Batch(batch.what, sends, recvs, [Moved.of(f"{what} heads", sends, recvs)]))
    yield
    if pending is not None:
        link.wait(pending)


def _bring_home(parts: Sequence[tuple[Tensor, Tensor, bool]]) -> None:
    """Writes parts where they belong, or adds them."""
    for home, found, sums in parts:
        home.add_(found) if sums else home.copy_(found)


def _buffers(link: Messages, slot: str, wanted: Sequence[tuple[Sequence[int], Tensor]]) -> list[Tensor]:
    """Memory for tensors of these shapes, of the dtypes of others, side by side in one block for each dtype."""
    sizes = [-(-torch.Size(shape).numel() // ALIGNED) * ALIGNED for shape, _ in wanted]
    totals: Counter[torch.dtype] = Counter()
    for size, (_, like) in zip(sizes, wanted, strict=True):
        totals[like.dtype] += size
    blocks = {}
    for dtype, total in totals.items():
        device = wanted[0][1].device
        link.workspace.reserve(slot, total, dtype, device)
        blocks[dtype] = iter(link.workspace.view(slot, (total,), dtype, device).split(_of(dtype, sizes, wanted)))
    return [next(blocks[like.dtype])[: torch.Size(shape).numel()].view(*shape) for shape, like in wanted]


def _of(dtype: torch.dtype, sizes: Sequence[int], wanted: Sequence[tuple[Sequence[int], Tensor]]) -> list[int]:
    return [size for size, (_, like) in zip(sizes, wanted, strict=True) if like.dtype == dtype]


def column(x: Tensor) -> Tensor:
    """Numbers of rows, ``[batch, heads, tokens]``, as a tensor of one column."""
    return x.transpose(1, 2).unsqueeze(3)


def row(x: Tensor) -> Tensor:
    """The way back."""
    return x.squeeze(3).transpose(1, 2)


def _runs(sizes: Sequence[int]) -> Slices:
    return tuple(slice(a, b) for a, b in pairwise(accumulate(sizes, initial=0)))
