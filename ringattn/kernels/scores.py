"""Scores: what becomes of `q k^T` on its way to the softmax, and which probabilities dropout keeps.

    logits = softcap * tanh(scale * q k^T / softcap) + bias        (no softcap: scale * q k^T + bias)
    out    = (keep / (1 - p) * softmax(logits)) v,   lse = log sum exp(logits)

A bias is a tensor or a rule of positions. Dropout keeps a pair by a hash of its global indices, so that neither
the number of ranks nor the order of tiles changes it. Kernels see one tile at a time, as `TileScores`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ringattn.arguments.tensors import FLOATS, plain
from ringattn.arguments.values import shown
from ringattn.geometry.tiles import RowIndex, Window

WHOLE = slice(None)
# What scales, softcaps and slopes lie between. fp32 holds numbers up to 2**128 and, in full, down to 2**-126. Of q, k
# within fp16's range, 2**16, and head sizes up to 2**9, products are below 2**41; times scale / softcap, at most 2**80,
# they are below 2**121, and so are gradients on their way through a softcap.
SMALLEST, GREATEST = 2.0**-40, 2.0**40


class Rule(Protocol):
    """A bias that follows from positions. A new rule is one class here plus its place in `RULES`."""

    name: str
    params: Tensor  # what it is made of: all that another process needs to make the same rule

    def bias(self, heads: slice, q: Tensor, k: Tensor) -> Tensor:
        """`[1, heads or 1, nq, nk]` in the dtype of `params`, for positions `q [nq]` and `k [nk]`."""
        ...

    def refuse(self, num_heads: int) -> str | None:
        """None if it fits so many query heads, else what does not, with the remedy."""
        ...


class Alibi:
    """Attention with linear biases (Press et al., arXiv 2108.12409): `-slope * |q - k|` for each head."""

    name = "alibi"

    def __init__(self, slopes: Tensor) -> None:
        self.params = slopes

    def bias(self, heads: slice, q: Tensor, k: Tensor) -> Tensor:
        """See `Rule`."""
        distance = (q.double()[:, None] - k.double()).abs_().to(self.params.dtype)  # fp64: exact below 2^53, and fast
        return (-self.params[heads, None, None] * distance).unsqueeze(0)

    def refuse(self, num_heads: int) -> str | None:
        """See `Rule`."""
        found = int(self.params.shape[0])
        if found == num_heads:
            return None
        return f"alibi has {found} slopes, q has {num_heads} heads: ringattn.alibi(slopes[{num_heads}])"


RULES = {Alibi.name: Alibi}
FEATURES = frozenset({"softcap", "bias", "dropout", *RULES})  # what a kernel may have to do beyond band and scale


def alibi(slopes: Tensor | Sequence[float]) -> Rule:
    """ALiBi as a `bias` of :func:`attention`: query `q`, key `k` and head `h` get `-slopes[h] * |q - k|`.

    Args:
        slopes: `[num_heads]`, a tensor or numbers. Their gradient is not computed.

    Numbers are kept in fp64. A call takes slopes in the precision that it adds up in, fp32, or fp64 for fp64 inputs.

    Raises:
        ValueError: not one-dimensional, not finite, beyond 2**40, or a tensor that requires grad.
    """
    if isinstance(slopes, Tensor) and slopes.requires_grad:
        raise ValueError("alibi slopes require grad, and their gradient is not computed: pass slopes.detach()")
    try:
        made = slopes if isinstance(slopes, Tensor) else torch.as_tensor(slopes, device="cpu")
        if made.is_floating_point() and not hasattr(slopes, "dtype"):
            made = torch.as_tensor(slopes, dtype=torch.float64, device="cpu")
    except (TypeError, RuntimeError, ValueError, OverflowError):
        raise ValueError(f"alibi slopes={shown(slopes)}: must be one finite number for each query head") from None
    if plain("alibi slopes", made).is_floating_point() and made.dtype not in FLOATS:
        raise ValueError(f"alibi slopes are {made.dtype}: must be float16, bfloat16, float32 or float64, or integers")
    if made.is_complex() or made.dtype == torch.bool:
        raise ValueError(f"alibi slopes are {made.dtype}: must be real numbers")
    made = made.to(torch.promote_types(made.dtype, torch.float32))
    fine = torch.compiler.is_compiling() or bool((made.abs() <= GREATEST).all())  # values are no matter of a graph
    if made.ndim != 1 or not made.numel() or not fine:
        raise ValueError(
            f"alibi slopes {tuple(made.shape)}: must be one finite number for each query head, at most 2**40 either way"
        )
    return Alibi(made)


@dataclass(frozen=True)
class Dropout:
    """Drops each probability with probability `p`; which ones is a function of `seed` and the global indices."""

    p: float
    seed: int

    @property
    def mixed(self) -> int:
        """A hash of the seed, 64 bits: what those of batch rows are made of."""
        return _mixed(self.seed)


@dataclass(frozen=True)
class Scores:
    """How one attention call makes logits.

    bias: `[1|B, 1|H, local_seqlen, kv_seqlen]`, keys in global order; dbias: its gradient, added to in backward.
    """

    scale: float
    softcap: float | None = None
    bias: Tensor | None = None
    dbias: Tensor | None = None
    rule: Rule | None = None
    dropout: Dropout | None = None

    @property
    def features(self) -> frozenset[str]:
        """What a kernel must be able to do."""
        asked = {"softcap": self.softcap, "bias": self.bias, "dropout": self.dropout}
        rule = set() if self.rule is None else {self.rule.name}
        return frozenset(rule.union(name for name, value in asked.items() if value is not None))

    @property
    def of_logits(self) -> Scores:
        """The same of the logits alone: dropout is of what follows from them."""
        return replace(self, dropout=None, dbias=None)

    @property
    def positional(self) -> bool:
        """Whether tiles must know where their rows and columns lie."""
        return any(x is not None for x in (self.bias, self.rule, self.dropout))


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a tile: slices of its batch rows, query heads, query rows and key columns, each with both bounds."""

    batch: slice
    heads: slice
    rows: slice
    cols: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.stop - self.rows.start, self.cols.stop - self.cols.start

    @property
    def tokens(self) -> tuple[slice, slice, slice]:
        """Its queries in a tensor `[batch, rows, heads, *]` of the tile."""
        return self.batch, self.rows, self.heads


@dataclass(frozen=True)
class Place:
    """Where a tile lies: its local query rows, the global positions of its rows and columns, and its query heads.
    ``first_head``: the query head at which bias tensors begin."""

    rows: RowIndex
    q: Tensor  # int64 [nq]
    k: Tensor  # int64 [nk]
    heads: slice
    first_head: int = 0

    @property
    def bias_heads(self) -> slice:
        """Its query heads in a bias tensor."""
        return slice(self.heads.start - self.first_head, self.heads.stop - self.first_head)

    def heads_of(self, block: Block) -> slice:
        """The query heads of a block, as the attention call counts them."""
        return _within(self.heads, block.heads)

    def rows_of(self, block: Block) -> slice | Tensor:
        """The local query rows of a block."""
        if not isinstance(self.rows, slice):
            return _run(torch.as_tensor(self.rows[block.rows], device=self.q.device))
        start, step = self.rows.start or 0, self.rows.step or 1
        return slice(start + step * block.rows.start, start + step * (block.rows.stop - 1) + 1, step)

    @cached_property
    def hashes(self) -> tuple[Tensor, Tensor, Tensor]:
        """int32 hashes of the heads, the query positions and the key positions."""
        heads = torch.arange(self.heads.start, self.heads.stop, device=self.q.device)
        heads, q, k = (_mix64(x).to(torch.int32) for x in (heads, self.q, self.k))
        return heads, q, k


class Bounds(NamedTuple):
    """Where packed tiles begin and end: int32 ``[tiles + 1]``, of their rows and of their columns, on the device, and
    how long the longest is."""

    q: Tensor
    k: Tensor
    longest_q: int
    longest_k: int


@dataclass(frozen=True)
class TileScores:
    """What a kernel is told of one tile."""

    window: Window
    scale: float
    softcap: float | None = None
    call: Scores | None = None  # set where bias, rule or dropout are
    place: Place | None = None
    bounds: Bounds | None = None  # of packed tiles, each with the window; only kernels that made them are given any

    def bias(self, block: Block) -> Tensor | None:
        """What is added to the logits of a block, `[1|batch, 1|heads, rows, cols]`, or None."""
        if self.call is None or self.place is None or (self.call.rule is None and self.call.bias is None):
            return None
        place, rule, bias = self.place, self.call.rule, None
        if self.call.bias is not None:
            batch, heads = _of_block(self.call.bias, block, place)
            bias = self.call.bias[batch, heads, place.rows_of(block)][..., _run(place.k[block.cols])]
        if rule is None:
            return bias
        ruled = rule.bias(place.heads_of(block), place.q[block.rows], place.k[block.cols])
        return ruled if bias is None else ruled + bias

    def keep(self, block: Block, dtype: torch.dtype) -> Tensor | None:
        """What dropout multiplies a block's probabilities with, 0 or `1 / (1 - p)`: `[batch, heads, rows, cols]`."""
        if self.call is None or self.place is None or self.call.dropout is None:
            return None
        dropout, (heads, q, k) = self.call.dropout, self.place.hashes
        hashes = heads[block.heads], q[block.rows], k[block.cols]
        kept = [_kept(dropout, b, *hashes) for b in range(block.batch.start, block.batch.stop)]
        return torch.stack(kept).to(dtype).mul_(1.0 / (1.0 - dropout.p))

    @property
    def wants_dbias(self) -> bool:
        """Whether backward owes :meth:`add_dbias`."""
        return self.call is not None and self.call.dbias is not None

    def add_dbias(self, block: Block, dlogits: Tensor) -> None:
        """Adds the gradient of a block's logits, `[batch, heads, rows, cols]`, to that of the bias tensor."""
        assert self.call is not None and self.call.dbias is not None and self.place is not None
        dbias = self.call.dbias
        for dim in (0, 1):
            if dbias.size(dim) == 1:
                dlogits = dlogits.sum(dim, keepdim=True)
        home = dbias[_of_block(dbias, block, self.place)]
        rows, cols = self.place.rows_of(block), _run(self.place.k[block.cols])
        if isinstance(rows, slice) and isinstance(cols, slice):
            home[:, :, rows, cols] += dlogits
            return
        index = torch.arange(dbias.size(2), device=dbias.device)[rows][:, None], self.place.k[block.cols]
        home[:, :, *index] += dlogits  # the rows and the columns of a tile are distinct


def _of_block(bias: Tensor, block: Block, place: Place) -> tuple[slice, slice]:
    """A block's batch rows and heads in a bias, whose dims of size 1 hold for all."""
    return (
        WHOLE if bias.size(0) == 1 else block.batch,
        WHOLE if bias.size(1) == 1 else _within(place.bias_heads, block.heads),
    )


def _within(heads: slice, part: slice) -> slice:
    return slice(heads.start + part.start, heads.start + part.stop)


def _run(index: Tensor) -> Tensor | slice:
    """Positions as a slice where they are evenly spaced: a view instead of a copy."""
    if index.device.type != "cpu" or not index.numel():
        return index
    step = int(index[1] - index[0]) if index.numel() > 1 else 1
    if step < 1 or not bool((index.diff() == step).all()):
        return index
    return slice(int(index[0]), int(index[-1]) + 1, step)


def _kept(dropout: Dropout, batch: int, heads: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """1 where a pair is kept, else 0, int32 `[heads, nq, nk]`, given the hashes of heads, rows and columns."""
    row = _mix32(_mix32(heads ^ _key(dropout.seed, batch))[:, None] ^ q)
    return _mix32(row[..., None] ^ k).ge_(int(dropout.p * (1 << 32)) - (1 << 31))


@lru_cache(maxsize=256)
def _key(seed: int, batch: int) -> int:
    return int(_mix64(torch.tensor(_mixed(seed), device="cpu") + batch).to(torch.int32))


@lru_cache(maxsize=256)
def _mixed(seed: int) -> int:
    return int(_mix64(torch.tensor(seed, device="cpu")))


def _mix32(x: Tensor) -> Tensor:
    """In place on int32, products wrapping: lowbias32 (Wellons, "Prospecting for hash functions", 2018) without its
    outer shifts, as arguments are hashes and the highest bits decide."""
    x.mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_((1 << 17) - 1))
    return x.mul_(0x846CA68B - (1 << 32))


def _mix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014) on int64, products wrapping."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, None)):
        x = x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))
        if factor is not None:
            x = x * factor
    return x
