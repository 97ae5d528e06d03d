"""The passes of `passes.py` as Triton kernels: each reads and writes its tensors once.

A byte count is their floor: a fold of a 16-bit block into an fp32 result moves 10 bytes an element, a sum of 16-bit
gradients as many, a first write 6.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ringattn.kernels.passes import Pair, Pairs

ELEMENTS = 4096  # of one program: 8 of each of 512 threads, in 16-byte accesses
WARPS = 4


def fold(out: Tensor, lse: Tensor, blocks: Tensor, block_lses: Tensor) -> None:
    """See `passes.fold_all`."""
    batch, n, heads, dim = out.shape
    if not out.numel():
        return
    width = triton.next_power_of_2(dim)
    rows = _rows(width, n)
    _fold[(triton.cdiv(n, rows), heads, batch)](
        out, lse, blocks, block_lses, n, dim,
        *out.stride()[:3], *lse.stride(), *blocks.stride()[:4], *block_lses.stride(),
        COUNT=len(blocks), ROWS=rows, WIDTH=width, num_warps=WARPS,
    )  # fmt: skip


def accumulate(pairs: Pairs, fresh: bool) -> None:
    """See `passes.accumulate`. Keys and values, or their gradients, are one launch."""
    if len(pairs) == 2 and pairs[0][0].shape[:3] == pairs[1][0].shape[:3]:
        _launch(pairs[0], pairs[1], 2, fresh)
        return
    for pair in pairs:
        _launch(pair, pair, 1, fresh)


def _launch(one: Pair, other: Pair, count: int, fresh: bool) -> None:
    (target, source), (target2, source2) = one, other
    if not target.numel():
        return
    _, b, c, dim = target.shape
    dim2 = target2.shape[3]
    width, rows = triton.next_power_of_2(max(dim, dim2)), target.numel() // dim
    block = _rows(width, rows)
    _accumulate[(triton.cdiv(rows, block), count)](
        target, source, dim, *target.stride()[:3], *source.stride(),
        target2, source2, dim2, *target2.stride()[:3], *source2.stride(),
        rows, b, c, FRESH=fresh, ROWS=block, WIDTH=width, num_warps=WARPS,
    )  # fmt: skip


def _rows(width: int, most: int) -> int:
    """Rows of one program."""
    return min(max(ELEMENTS // width, 1), triton.next_power_of_2(most))


@triton.jit
def _fold(
    out, lse, blocks, block_lses, n, dim,
    ob, on, oh, lb, lh, ln, bp, bb, bn, bh, mp, mb, mh, mn,
    COUNT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some rows of one head of a batch row; strides by block, batch row, row and head (of lse: batch row, head,
    row)."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, at, columns = rows < n, rows.to(tl.int64), tl.arange(0, WIDTH)
    whole = inside[:, None] & (columns < dim)[None, :]
    lse += batch * lb + head * lh + at * ln
    out += batch * ob + head * oh + (at * on)[:, None] + columns[None, :]
    blocks += batch * bb + head * bh + (at * bn)[:, None] + columns[None, :]
    block_lses += batch * mb + head * mh + at * mn
    joint = tl.load(lse, mask=inside, other=0.0)
    result = tl.load(out, mask=whole, other=0.0)
    for _ in tl.static_range(COUNT):
        new = tl.load(block_lses, mask=inside, other=0.0).to(joint.dtype)
        top = tl.maximum(joint, new, propagate_nan=tl.PropagateNan.ALL)
        nothing = top == float("-inf")  # neither saw a key, and -inf - (-inf) is NaN
        joint = tl.where(nothing, top, top + tl.log(1.0 + tl.exp(-tl.abs(joint - new))))
        weight = tl.where(new == float("-inf"), 0.0, tl.exp(new - joint)).to(result.dtype)
        block = tl.load(blocks, mask=whole, other=0.0).to(result.dtype)
        result += weight[:, None] * (block - result)
        blocks += bp
        block_lses += mp
    tl.store(lse, joint, mask=inside)
    tl.store(out, result, mask=whole)


@triton.jit
def _accumulate(
    target, source, dim, ta, tb, tc, sa, sb, sc, sd,
    target2, source2, dim2, ta2, tb2, tc2, sa2, sb2, sc2, sd2,
    count, b, c, FRESH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some rows of ``[a, b, c, dim]``, counted through, of one pair of a target and a source, or of the other."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i, j, k = (rows // (b * c)).to(tl.int64), (rows // c % b).to(tl.int64), (rows % c).to(tl.int64)
    if tl.program_id(1) == 0:
        into, of = i * ta + j * tb + k * tc, i * sa + j * sb + k * sc
        _take(target, into, source, of, sd, rows < count, dim, FRESH, WIDTH)
    else:
        into, of = i * ta2 + j * tb2 + k * tc2, i * sa2 + j * sb2 + k * sc2
        _take(target2, into, source2, of, sd2, rows < count, dim2, FRESH, WIDTH)


@triton.jit
def _take(target, into, source, of, step, inside, dim, FRESH: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a source added, or written, to those of a target."""
    columns = tl.arange(0, WIDTH)
    whole = inside[:, None] & (columns < dim)[None, :]
    target += into[:, None] + columns[None, :]
    value = tl.load(source + of[:, None] + columns[None, :] * step, mask=whole, other=0.0)
    value = value.to(target.dtype.element_ty)
    if not FRESH:
        value += tl.load(target, mask=whole, other=0.0)
    tl.store(target, value, mask=whole)
