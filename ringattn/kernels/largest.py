"""The largest logit of each row: what no fused operator gives.

For a walk of the forward program without values: a row's running result has an `out` of no columns, and its largest
logit so far in the place of its `lse`. Blocks are those of the `blockwise` kernel, the products of q and k alone, so
nothing grows faster than the inputs. Results over disjoint keys join by their maximum, with identity `-inf`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ringattn.kernels.base import Call
from ringattn.kernels.blockwise import Grid
from ringattn.kernels.calls import TileKernel
from ringattn.kernels.operators import head_major
from ringattn.kernels.partial import Partial
from ringattn.kernels.reference import refuse_what_is_unknown
from ringattn.kernels.scores import Block, TileScores


class Largest(TileKernel):
    """Forward alone. It is of no registry: a call is given it that has no values."""

    name = "largest"

    def refuse(self, call: Call) -> str | None:
        return refuse_what_is_unknown(call)

    def forward_tile(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores, acc: Partial, fresh: bool) -> None:
        grid = Grid.of(q, k, scores, acc.out.dtype)
        with torch.autocast(q.device.type, enabled=False):
            for lane, kv_heads in grid.lanes():
                keys = head_major(k[lane.batch, :, kv_heads], grid.dtype).flatten(0, 1)
                for rows in grid.rows():
                    block = replace(lane, rows=rows)
                    queries = grid.folded(q[block.tokens]).mul_(grid.unit)
                    home = acc.lse[block.batch, block.heads, rows]
                    lift(home, _largest(grid, block, queries, keys).view(home.shape), fresh)


def lift(running: Tensor, found: Tensor, fresh: bool = False) -> None:
    """`running <- max(running, found)` in place, NaN of either kept; `fresh`: nothing was written to it yet."""
    running.copy_(found if fresh else torch.maximum(running, found.to(running.dtype)))


def _largest(grid: Grid, block: Block, q: Tensor, k: Tensor) -> Tensor:
    """Folded, of some rows over all the columns that they see."""
    found = q.new_full((*q.shape[:2], 1), -math.inf)
    for cols in grid.cols(block.rows):
        block = replace(block, cols=cols)
        logits, _ = grid.logits(block, q, k)
        grid.hide(block, logits)
        found = torch.maximum(found, logits.amax(-1, keepdim=True))
    return found
