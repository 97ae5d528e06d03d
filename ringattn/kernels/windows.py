"""Narrow windows as overlapping blocks, so that a window costs its width and not a dense rectangle.

Forward: a block of query rows sees `width + rows - 1` keys, and a run of such blocks is one operator call on
overlapping views of the keys, with one additive mask for all. Backward: the same with the roles exchanged, a
block of keys and the rows that see them, as then dk and dv need no summing over blocks and only dq overlaps.
Blocks clipped by the tile's borders are calls of their own, with their part of the mask: all blocks of a
triangle, which is a window as wide as its side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ringattn.kernels.base import Grads, Rows
from ringattn.kernels.operators import Operator, Query, cast
from ringattn.kernels.partial import Partial, accumulator_dtype, fold
from ringattn.kernels.pieces import ALIGNMENT, TileBand


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of blocks: the mask wastes that much of the width, and smaller blocks waste more in the operator."""

    rows: int  # of a forward block
    most: int  # blocks of one forward call: scratch of a few MiB, shared key copies
    keys: int  # of a backward block


SIZES = {"cpu": Sizes(rows=64, most=16, keys=128), "cuda": Sizes(rows=192, most=8, keys=192)}
# Rows and columns together of most triangles that come here: they share one mask.
TRIANGLE_WIDTH = 3072
# Tiles of at most this many tokens are brought to the operator's precision at once, longer ones block by block.
WHOLE = 8192


@dataclass(frozen=True, slots=True)
class Run:
    """`count` consecutive blocks of one side, and the span of the other side that they reach."""

    block: slice
    span: slice
    count: int
    skip: int  # how much of the first block's reach lies before the span


def forward(
    operator: Operator, band: TileBand, q: Tensor, k: Tensor, v: Tensor, scale: float, acc: Partial, fresh: bool
) -> None:
    """Fold a band into `acc`."""
    (lo, _, width), dtype, sizes = _bounds(band), acc.out.dtype, SIZES[q.device.type]
    step, slack = sizes.rows, -(width + sizes.rows - 1) % ALIGNMENT
    mask = _mask(step, width, slack, dtype, q.device)
    q, k, v = (_whole(x, dtype).transpose(1, 2) for x in (q, k, v))
    for run in _runs(band.nq, band.nk, step, mask.size(1), lo - slack, sizes.most):
        for batch in _batches(q.size(0), run):
            queries = _blocks(cast(q[batch, :, run.block], dtype), run.count, step)
            keys, values = (_keys(cast(x[batch, :, run.span], dtype), run.count, step) for x in (k, v))
            part = mask[: queries.size(2), run.skip : run.skip + keys.size(2)]
            out, lse = operator.forward(queries, keys, values, False, part, scale)
            home = Partial(acc.out[batch, run.block], acc.lse[batch, :, run.block])
            fold(home, *_joined(out.transpose(1, 2), lse, run.count), fresh)


def backward(operator: Operator, band: TileBand, rows: Rows, k: Tensor, v: Tensor, scale: float, grads: Grads) -> None:
    """Add the gradients of a band."""
    (_, hi, width), dtype, step = _bounds(band), accumulator_dtype(k.dtype), SIZES[k.device.type].keys
    mask = _transposed_mask(step, width, dtype, k.device)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    query = Query.of(rows, lambda x: _whole(x, dtype).transpose(1, 2))
    for run in _runs(band.nk, band.nq, step, mask.size(0), -hi, most=1):
        part = query.map(lambda x, span=run.span: cast(x[:, :, span], dtype))  # type: ignore[misc]
        keys, values = (cast(x[:, :, run.block], dtype) for x in (k, v))
        seen = mask[run.skip : run.skip + part.q.size(2), : keys.size(2)]
        grads.tile(run.span, run.block).add(*operator.backward(part, keys, values, False, seen, scale))


def _bounds(band: TileBand) -> tuple[int, int, int]:
    """`lo, hi, width`; what has one bound is a window wide enough, the same for all so that they share a mask."""
    if band.lo is None or band.hi is None:
        width = max(TRIANGLE_WIDTH, band.nq + band.nk)
        if band.hi is None:
            assert band.lo is not None, "a full rectangle is no window"
            return band.lo, band.lo + width - 1, width
        return band.hi - width + 1, band.hi, width
    return band.lo, band.hi, band.hi - band.lo + 1


def forget() -> None:
    """Drops the masks that calls have left for those to come."""
    _mask.cache_clear()
    _transposed_mask.cache_clear()


@lru_cache(maxsize=8)
def _mask(step: int, width: int, slack: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask `[step, slack + width + step - 1]`: row i sees `width` columns from `slack + i` on."""
    seen = torch.ones(step, slack + width + step - 1, dtype=dtype, device=device)
    return seen.triu_(slack).tril_(slack + width - 1).log_()


@lru_cache(maxsize=8)
def _transposed_mask(step: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask `[width + step - 1, step]`: column j is seen by `width` rows from `j` on."""
    return _mask(step, width, 0, dtype, device).T.contiguous()


def _whole(x: Tensor, dtype: torch.dtype) -> Tensor:
    return cast(x, dtype) if x.size(1) <= WHOLE else x


def _batches(batch: int, run: Run) -> Iterator[slice]:
    """All batch rows where the run is one block, else one by one: its blocks take the place of the batch."""
    if run.count == 1:
        yield slice(None)
    else:
        yield from (slice(i, i + 1) for i in range(batch))


def _runs(length: int, limit: int, step: int, reach: int, offset: int, most: int) -> Iterator[Run]:
    """Blocks of `step` that tile `range(length)`, in runs of at most `most`.

    A block at `p` reaches `reach` places of the other side, `range(limit)`, from `p + offset` on. A block that
    is clipped on either side makes a run of its own.
    """
    p = 0
    while p < length:
        start = p + offset
        inside = min((length - p) // step, (limit - start - reach) // step + 1) if start >= 0 else 0
        count = max(1, min(most, inside))
        stop = min(p + count * step, length)
        end = min(start + reach + (stop - p) - step, limit)
        yield Run(slice(p, stop), slice(max(start, 0), end), count, max(-start, 0))
        p = stop


def _keys(x: Tensor, count: int, step: int) -> Tensor:
    """Keys or values of a run, copied so that their rows lie together where several blocks read them."""
    return x if count == 1 else _blocks(x.contiguous(), count, step)


def _blocks(x: Tensor, count: int, step: int) -> Tensor:
    """`[1, H, n, D]` as `count` views `[count, H, length, D]` that begin `step` apart and may overlap."""
    if count == 1:
        return x
    blocks = x[0].unfold(1, x.size(2) - (count - 1) * step, step)
    return blocks.movedim(-1, 2).transpose(0, 1)


def _joined(out: Tensor, lse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The results of a run's blocks, `[count, length, H, D]` and `[count, H, length]`, as those of its rows."""
    if count == 1:
        return out, lse
    return out.flatten(0, 1).unsqueeze(0), lse.transpose(0, 1).flatten(1, 2).unsqueeze(0)
