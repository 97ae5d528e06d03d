"""What the three Triton kernels have in common: where rows lie, which pairs a tile has, and what becomes of scores.

Logits are in units of log 2. Rows are those of all query heads that are computed together. `AXIS` is the axis along
which a matrix of scores runs over columns: 1 where queries are its rows, 0 where keys are.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
BLOCK_FIELDS = tl.constexpr(6)
ENTRY_FIELDS = tl.constexpr(7)


@triton.jit
def block_of(lists):
    """The record of this program's block, see `worklist.BLOCK`."""
    at = lists.blocks + tl.program_id(0) * BLOCK_FIELDS
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def entry_of(lists, number):
    """The record of an entry, see `worklist.ENTRY`."""
    at = lists.entries + number * ENTRY_FIELDS
    x0, x1, first, step = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    return x0, x1, first, step, tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)


@triton.jit
def phases(entry, count, WIDTH: tl.constexpr):
    """The columns that an entry reaches, in steps of `WIDTH`: where they begin, how many steps there are, and how many
    in the middle, after how many others, have no pair outside the band, for none of the block's `count` rows."""
    x0, x1, _, _, there, lo, hi = entry
    begin, end = tl.maximum(x0 + lo, 0), tl.minimum(x1 + hi, there)
    before = (tl.maximum(x1 - 1 + lo - begin, 0) + WIDTH - 1) // WIDTH
    inner = tl.minimum(x0 + hi + 1, there) - (begin + before * WIDTH)
    full = tl.where((x0 == 0) & (x1 == count), tl.maximum(inner, 0) // WIDTH, 0)
    return begin, (end - begin + WIDTH - 1) // WIDTH, full, before


@triton.jit
def in_band(entry, x, j):
    """Whether row `x` of the block and column `j` of the tile are a pair."""
    x0, x1, _, _, there, lo, hi = entry
    distance = j - x
    return (distance >= lo) & (distance <= hi) & (x >= x0) & (x < x1) & (j < there)


@triton.jit
def local_rows(first, step, number, ok, index):
    """Local rows of a run; where not `ok`, the first of them, which is there."""
    if ok is not None:
        number = tl.where(ok, number, 0)
    rows = first + step * number
    if index is not None:
        rows = tl.where(step == 0, tl.load(index + first + number, mask=(number >= 0) & (step == 0), other=0), rows)
    return rows


@triton.jit
def places(x, batch, rows, heads):
    """Where rows of a tensor begin."""
    return x.at + (batch.to(tl.int64) * x.batch + rows.to(tl.int64) * x.row + heads.to(tl.int64) * x.head)


@triton.jit
def load_tokens(x, batch, rows, heads, ok, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a tensor, `[n, PADDED]`, 0 where not `ok` and beyond their size."""
    dims = tl.arange(0, PADDED)
    at = places(x, batch, rows, heads)[:, None] + dims[None, :]
    if ok is not None:
        if SIZE == PADDED:
            return tl.load(at, mask=ok[:, None], other=0.0)
        else:
            return tl.load(at, mask=ok[:, None] & (dims[None, :] < SIZE), other=0.0)
    else:
        if SIZE == PADDED:
            return tl.load(at)
        else:
            return tl.load(at, mask=dims[None, :] < SIZE, other=0.0)


@triton.jit
def add_tokens(x, batch, rows, heads, ok, fresh, part, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Adds to rows of a tensor, which no other program has, or writes them where nothing is in them yet."""
    dims = tl.arange(0, PADDED)
    at = places(x, batch, rows, heads)[:, None] + dims[None, :]
    there = ok[:, None] & (dims[None, :] < SIZE)
    kind: tl.constexpr = x.at.dtype.element_ty
    old = tl.load(at, mask=there & (fresh == 0), other=0.0)
    tl.store(at, (old.to(tl.float32) + part).to(kind), mask=there)


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """`a b + sums`, with `a` in the dtype of `b`. Of "wide" products the factors are fp32 whatever they were."""
    if PRECISION == "wide":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(a.to(b.dtype), b, sums, input_precision=PRECISION)


@triton.jit
def mix32(x):
    """See `ringattn.kernels.scores._mix32`."""
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    return x * -0x7B935975


@triton.jit
def mix64(x):
    """See `ringattn.kernels.scores._mix64`."""
    x = x - 0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def row_terms(terms, seed, batch, heads, rows):
    """What the scores of some rows have in common: slope, position, hash, and where their biases begin."""
    slope = heads
    at = heads
    hashed = heads
    if terms.slopes is not None:
        slope = tl.load(terms.slopes + heads)
        at = tl.load(terms.q_at + rows)
    if terms.boost is not None:
        key = mix64(seed.to(tl.int64) + batch).to(tl.int32)
        hashed = mix32(mix32(tl.load(terms.head_hash + heads) ^ key) ^ tl.load(terms.q_hash + rows))
    return slope, at, hashed


@triton.jit
def bias_at(bias, batch, heads, rows, cols_at, AXIS: tl.constexpr):
    """Where a block's biases lie."""
    lines = places(bias, batch, rows, heads)
    return tl.expand_dims(lines, AXIS) + tl.expand_dims(cols_at.to(tl.int64) * bias.col, 1 - AXIS)


@triton.jit
def tanh(x):
    """Exact to fp32's rounding: a polynomial where `1 - exp` would cancel (minimax in `x^2`, relative error 3e-9)."""
    far = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1.0 - far) / (1.0 + far)
    z = x * x
    near = (((-0.00584539 * z + 0.02074751) * z - 0.05376677) * z + 0.13331664) * z - 0.33333282
    return tl.where(tl.abs(x) < 0.6, x + x * z * near, tl.where(x < 0, -far, far))


@triton.jit
def logits_of(products, terms, bias, row, batch, heads, rows, cols, AXIS: tl.constexpr):
    """Logits of the products of queries and keys, and with a softcap their derivative by `scale * products`."""
    slope = 1.0
    if terms.softcap is not None:
        bent = tanh(products * (terms.scale / terms.softcap))
        logits = bent * (terms.softcap * LOG2E)
        slope = 1.0 - bent * bent
    else:
        logits = products * (terms.scale * LOG2E)
    if terms.slopes is not None:
        distance = tl.expand_dims(row[1], AXIS) - tl.expand_dims(tl.load(terms.k_at + cols), 1 - AXIS)
        logits -= tl.expand_dims(row[0], AXIS) * tl.abs(distance).to(tl.float32) * LOG2E
    if bias.at is not None:
        at = bias_at(bias, batch, heads, rows, tl.load(terms.k_at + cols), AXIS)
        logits += tl.load(at).to(tl.float32) * LOG2E
    return logits, slope


@triton.jit
def kept(terms, row, cols, AXIS: tl.constexpr):
    """Whether dropout keeps a pair."""
    hashes = tl.expand_dims(row[2], AXIS) ^ tl.expand_dims(tl.load(terms.k_hash + cols), 1 - AXIS)
    return mix32(hashes) >= terms.least
