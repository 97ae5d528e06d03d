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

import torch
from torch import Tensor

from ringattn.kernels.base import Grads, Rows
from ringattn.kernels.operators import Operator, Query, head_major
from ringattn.kernels.pieces import ALIGNMENT, TileBand
from ringattn.merge import Partial, fold

# Rows of a forward block and keys of a backward block: the mask wastes that much of the width, and smaller
# blocks waste more in the operator. Blocks of one forward call: scratch of a few MiB, shared key copies.
FORWARD_STEP = 64
FORWARD_BLOCKS = 16
BACKWARD_STEP = 128
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
    band, dtype, step = band.bounded, acc.out.dtype, FORWARD_STEP
    assert band.lo is not None and band.width is not None
    slack = -(band.width + step - 1) % ALIGNMENT
    mask = _mask(step, band.width, slack, dtype, q.device)
    k, v = _whole(k, dtype), _whole(v, dtype)
    for run in _runs(band.nq, band.nk, step, mask.size(1), band.lo - slack, FORWARD_BLOCKS):
        for batch in _batches(q.size(0), run):
            queries = _blocks(q[batch, run.block].to(dtype).transpose(1, 2), run.count, step)
            keys, values = (_keys(x[batch, run.span], dtype, run.count, step) for x in (k, v))
            part = mask[: queries.size(2), run.skip : run.skip + keys.size(2)]
            out, lse = operator.forward(queries, keys, values, False, part, scale)
            home = Partial(acc.out[batch, run.block], acc.lse[batch, :, run.block])
            fold(home, *_joined(out.transpose(1, 2), lse, run.count), fresh)


def backward(operator: Operator, band: TileBand, rows: Rows, k: Tensor, v: Tensor, scale: float, grads: Grads) -> None:
    """Add the gradients of a band."""
    band, dtype, step = band.bounded, grads.dq.dtype, BACKWARD_STEP
    assert band.hi is not None and band.width is not None
    mask = _mask(step, band.width, 0, dtype, k.device).T.contiguous()
    rows = rows.map(lambda x: _whole(x, dtype), lambda x: x)
    for run in _runs(band.nk, band.nq, step, mask.size(0), -band.hi, most=1):
        query = Query.of(rows.rows(run.span), lambda x: x.to(dtype).transpose(1, 2))
        keys, values = (x[:, run.block].to(dtype).transpose(1, 2) for x in (k, v))
        part = mask[run.skip : run.skip + query.q.size(2), : keys.size(2)]
        grads.tile(run.span, run.block).add(*operator.backward(query, keys, values, False, part, scale))


def _mask(step: int, width: int, slack: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask `[step, slack + width + step - 1]`: row i sees `width` columns from `slack + i` on."""
    seen = torch.ones(step, slack + width + step - 1, dtype=dtype, device=device)
    return seen.triu_(slack).tril_(slack + width - 1).log_()


def _whole(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.size(1) <= WHOLE else x


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


def _keys(x: Tensor, dtype: torch.dtype, count: int, step: int) -> Tensor:
    """Keys or values of a run, head-major; copied so that their rows lie together where several blocks read them."""
    return x.to(dtype).transpose(1, 2) if count == 1 else _blocks(head_major(x, dtype), count, step)


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
