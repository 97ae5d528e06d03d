"""Partial attention results over a subset of keys, and the one operation that joins them.

A partial result is the pair `(out, lse)`: the softmax-weighted mean of the values seen so far and the natural
logarithm of the softmax's denominator. Two partials over disjoint keys join into the one over their union:
`lse = log(exp(lse_a) + exp(lse_b))` and `out = out_a + w * (out_b - out_a)` with `w = exp(lse_b - lse)` (the
online softmax, Milakov & Gimelshein 2018, arXiv 1805.02867). The operation is associative with identity
`(0, -inf)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.kernels.passes import fold_into, join


@dataclass(frozen=True, slots=True)
class Partial:
    """Attention over a subset of the keys.

    out: `[batch, seqlen, num_heads, v_head_dim]`, fp32 (fp64 for fp64 inputs).
    lse: `[batch, num_heads, seqlen]`, natural log; -inf for rows that saw nothing. fp32, or fp64 while it runs: it is
    small, and each merge rounds it, which would otherwise add up over a long ring.

    Where nothing is merged out may be in the dtype of the inputs.
    """

    out: Tensor
    lse: Tensor

    def rows(self, rows: slice | Tensor) -> Partial:
        """A view of some query rows; the slice may have a step."""
        return Partial(self.out[:, rows], self.lse[:, :, rows])

    def heads(self, heads: slice) -> Partial:
        """A view of some query heads."""
        return Partial(self.out[:, :, heads], self.lse[:, heads])

    @staticmethod
    def empty(
        batch: int, seqlen: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> Partial:
        """The identity of `merge`: nothing seen yet, `out` 0 in `dtype` and `lse` -inf in fp64."""
        part = Partial.unset(batch, seqlen, num_heads, head_dim, dtype, device)
        part.out.zero_(), part.lse.fill_(-math.inf)
        return part

    @staticmethod
    def unset(
        batch: int, seqlen: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str,
        lse_dtype: torch.dtype = torch.float64,
    ) -> Partial:  # fmt: skip
        """Uninitialised memory, for rows that are written whole before they are merged with."""
        out = torch.empty(batch, seqlen, num_heads, head_dim, dtype=dtype, device=device)
        return Partial(out, torch.empty(batch, num_heads, seqlen, dtype=lse_dtype, device=device))


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What results and gradients are summed in, for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(a: Partial, b: Partial) -> Partial:
    """The partial over the union of two disjoint sets of keys, as new tensors."""
    lse, weight = join(a.lse, b.lse)
    return Partial(torch.lerp(a.out, b.out, weight.to(a.out.dtype)), lse)


def fold(acc: Partial, block_out: Tensor, block_lse: Tensor, fresh: bool = False) -> None:
    """`acc <- merge(acc, (block_out, block_lse))` in place; `acc` may be a view.

    `fresh` says that nothing was ever written to `acc`: the block is then copied. The block may be of a lower
    precision than `acc`.
    """
    if fresh:
        acc.out.copy_(block_out)
        acc.lse.copy_(block_lse)
        return
    fold_into(acc.out, acc.lse, block_out, block_lse)


def add_sinks(acc: Partial, sinks: Tensor) -> None:
    """Adds one more key a head, of logit `sinks [num_heads]` and value 0, to a result that has all its keys.

    Once, at the end: `lse <- log(exp(lse) + exp(sink))`, and `out` shrinks by what the sink takes. Backward needs
    nothing of it: probabilities follow from the new lse.
    """
    sinks = sinks.to(acc.lse.dtype)[:, None]
    joint = torch.logaddexp(acc.lse, sinks)
    kept = torch.exp(acc.lse - joint).masked_fill_(acc.lse == -math.inf, 0.0)
    acc.out.mul_(kept.transpose(1, 2).unsqueeze(-1).to(acc.out.dtype))
    acc.lse.copy_(joint)
