"""What the sdpa kernel asks of an operator, and the CPU's.

An operator computes a full rectangle, a square below its diagonal, or a rectangle with an additive mask.
Tensors here are head-major, `[batch, heads, length, head_dim]`, with any strides but a contiguous last dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from ringattn.kernels.base import Rows

DLSE_COLUMNS = 8  # keeps head sizes a multiple of eight


@dataclass(frozen=True, slots=True)
class Query:
    """The query side of a backward call: `[batch, heads, nq, *]`; lse and dlse `[batch, heads, nq]`."""

    q: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor
    dlse: Tensor | None

    @staticmethod
    def of(rows: Rows, head_major: Callable[[Tensor], Tensor]) -> Query:
        """The rows, `head_major` applied to q and dout; out is read once only, as it lies."""
        q, dout = head_major(rows.q), head_major(rows.dout)
        return Query(q, dout, cast(rows.out, q.dtype).transpose(1, 2), rows.lse, rows.dlse)

    def map(self, change: Callable[[Tensor], Tensor]) -> Query:
        """The same change to every tensor; the rows are their third dim."""
        dlse = None if self.dlse is None else change(self.dlse)
        return Query(change(self.q), change(self.dout), change(self.out), change(self.lse), dlse)


class Operator(Protocol):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`out` and its natural-log `lse`, `[batch, heads, nq]`."""
        ...

    def backward(
        self, query: Query, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`dq, dk, dv`, given the global out and lse; there may be padding columns behind them."""
        ...


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
# Below so many keys the CPU operator finds the largest score of a row one by one, and passes over NaN: a row of
# nothing else comes out as zeros, with an lse of 0. (The numbers of one AVX-512 register.)
VECTOR = 16


def _holds_nan(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """Bool `[batch, heads, nq]`: the rows of which a score that counts is NaN."""
    scores = q @ k.repeat_interleave(q.size(1) // k.size(1), 1).transpose(2, 3)
    nan = scores.isnan()
    if causal:
        nan = nan.tril()
    if mask is not None:
        nan = nan & (mask != -torch.inf)
    return nan.any(-1)


class CpuFlash:
    """`aten::_scaled_dot_product_flash_attention_for_cpu`: fp32 and fp64, GQA, causal aligned top-left."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        if k.shape[2] < VECTOR:
            lost = (lse == 0) & (out == 0).all(-1)
            if lost.any():
                nan = lost & _holds_nan(q, k, causal, mask)
                out, lse = out.masked_fill(nan[..., None], torch.nan), lse.masked_fill(nan, torch.nan)
        return out, lse

    def backward(
        self, query: Query, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, k, v = (query, k, v) if query.dlse is None else carry_dlse(query, k, v)
        return _flash_backward(x.dout, x.q, k, v, x.out, x.lse, 0.0, causal, attn_mask=mask, scale=scale)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; itself where it is (`Tensor.to` takes six microseconds for nothing, a hundred times a call)."""
    return x if x.dtype == dtype else x.to(dtype)


def head_major(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, n, H, D]` as `[B, H, n, D]` whose rows lie together, copied unless they do: operators stream them faster."""
    x = x.transpose(1, 2)
    if x.dtype == dtype and x.stride(2) == x.size(3):
        return x
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)


def carry_dlse(query: Query, k: Tensor, v: Tensor) -> tuple[Query, Tensor, Tensor]:
    """The same inputs, but with a rowsum(dout * out) that is less by dlse.

    A fused backward subtracts delta = rowsum(dout * out) from dP and takes no delta of its own. Where lse has
    a gradient, delta - dlse is wanted: extra head columns hold 1 in dout and -dlse in out (in three parts, so
    that nothing is lost in 16 bits) and 0 elsewhere. The first columns of the gradients are then exact.
    """
    if query.dlse is None:
        return query, k, v
    head_dim, width = query.out.size(-1), (0, DLSE_COLUMNS)
    q, k, v, out = pad(query.q, width), pad(k, width), pad(v, width), pad(query.out, width)
    dout, rest = pad(query.dout, width, value=1.0), -query.dlse
    for column in range(head_dim, head_dim + 3):
        out[..., column] = rest
        rest = rest - out[..., column]
    return Query(q, dout, out, query.lse, None), k, v
