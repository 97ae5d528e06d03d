"""Scores: what becomes of `q k^T` on its way to the softmax, and which probabilities dropout keeps.

    logits = softcap * tanh(scale * q k^T / softcap) + bias        (no softcap: scale * q k^T + bias)
    out    = (keep / (1 - p) * softmax(logits)) v,   lse = log sum exp(logits)

A bias is a tensor or a rule of positions. Dropout keeps a pair by a hash of its global indices, so that neither
the number of ranks nor the order of tiles changes it. Kernels see one tile at a time, as `TileScores`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ringattn.tiles import Rows

Window = tuple[int | None, int | None]
WHOLE = slice(None)


class Rule(Protocol):
    """A bias that follows from positions. A new rule is one class here plus its place in `RULES`."""

    name: str
    params: Tensor  # what it is made of: all that another process needs to make the same rule

    def bias(self, heads: slice, q: Tensor, k: Tensor) -> Tensor:
        """`[1, heads or 1, nq, nk]` in the dtype of `params`, for positions `q [nq]` and `k [nk]`."""
        ...


class Alibi:
    """Attention with linear biases (Press et al., arXiv 2108.12409): `-slope * |q - k|` for each head."""

    name = "alibi"

    def __init__(self, slopes: Tensor) -> None:
        self.params = slopes

    def bias(self, heads: slice, q: Tensor, k: Tensor) -> Tensor:
        """See `Rule`."""
        distance = (q[:, None] - k).abs_().to(self.params.dtype)
        return (-self.params[heads, None, None] * distance).unsqueeze(0)


RULES = {Alibi.name: Alibi}


def alibi(slopes: Tensor | Sequence[float]) -> Rule:
    """ALiBi as a `bias` of :func:`attention`: query `q`, key `k` and head `h` get `-slopes[h] * |q - k|`.

    Args:
        slopes: `[num_heads]`, a tensor or numbers. Their gradient is not computed.

    Raises:
        ValueError: not one-dimensional, not finite, or a tensor that requires grad.
    """
    if isinstance(slopes, Tensor) and slopes.requires_grad:
        raise ValueError("alibi slopes require grad, and their gradient is not computed: pass slopes.detach()")
    slopes = torch.as_tensor(slopes)
    slopes = slopes.to(torch.promote_types(slopes.dtype, torch.float32))
    if slopes.ndim != 1 or not slopes.numel() or not slopes.isfinite().all():
        raise ValueError(f"alibi slopes {tuple(slopes.shape)}: must be one finite number for each query head")
    return Alibi(slopes)


@dataclass(frozen=True)
class Dropout:
    """Drops each probability with probability `p`; which ones is a function of `seed` and the global indices."""

    p: float
    seed: int


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
        asked = {
            "softcap": self.softcap,
            "bias": self.bias,
            "alibi": self.rule,
            "dropout": self.dropout,
        }
        return frozenset(name for name, value in asked.items() if value is not None)

    @property
    def positional(self) -> bool:
        """Whether tiles must know where their rows and columns lie."""
        return any(x is not None for x in (self.bias, self.rule, self.dropout))


@dataclass(frozen=True)
class Place:
    """Where a tile lies: its local query rows, the global positions of its rows and columns, and its query heads."""

    rows: Rows
    q: Tensor  # int64 [nq]
    k: Tensor  # int64 [nk]
    heads: slice


@dataclass(frozen=True)
class TileScores:
    """What a kernel is told of one tile. Blocks of it are named by `rows` and `cols`, slices of the tile."""

    window: Window
    scale: float
    softcap: float | None = None
    call: Scores | None = None  # set where bias, rule or dropout are
    place: Place | None = None

    def bias(self, rows: slice, cols: slice) -> Tensor | None:
        """What is added to the logits of a block, `[1|B, 1|heads, rows, cols]`, or None."""
        if self.call is None or self.place is None:
            return None
        if self.call.rule is not None:
            rule = self.call.rule.bias(self.place.heads, self.place.q[rows], self.place.k[cols])
            return rule if self.call.bias is None else rule + self._block(self.call.bias, rows, cols)
        return None if self.call.bias is None else self._block(self.call.bias, rows, cols)

    def keep(self, rows: slice, cols: slice, batch: int, dtype: torch.dtype) -> Tensor | None:
        """What dropout multiplies a block's probabilities with: 0 or `1 / (1 - p)`, `[batch, heads, rows, cols]`."""
        if self.call is None or self.place is None or self.call.dropout is None:
            return None
        dropout, place = self.call.dropout, self.place
        heads = torch.arange(place.heads.start, place.heads.stop, device=place.q.device)
        kept = _kept(dropout, torch.arange(batch, device=place.q.device), heads, place.q[rows], place.k[cols])
        return kept.to(dtype).mul_(1.0 / (1.0 - dropout.p))

    @property
    def wants_dbias(self) -> bool:
        """Whether backward owes :meth:`add_dbias`."""
        return self.call is not None and self.call.dbias is not None

    def add_dbias(self, rows: slice, cols: slice, dlogits: Tensor) -> None:
        """Adds the gradient of a block's logits, `[B, heads, rows, cols]`, to that of the bias tensor."""
        assert self.call is not None and self.call.dbias is not None and self.place is not None
        dbias = self.call.dbias
        if dbias.size(0) == 1:
            dlogits = dlogits.sum(0, keepdim=True)
        if dbias.size(1) == 1:
            dlogits = dlogits.sum(1, keepdim=True)
        q, k = _run(_rows_of(self.place.rows, rows, dbias.device)), _run(self.place.k[cols])
        heads = WHOLE if dbias.size(1) == 1 else self.place.heads
        if isinstance(q, slice) and isinstance(k, slice):
            dbias[:, heads, q, k] += dlogits
        else:
            index = torch.arange(dbias.size(2), device=dbias.device)[q][:, None], self.place.k[cols]
            dbias[:, heads][:, :, *index] += dlogits  # the rows and columns of a tile are distinct

    def _block(self, bias: Tensor, rows: slice, cols: slice) -> Tensor:
        assert self.place is not None
        bias = bias if bias.size(1) == 1 else bias[:, self.place.heads]
        return bias[:, :, _run(_rows_of(self.place.rows, rows, bias.device))][..., _run(self.place.k[cols])]


def _rows_of(rows: Rows, part: slice, device: torch.device) -> Tensor:
    """The local rows of a block."""
    if isinstance(rows, slice):
        return torch.arange(rows.start, rows.stop, rows.step or 1, device=device)[part]
    return torch.as_tensor(rows[part], device=device)


def _run(index: Tensor) -> Tensor | slice:
    """Positions as a slice where they are evenly spaced: a view instead of a copy."""
    if index.device.type != "cpu" or not index.numel():
        return index
    step = int(index[1] - index[0]) if index.numel() > 1 else 1
    if step < 1 or not bool((index.diff() == step).all()):
        return index
    return slice(int(index[0]), int(index[-1]) + 1, step)


def _kept(dropout: Dropout, batch: Tensor, heads: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """True where a pair is kept, `[batch, heads, nq, nk]`: a 32-bit hash of (seed, batch, head, q) and k."""
    row = _mix64(batch + _mix64(torch.tensor(dropout.seed, device=q.device)))
    row = _mix64(row[:, None] + heads)
    row = _mix64(row[..., None] + q).to(torch.int32)
    x = row[..., None] ^ _mix64(k).to(torch.int32)
    # lowbias32 (Wellons, "Prospecting for hash functions", 2018), in place: products wrap
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, None)):
        x ^= (x >> shift).bitwise_and_((1 << (32 - shift)) - 1)
        if factor is not None:
            x *= factor
    return x >= int(dropout.p * (1 << 32)) - (1 << 31)


def _mix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014) on int64, products wrapping."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, None)):
        x = x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))
        if factor is not None:
            x = x * factor
    return x
