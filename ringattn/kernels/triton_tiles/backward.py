"""The backward kernels (FlashAttention-2, Dao 2023, arXiv 2307.08691), given the global lse and delta.

One program of `backward_queries` makes dq of a block of query rows, and dbias, whose rows are its own; one of
`backward_keys` makes dk and dv of a block of keys, for all query heads of its KV head. Each adds once, at its end, to
what is there, if anything is.
"""

import triton
import triton.language as tl

from ringattn.kernels.triton_tiles.device import (
    LOG2E,
    add_tokens,
    bias_at,
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
def backward_queries(
    q, k, v, dout, lse, delta, dq, lists, terms, bias, dbias, seed,
    GROUP: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, PRECISION: tl.constexpr,
    LANES: tl.constexpr, BATCHES: tl.constexpr,
):  # fmt: skip
    """Adds a wave's dq and dbias: a program for each block, each `LANES * TOGETHER` query heads and each `BATCHES`
    batch rows, which are more than needed only where dbias is their sum."""
    for lane in range(0, LANES):
        for one in range(0, BATCHES):
            _query_block(
                q, k, v, dout, lse, delta, dq, lists, terms, bias, dbias, seed,
                tl.program_id(1) * LANES + lane, tl.program_id(2) * BATCHES + one,
                GROUP, TOGETHER, ROWS, COLS, D, DV, WIDE, WIDE_V, PRECISION,
            )  # fmt: skip
            if LANES * BATCHES > 1:
                tl.debug_barrier()  # other threads of the program add to the same biases next


@triton.jit
def _query_block(
    q, k, v, dout, lse, delta, dq, lists, terms, bias, dbias, seed, lane, batch,
    GROUP: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, step, count, begin, end, fresh = block_of(lists)
    m = tl.arange(0, ROWS)
    x, ok = m // TOGETHER, m // TOGETHER < count
    kv_head, heads = lane * TOGETHER // GROUP, lane * TOGETHER + m % TOGETHER
    rows = local_rows(first, step, x, ok, lists.rows)
    row = row_terms(terms, seed, batch, heads, rows)
    side = _side(q, dout, lse, delta, k.at.dtype.element_ty, batch, rows, heads, ok, D, DV, WIDE, WIDE_V)
    sums = tl.zeros((ROWS, WIDE), tl.float32)
    for number in range(begin, end):
        entry = entry_of(lists, number)
        start, steps, full, before = phases(entry, count, COLS)
        for t in range(0, steps - full):
            sums = _differentiate(
                sums, side, row, x, heads, rows, ok, k, v, terms, bias, dbias, lists, batch, kv_head, entry,
                start + tl.where(t < before, t, t + full) * COLS,
                COLS, D, DV, WIDE, WIDE_V, PRECISION, True,
            )  # fmt: skip
        for t in range(before, before + full):
            sums = _differentiate(
                sums, side, row, x, heads, rows, ok, k, v, terms, bias, dbias, lists, batch, kv_head, entry,
                start + t * COLS,
                COLS, D, DV, WIDE, WIDE_V, PRECISION, False,
            )  # fmt: skip
    add_tokens(dq, batch, rows, heads, ok, fresh, sums * terms.scale, D, WIDE)


@triton.jit
def _side(
    q, dout, lse, delta, kind: tl.constexpr, batch, rows, heads, ok,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
):  # fmt: skip
    """Rows of q and dout, their lse and delta. The lse of rows that are not there or saw nothing is inf, so that their
    probabilities are 0."""
    queries = load_tokens(q, batch, rows, heads, ok, D, WIDE).to(kind)
    douts = load_tokens(dout, batch, rows, heads, ok, DV, WIDE_V).to(kind)
    sums, deltas = tl.load(places(lse, batch, rows, heads)), tl.load(places(delta, batch, rows, heads))
    sums = tl.where(sums == float("-inf"), float("inf"), sums)
    if ok is not None:
        sums = tl.where(ok, sums, float("inf"))
        deltas = tl.where(ok, deltas, 0.0)
    return queries, douts, (sums * LOG2E).to(tl.float32), deltas.to(tl.float32)


@triton.jit
def _differentiate(
    sums, side, row, x, heads, rows, ok, k, v, terms, bias, dbias, lists, batch, kv_head, entry, start,
    COLS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The sum of a block's dq over columns, with some more of them; adds their dbias."""
    queries, douts, lse, delta = side
    j = start + tl.arange(0, COLS)
    there = None
    if MASKED:
        there = j < entry[4]
    cols = local_rows(entry[2], entry[3], j, there, lists.cols)
    keys = load_tokens(k, batch, cols, kv_head, there, D, WIDE)
    values = load_tokens(v, batch, cols, kv_head, there, DV, WIDE_V)
    products = dot(queries, tl.trans(keys), None, PRECISION)
    logits, slope = logits_of(products, terms, bias, row, batch, heads, rows, cols, 1)
    seen = ok[:, None]
    if MASKED:
        seen = seen & in_band(entry, x[:, None], j[None, :])
        logits = tl.where(seen, logits, float("-inf"))
    p = tl.exp2(logits - lse[:, None])
    dp = dot(douts, tl.trans(values), None, PRECISION)
    if terms.boost is not None:
        dp = tl.where(kept(terms, row, cols, 1), dp * terms.boost, 0.0)
    dlogits = p * (dp - delta[:, None])
    if dbias.at is not None:
        at = bias_at(dbias, batch, heads, rows, tl.load(terms.k_at + cols), 1)
        tl.store(at, tl.load(at, mask=seen, other=0.0) + dlogits.to(at.dtype.element_ty), mask=seen)
    ds = dlogits * slope
    return dot(ds, keys, sums, PRECISION)


@triton.jit(do_not_specialize=["seed"])
def backward_keys(
    q, k, v, dout, lse, delta, dk, dv, lists, terms, bias, seed,
    GROUP: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a wave's dk and dv: a program for each block of keys, each KV head, each batch row. Here the keys are the
    rows of the work list, and its columns are queries."""
    first, step, count, begin, end, fresh = block_of(lists)
    y = tl.arange(0, COLS)
    ok = y < count
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    cols = local_rows(first, step, y, ok, lists.rows)
    keys = load_tokens(k, batch, cols, kv_head, ok, D, WIDE)
    values = load_tokens(v, batch, cols, kv_head, ok, DV, WIDE_V)
    sums = (tl.zeros((COLS, WIDE), tl.float32), tl.zeros((COLS, WIDE_V), tl.float32))
    for number in range(begin, end):
        entry = entry_of(lists, number)
        start, steps, full, before = phases(entry, count, ROWS // TOGETHER)
        for lane in range(kv_head * (GROUP // TOGETHER), (kv_head + 1) * (GROUP // TOGETHER)):
            for t in range(0, steps - full):
                sums = _gather(
                    sums, keys, values, y, cols, q, dout, lse, delta, terms, bias, lists, seed, batch, lane, entry,
                    start + tl.where(t < before, t, t + full) * (ROWS // TOGETHER),
                    TOGETHER, ROWS, D, DV, WIDE, WIDE_V, PRECISION, True,
                )  # fmt: skip
            for t in range(before, before + full):
                sums = _gather(
                    sums, keys, values, y, cols, q, dout, lse, delta, terms, bias, lists, seed, batch, lane, entry,
                    start + t * (ROWS // TOGETHER),
                    TOGETHER, ROWS, D, DV, WIDE, WIDE_V, PRECISION, False,
                )  # fmt: skip
    add_tokens(dk, batch, cols, kv_head, ok, fresh, sums[0] * terms.scale, D, WIDE)
    dvs = sums[1]
    if terms.boost is not None:
        dvs *= terms.boost
    add_tokens(dv, batch, cols, kv_head, ok, fresh, dvs, DV, WIDE_V)


@triton.jit
def _gather(
    sums, keys, values, y, cols, q, dout, lse, delta, terms, bias, lists, seed, batch, lane, entry, start,
    TOGETHER: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr,
    WIDE_V: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The sums of a block's dk and dv over query rows, with some more of them."""
    dk, dv = sums
    m = tl.arange(0, ROWS)
    i, heads = start + m // TOGETHER, lane * TOGETHER + m % TOGETHER
    ok = None
    if MASKED or ROWS % TOGETHER:  # rows left over belong to the next block
        ok = (i < entry[4]) & (m < ROWS // TOGETHER * TOGETHER)
    rows = local_rows(entry[2], entry[3], i, ok, lists.cols)
    row = row_terms(terms, seed, batch, heads, rows)
    queries, douts, lses, deltas = _side(q, dout, lse, delta, keys.dtype, batch, rows, heads, ok, D, DV, WIDE, WIDE_V)
    products = dot(keys, tl.trans(queries), None, PRECISION)
    logits, slope = logits_of(products, terms, bias, row, batch, heads, rows, cols, 0)
    if MASKED:
        logits = tl.where(in_band(entry, y[:, None], i[None, :]), logits, float("-inf"))
    p = tl.exp2(logits - lses[None, :])
    dp = dot(values, tl.trans(douts), None, PRECISION)
    given = p
    if terms.boost is not None:
        keep = kept(terms, row, cols, 0)
        given, dp = tl.where(keep, p, 0.0), tl.where(keep, dp * terms.boost, 0.0)
    dv = dot(given, douts, dv, PRECISION)
    ds = p * (dp - deltas[None, :]) * slope
    dk = dot(ds, queries, dk, PRECISION)
    return dk, dv
