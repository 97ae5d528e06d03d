"""Narrow windows as runs of overlapping blocks, so that a window costs its width and not a dense rectangle.

Forward: `step` query rows see `width + step - 1` keys; a run of such blocks is one operator call on overlapping
views of the keys, with one additive mask for all. Backward: the same with the roles exchanged, `step` keys and
the rows that see them, as then dk and dv need no summing over blocks and only dq overlaps. Blocks clipped by the
tile's borders are calls of their own, with their part of the mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.kernels.bands import Band
from ringattn.kernels.base import Grads, Rows
from ringattn.kernels.operators import Operator, Query, head_major
from ringattn.merge import Partial, fold

# The CPU operator is fastest on key blocks of whole vector registers.
ALIGNMENT = 16
# Blocks of one forward call, and block-heads of one backward call: enough to spread over threads and to hide the
# cost of a call, few enough for scratch of a few MiB. Backward copies dout where blocks overlap, so it has fewer.
FORWARD_BLOCKS = 8
BACKWARD_HEADS = 4


@dataclass(frozen=True, slots=True)
class Run:
    """`count` consecutive blocks of one side, and the span of the other side that they reach."""

    block: slice
    span: slice
    count: int
    skip: int  # how much of the first block's reach lies before the span


def forward(
    operator: Operator, band: Band, q: Tensor, k: Tensor, v: Tensor, scale: float, acc: Partial, fresh: bool
) -> None:
    """Fold a band with two bounds into `acc`."""
    assert band.lo is not None and band.width is not None
    dtype, step = acc.out.dtype, _step(band.width)
    slack = -(band.width + step - 1) % ALIGNMENT
    mask = _mask(step, band.width, slack, dtype, q.device)
    for run in _runs(band.nq, band.nk, step, mask.size(1), band.lo - slack, FORWARD_BLOCKS):
        part = mask[: run.block.stop - run.block.start, run.skip :]
        for batch in range(q.size(0)):
            one = slice(batch, batch + 1)
            queries = _blocks(q[one, run.block].to(dtype).transpose(1, 2), run.count, step)
            keys = _blocks(head_major(k[one, run.span], dtype), run.count, step)
            values = _blocks(head_major(v[one, run.span], dtype), run.count, step)
            out, lse = operator.forward(queries, keys, values, False, part[:, : keys.size(2)], scale)
            out, lse = out.transpose(1, 2).flatten(0, 1), lse.transpose(0, 1).flatten(1, 2)
            fold(Partial(acc.out[one, run.block], acc.lse[one, :, run.block]), out[None], lse[None], fresh)


def backward(
    operator: Operator, band: Band, rows: Rows, k: Tensor, v: Tensor, scale: float, grads: Grads
) -> None:
    """Add the gradients of a band with two bounds."""
    assert band.hi is not None and band.width is not None
    dtype, step = grads.dq.dtype, _step(band.width)
    mask = _mask(step, band.width, 0, dtype, k.device).T.contiguous()
    count = max(1, BACKWARD_HEADS // rows.q.size(2))
    for run in _runs(band.nk, band.nq, step, mask.size(0), -band.hi, count):
        part = mask[run.skip :, : run.block.stop - run.block.start]
        for batch in range(k.size(0)):
            one = slice(batch, batch + 1)
            query = Query.of(rows.batch(one).rows(run.span), dtype)
            query = query.map(lambda x, count=run.count: _blocks(x, count, step))
            keys = _blocks(head_major(k[one, run.block], dtype), run.count, step)
            values = _blocks(head_major(v[one, run.block], dtype), run.count, step)
            dq, dk, dv = operator.backward(query, keys, values, False, part[: query.q.size(2)], scale)
            for block in range(run.count):
                start = run.span.start + block * step
                grads.dq[batch, start : start + dq.size(2)].add_(dq[block].transpose(0, 1))
            grads.dk[batch, run.block].add_(dk.transpose(1, 2).flatten(0, 1))
            grads.dv[batch, run.block].add_(dv.transpose(1, 2).flatten(0, 1))


def _step(width: int) -> int:
    """Rows of a block: wide enough for the operator's own blocking, narrow enough to waste little on the mask."""
    return 128


def _mask(step: int, width: int, slack: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask `[step, slack + width + step - 1]`: row i sees `width` columns from `slack + i` on."""
    reach = slack + width + step - 1
    ahead = torch.arange(reach, device=device) - torch.arange(step, device=device)[:, None] - slack
    mask = torch.zeros(step, reach, dtype=dtype, device=device)
    return mask.masked_fill_((ahead < 0) | (ahead >= width), -math.inf)


def _runs(length: int, limit: int, step: int, reach: int, offset: int, most: int) -> Iterator[Run]:
    """Blocks of `step` that tile `range(length)`, in runs of at most `most`.

    A block at `p` reaches `reach` places of the other side, `range(limit)`, from `p + offset` on. Blocks that are
    clipped on either side make a run of their own.
    """
    p = 0
    while p < length:
        start = p + offset
        inside = min((length - p) // step, (limit - start - reach) // step + 1) if start >= 0 else 0
        count = min(most, inside)
        if count < 1:
            count, stop = 1, min(p + step, length)
        else:
            stop = p + count * step
        end = min(start + reach + (stop - p) - step, limit)
        yield Run(slice(p, stop), slice(max(start, 0), end), count, max(-start, 0))
        p = stop


def _blocks(x: Tensor, count: int, step: int) -> Tensor:
    """`[1, H, n, ...]` as `count` views `[count, H, length, ...]` that begin `step` apart and may overlap."""
    blocks = x[0].unfold(1, x.size(2) - (count - 1) * step, step)
    return blocks.movedim(-1, 2).transpose(0, 1)
