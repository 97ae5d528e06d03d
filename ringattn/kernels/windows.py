"""Narrow windows as overlapping blocks, so that a window costs its width and not a dense rectangle.

Forward: a block of query rows sees `width + rows - 1` keys, and a run of such blocks is one operator call on
overlapping views of the keys, with one additive mask for all. Backward: the same with the roles exchanged, a
block of keys and the rows that see them, as then dk and dv need no summing over blocks and only dq overlaps.
Blocks clipped by the tile's borders are calls of their own, with their part of the mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.kernels.base import Grads, Rows
from ringattn.kernels.operators import Operator, Query, head_major
from ringattn.kernels.pieces import TileBand
from ringattn.merge import Partial, fold

# Rows of a forward block and keys of a backward block: the mask wastes that much of the width, and smaller
# blocks waste more in the operator. Blocks of one forward call: scratch of a few MiB, shared key copies.
FORWARD_STEP = 192
FORWARD_BLOCKS = 8
BACKWARD_STEP = 192
# The CPU operator is fastest on key blocks of whole vector registers.
ALIGNMENT = 16


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
    """Fold a band with two bounds into `acc`."""
    assert band.lo is not None and band.width is not None
    dtype, step = acc.out.dtype, FORWARD_STEP
    slack = -(band.width + step - 1) % ALIGNMENT
    mask = _mask(step, band.width, slack, dtype, q.device)
    for run in _runs(band.nq, band.nk, step, mask.size(1), band.lo - slack, FORWARD_BLOCKS):
        for batch in range(q.size(0)):
            one = slice(batch, batch + 1)
            queries = _blocks(q[one, run.block].to(dtype).transpose(1, 2), run.count, step)
            keys = _blocks(head_major(k[one, run.span], dtype), run.count, step)
            values = _blocks(head_major(v[one, run.span], dtype), run.count, step)
            part = mask[: queries.size(2), run.skip : run.skip + keys.size(2)]
            out, lse = operator.forward(queries, keys, values, False, part, scale)
            out, lse = out.transpose(1, 2).flatten(0, 1), lse.transpose(0, 1).flatten(1, 2)
            home = Partial(acc.out[one, run.block], acc.lse[one, :, run.block])
            fold(home, out.unsqueeze(0), lse.unsqueeze(0), fresh)


def backward(operator: Operator, band: TileBand, rows: Rows, k: Tensor, v: Tensor, scale: float, grads: Grads) -> None:
    """Add the gradients of a band with two bounds."""
    assert band.hi is not None and band.width is not None
    dtype, step = grads.dq.dtype, BACKWARD_STEP
    mask = _mask(step, band.width, 0, dtype, k.device).T.contiguous()
    for run in _runs(band.nk, band.nq, step, mask.size(0), -band.hi, most=1):
        query = Query.of(rows.rows(run.span), lambda x: x.to(dtype).transpose(1, 2))
        keys, values = (x[:, run.block].to(dtype).transpose(1, 2) for x in (k, v))
        part = mask[run.skip : run.skip + query.q.size(2), : keys.size(2)]
        grads.tile(run.span, run.block).add(*operator.backward(query, keys, values, False, part, scale))


def _mask(step: int, width: int, slack: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask `[step, slack + width + step - 1]`: row i sees `width` columns from `slack + i` on."""
    reach = slack + width + step - 1
    ahead = torch.arange(reach, device=device) - torch.arange(step, device=device)[:, None] - slack
    mask = torch.zeros(step, reach, dtype=dtype, device=device)
    return mask.masked_fill_((ahead < 0) | (ahead >= width), -math.inf)


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


def _blocks(x: Tensor, count: int, step: int) -> Tensor:
    """`[1, H, n, D]` as `count` views `[count, H, length, D]` that begin `step` apart and may overlap."""
    blocks = x[0].unfold(1, x.size(2) - (count - 1) * step, step)
    return blocks.movedim(-1, 2).transpose(0, 1)
