"""Every score feature in plain PyTorch: any device, any float dtype, any head sizes.

The online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867) over blocks of keys, and the backward of
FlashAttention-2 (Dao 2023, arXiv 2307.08691). A block is some heads of a batch row, or some batch rows, by some
query rows and some key columns. Its scores are scratch matrices that stay in cache; nothing else grows faster than
the inputs. Query heads that share a KV head are rows of one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ringattn.kernels.base import Call, Grads, Rows
from ringattn.kernels.calls import TileKernel
from ringattn.kernels.operators import head_major
from ringattn.kernels.partial import Partial, accumulator_dtype, fold
from ringattn.kernels.pieces import TileBand
from ringattn.kernels.reference import refuse_what_is_unknown
from ringattn.kernels.scores import Block, TileScores

# Rows (of all query heads of a KV head) and columns of a block. Heads are added up to so many scores: on the CPU a
# matrix of them, 1 MiB in fp32, stays in cache between operators; elsewhere a launch costs more than a cache miss.
ROWS, COLS = 256, 512
SCORES = {"cpu": 2 * ROWS * COLS}
MANY_SCORES = 1 << 24
# Rows of a block in a window: it costs `rows - 1` columns more than the window's width, and few rows are overhead.
FEWEST_ROWS = 64
LOG2E = math.log2(math.e)


class Blockwise(TileKernel):
    """The `blockwise` kernel; see the module's docstring."""

    name = "blockwise"
    reads_delta = True

    def refuse(self, call: Call) -> str | None:
        return refuse_what_is_unknown(call)

    def forward_tile(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores, acc: Partial, fresh: bool) -> None:
        grid = Grid.of(q, k, scores, acc.out.dtype)
        with torch.autocast(q.device.type, enabled=False):
            for lane, kv_heads in grid.lanes():
                keys, values = (head_major(x[lane.batch, :, kv_heads], grid.dtype).flatten(0, 1) for x in (k, v))
                for rows in grid.rows():
                    block = replace(lane, rows=rows)
                    queries = grid.folded(q[block.tokens]).mul_(grid.unit)
                    out, lse = _attend(grid, block, queries, keys, values)
                    home = Partial(acc.out[block.tokens], acc.lse[block.batch, block.heads, rows])
                    fold(home, grid.unfolded(block, out), lse.view(home.lse.shape), fresh)

    def backward_tile(self, rows: Rows, k: Tensor, v: Tensor, scores: TileScores, grads: Grads) -> None:
        grid, grads = Grid.of(rows.q, k, scores, accumulator_dtype(k.dtype)), grads.begun()
        with torch.autocast(k.device.type, enabled=False):
            for lane, kv_heads in grid.lanes():
                keys, values = (head_major(x[lane.batch, :, kv_heads], grid.dtype).flatten(0, 1) for x in (k, v))
                pairs = (grads.dk, keys), (grads.dv, values)
                dk, dv = (None if grad is None else torch.zeros_like(x) for grad, x in pairs)
                for some in grid.rows():
                    block = replace(lane, rows=some)
                    home = None if grads.dq is None else grads.dq[block.tokens]
                    _differentiate(grid, block, rows, keys, values, Grads(home, dk, dv))
                for grad, part in ((grads.dk, dk), (grads.dv, dv)):
                    if grad is not None and part is not None:
                        home = grad[lane.batch, :, kv_heads].transpose(1, 2)
                        home.add_(part.view(home.shape))


def _attend(grid: Grid, block: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`out` and `lse`, folded, of some rows over all the columns that they see."""
    lowest = torch.finfo(q.dtype).min  # in place of -inf, which cannot be subtracted from itself
    peak = q.new_full((*q.shape[:2], 1), lowest)
    total, out = torch.zeros_like(peak), q.new_zeros((*q.shape[:2], v.size(-1)))
    for cols in grid.cols(block.rows):
        block = replace(block, cols=cols)
        logits = grid.logits(block, q, k)[0]
        grid.hide(block, logits)
        risen = torch.maximum(peak, logits.amax(-1, keepdim=True))
        p, fade = _exp(logits.sub_(risen)), _exp(peak.sub_(risen))
        total.mul_(fade).add_(p.sum(-1, keepdim=True))
        grid.drop_out(block, p)
        out.mul_(fade).baddbmm_(p, v[:, cols])
        peak = risen
    lse = total.log().add_(peak)
    return out.div_(total.clamp_min_(torch.finfo(q.dtype).tiny)), lse


def _differentiate(grid: Grid, block: Block, rows: Rows, k: Tensor, v: Tensor, grads: Grads) -> None:
    """Adds some rows' share to the folded gradients of the keys, and to their own dq, which is not folded."""
    assert rows.delta is not None, "this kernel reads delta"
    q, dout = grid.folded(rows.q[block.tokens]).mul_(grid.unit), grid.folded(rows.dout[block.tokens])
    lse, delta = (grid.column(x[block.batch, block.heads, block.rows]) for x in (rows.lse, rows.delta))
    lse = lse.masked_fill(lse == -math.inf, math.inf)  # rows that see nothing: exp(-inf - inf) is 0
    dq, dk, dv = None if grads.dq is None else torch.zeros_like(q), grads.dk, grads.dv
    for cols in grid.cols(block.rows):
        block = replace(block, cols=cols)
        logits, slope = grid.logits(block, q, k)
        p = _exp(logits.sub_(lse))
        grid.clear(block, p)
        if dq is None and dk is None and not grid.scores.wants_dbias:  # dv asks for no gradient of scores
            grid.drop_out(block, p)
            _add_product(dv, cols, p, dout)
            continue
        dlogits = torch.bmm(dout, v[:, cols].mT, out=grid.scratch(1, p.shape))
        kept = grid.drop_out(block, dlogits)
        dlogits.sub_(delta).mul_(p)
        if kept is not None:
            grid.heads(block, p).mul_(kept)
        _add_product(dv, cols, p, dout)
        if grid.scores.wants_dbias:
            grid.scores.add_dbias(block, grid.heads(block, dlogits))
        if slope is not None:
            dlogits.mul_(slope)
        _add_product(dk, cols, dlogits, q)
        if dq is not None:
            dq.baddbmm_(dlogits, k[:, cols])
    if dq is not None and grads.dq is not None:
        grads.dq.add_(grid.unfolded(block, dq), alpha=grid.unit)


def _add_product(grad: Tensor | None, cols: slice, pairs: Tensor, rows: Tensor) -> None:
    """What rows give to the gradient of some keys, if that is wanted."""
    if grad is not None:
        grad[:, cols].baddbmm_(pairs.mT, rows)


def _exp(x: Tensor) -> Tensor:
    """In place. PyTorch's exp is slower on the CPU, several times so where it underflows."""
    return x.mul_(LOG2E).exp2_()


@dataclass(frozen=True)
class Grid:
    """How a tile is cut into blocks, and what becomes of a block's scores.

    Tensors of a block are folded: the batch rows and KV heads are their first dim, the query heads of a KV head and
    their rows the second.
    """

    scores: TileScores
    band: TileBand
    batch: int
    kv_heads: int
    group: int  # query heads of a KV head
    height: int  # query rows of a block
    together: int  # batch rows by KV heads of a block
    buffers: list[Tensor]  # scratch, each for the scores of one block

    @staticmethod
    def of(q: Tensor, k: Tensor, scores: TileScores, dtype: torch.dtype) -> Grid:
        """The grid of a tile whose blocks are computed in `dtype`."""
        (batch, nq, num_heads, _), (_, nk, kv_heads, _) = q.shape, k.shape
        band, group = TileBand.of(nq, nk, scores.window), num_heads // kv_heads
        height = max(1, ROWS // group)
        if band.width is not None:
            height = min(height, max(band.width // 8, FEWEST_ROWS))
        height = min(height, nq)
        pairs = group * height * min(COLS, nk)
        together = min(batch * kv_heads, max(1, SCORES.get(q.device.type, MANY_SCORES) // pairs))
        matrices = 2 if scores.softcap is None else 3
        buffers = [torch.empty(together * pairs, dtype=dtype, device=q.device) for _ in range(matrices)]
        return Grid(scores, band, batch, kv_heads, group, height, together, buffers)

    @property
    def dtype(self) -> torch.dtype:
        """What blocks are computed in."""
        return self.buffers[0].dtype

    @property
    def unit(self) -> float:
        """What q is multiplied with before its product with k."""
        return self.scores.scale / (self.scores.softcap or 1.0)

    def lanes(self) -> Iterator[tuple[Block, slice]]:
        """Some batch rows with all heads, or one with some: a block without rows and columns, and its KV heads."""
        rows, kv_heads = max(1, self.together // self.kv_heads), min(self.together, self.kv_heads)
        for b in range(0, self.batch, rows):
            for h in range(0, self.kv_heads, kv_heads):
                stop = min(h + kv_heads, self.kv_heads)
                heads = slice(h * self.group, stop * self.group)
                batch = slice(b, min(b + rows, self.batch))
                yield Block(batch, heads, slice(0, 0), slice(0, 0)), slice(h, stop)

    def rows(self) -> Iterator[slice]:
        """The rows of the tile, block by block."""
        for a in range(0, self.band.nq, self.height):
            yield slice(a, min(a + self.height, self.band.nq))

    def cols(self, rows: slice) -> Iterator[slice]:
        """The columns that some of these rows see, in blocks of about equal width."""
        lo, hi, nk = self.band.lo, self.band.hi, self.band.nk
        start = 0 if lo is None else max(0, rows.start + lo)
        stop = nk if hi is None else min(nk, rows.stop + hi)
        width = -(-(stop - start) // -(-(stop - start) // COLS))
        for c in range(start, stop, width):
            yield slice(c, min(c + width, stop))

    def folded(self, x: Tensor) -> Tensor:
        """`[batch, rows, heads, D]` folded, as a new tensor."""
        new = torch.empty((x.size(0), x.size(2), x.size(1), x.size(3)), dtype=self.dtype, device=x.device)
        return new.copy_(x.transpose(1, 2)).view(-1, self.group * x.size(1), x.size(3))

    def unfolded(self, block: Block, x: Tensor) -> Tensor:
        """The inverse of `folded`, as a view."""
        return self.heads(block, x).transpose(1, 2)

    def column(self, x: Tensor) -> Tensor:
        """`[batch, heads, rows]` folded."""
        return x.to(self.dtype).reshape(-1, self.group * x.size(2), 1)

    def heads(self, block: Block, x: Tensor) -> Tensor:
        """A folded tensor as `[batch, heads, rows, *]`, a view."""
        return x.view(block.batch.stop - block.batch.start, -1, block.shape[0], x.size(-1))

    def scratch(self, number: int, shape: torch.Size) -> Tensor:
        return self.buffers[number][: shape.numel()].view(shape)

    def logits(self, block: Block, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits of a block, without its band, and with a softcap their derivative by the product of q and k."""
        k = k[:, block.cols]
        shape = torch.Size((q.size(0), q.size(1), k.size(1)))
        x, slope = torch.bmm(q, k.mT, out=self.scratch(0, shape)), None
        if (cap := self.scores.softcap) is not None:
            x.tanh_()
            slope = torch.mul(x, x, out=self.scratch(2, shape)).mul_(-cap).add_(cap)
            x.mul_(cap)
        if (bias := self.scores.bias(block)) is not None:
            self.heads(block, x).add_(bias)
        return x, slope

    def hide(self, block: Block, logits: Tensor) -> None:
        """-inf outside the band."""
        low, high = self._borders(block)
        x = self.heads(block, logits)
        if high is not None:
            x.tril_(high).add_(x.new_full(x.shape[-2:], -math.inf).triu_(high + 1))
        if low is not None:
            x.triu_(low).add_(x.new_full(x.shape[-2:], -math.inf).tril_(low - 1))

    def clear(self, block: Block, p: Tensor) -> None:
        """0 outside the band."""
        low, high = self._borders(block)
        if high is not None:
            self.heads(block, p).tril_(high)
        if low is not None:
            self.heads(block, p).triu_(low)

    def _borders(self, block: Block) -> tuple[int | None, int | None]:
        """The first and last diagonal of a block that lie in the band, None where it has none outside."""
        shift, (rows, cols) = block.rows.start - block.cols.start, block.shape
        low = None if self.band.lo is None else self.band.lo + shift
        high = None if self.band.hi is None else self.band.hi + shift
        return (
            None if low is None or low <= 1 - rows else low,
            None if high is None or high >= cols - 1 else high,
        )

    def drop_out(self, block: Block, x: Tensor) -> Tensor | None:
        """Multiplies by what dropout keeps, and returns it."""
        kept = self.scores.keep(block, x.dtype)
        if kept is not None:
            self.heads(block, x).mul_(kept)
        return kept
