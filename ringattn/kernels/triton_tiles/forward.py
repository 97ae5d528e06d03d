"""The forward kernel: one program computes a block of query rows against all that the tiles of a wave say of them.

The online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867) over blocks of keys, and at the end one merge with what
the rows held before. Query heads that share a KV head are rows of one block.
"""

import triton
import triton.language as tl

from ringattn.kernels.triton_tiles.device import (
    LN2,
    block_of,
    dot,
    entry_of,
    in_band,
    kept,
    load_tokens,
    local_rows,
    logits_of,
    phases,
    places,
    row_terms,
)


@triton.jit(do_not_specialize=["seed"])
def forward_tiles(
    q, k, v, out, lse, lists, terms, bias, seed,
    GROUP: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Folds a wave's tiles into `out` and `lse`: a program for each block, each `TOGETHER` query heads, each batch
    row."""
    first, step, count, begin, end, fresh = block_of(lists)
    m = tl.arange(0, ROWS)
    x, ok = m // TOGETHER, m // TOGETHER < count
    batch, kv_head = tl.program_id(2), tl.program_id(1) * TOGETHER // GROUP
    heads = tl.program_id(1) * TOGETHER + m % TOGETHER
    rows = local_rows(first, step, x, ok, lists.rows)
    row = row_terms(terms, seed, batch, heads, rows)
    queries = load_tokens(q, batch, rows, heads, ok, D, WIDE).to(k.at.dtype.element_ty)
    state = (
        tl.zeros((ROWS, WIDE_V), tl.float32),
        tl.full((ROWS,), float("-inf"), tl.float32),
        tl.zeros((ROWS,), tl.float32),
    )
    for number in range(begin, end):
        entry = entry_of(lists, number)
        start, steps, full, before = phases(entry, count, COLS)
        for t in range(0, steps - full):
            state = _attend(
                state, queries, row, x, heads, rows, k, v, terms, bias, lists, batch, kv_head, entry,
                start + tl.where(t < before, t, t + full) * COLS,
                COLS, D, DV, WIDE, WIDE_V, PRECISION, True,
            )  # fmt: skip
        for t in range(before, before + full):
            state = _attend(
                state, queries, row, x, heads, rows, k, v, terms, bias, lists, batch, kv_head, entry,
                start + t * COLS,
                COLS, D, DV, WIDE, WIDE_V, PRECISION, False,
            )  # fmt: skip
    _merge(out, lse, state, terms, batch, rows, heads, ok, fresh, DV, WIDE_V)


@triton.jit
def _attend(
    state, queries, row, x, heads, rows, k, v, terms, bias, lists, batch, kv_head, entry, start,
    COLS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The running sums, the largest logit and the sum of all, with some more columns."""
    sums, peak, total = state
    j = start + tl.arange(0, COLS)
    there = None
    if MASKED:
        there = j < entry[4]
    cols = local_rows(entry[2], entry[3], j, there, lists.cols)
    keys = load_tokens(k, batch, cols, kv_head, there, D, WIDE)
    products = dot(queries, tl.trans(keys), None, PRECISION)
    logits, _ = logits_of(products, terms, bias, row, batch, heads, rows, cols, 1)
    if MASKED:
        logits = tl.where(in_band(entry, x[:, None], j[None, :]), logits, float("-inf"))
    risen = tl.maximum(peak, tl.max(logits, 1))
    base = tl.where(risen == float("-inf"), 0.0, risen)  # rows that saw nothing yet: exp(-inf - 0) is 0
    p, fade = tl.exp2(logits - base[:, None]), tl.exp2(peak - base)
    total = total * fade + tl.sum(p, 1)
    if terms.boost is not None:
        p = tl.where(kept(terms, row, cols, 1), p, 0.0)
    values = load_tokens(v, batch, cols, kv_head, there, DV, WIDE_V)
    sums = dot(p, values, sums * fade[:, None], PRECISION)
    return sums, risen, total


@triton.jit
def _merge(out, lse, state, terms, batch, rows, heads, ok, fresh, DV: tl.constexpr, WIDE_V: tl.constexpr):
    """See `ringattn.kernels.partial.fold`: the lse is joined in its own dtype. Of fresh rows nothing is read."""
    sums, peak, total = state
    whole = tl.where(total == 0, 1.0, total)  # a row without a finite logit: zeros, and an lse of -inf
    factor = 1.0 / whole
    if terms.boost is not None:
        factor *= terms.boost
    block = sums * factor[:, None]
    kind: tl.constexpr = lse.at.dtype.element_ty
    block_lse = peak.to(kind) * LN2 + tl.log(whole.to(kind))
    old = ok & (fresh == 0)
    at = places(lse, batch, rows, heads)
    old_lse = tl.load(at, mask=old, other=float("-inf"))
    most = tl.maximum(old_lse, block_lse)
    most = tl.where(most == float("-inf"), 0.0, most)
    both = tl.exp(old_lse - most) + tl.exp(block_lse - most)
    none = both == 0
    joint = most + tl.log(tl.where(none, 1.0, both))
    weight = tl.where(none | (block_lse == float("-inf")), 0.0, tl.exp(block_lse - joint)).to(tl.float32)
    tl.store(at, tl.where(none, float("-inf"), joint), mask=ok)
    dims = tl.arange(0, WIDE_V)
    at = places(out, batch, rows, heads)[:, None] + dims[None, :]
    inside = dims[None, :] < DV
    before = tl.load(at, mask=old[:, None] & inside, other=0.0).to(tl.float32)
    merged = before + weight[:, None] * (block - before)
    tl.store(at, merged.to(out.at.dtype.element_ty), mask=ok[:, None] & inside)
