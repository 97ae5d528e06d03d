"""The definition of correct: dense attention with explicit scores, for any dtype, device, head size and feature.

Scores, softmax and gradients are written out as in the textbook and computed in the accumulators' precision
(fp32, fp64 for fp64 inputs). Memory grows with `nq * nk`; it is there to be read, compared with and fallen
back on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ringattn.kernels.base import Call, Grads, Rows
from ringattn.kernels.calls import TileKernel
from ringattn.kernels.partial import Partial, accumulator_dtype, fold
from ringattn.kernels.scores import FEATURES, Block, TileScores, Window

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Reference(TileKernel):
    name = "reference"
    reads_delta = True

    def refuse(self, call: Call) -> str | None:
        return refuse_what_is_unknown(call)

    def forward_tile(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores, acc: Partial, fresh: bool) -> None:
        with torch.autocast(q.device.type, enabled=False):
            dtype, group, block = acc.out.dtype, q.size(2) // k.size(2), _whole(q, k)
            keys, values = (x.to(dtype).repeat_interleave(group, 2) for x in (k, v))
            logits, _ = _logits(q.to(dtype), keys, scores, block)
            peak = logits.amax(-1, keepdim=True)
            peak = peak.masked_fill(peak == -math.inf, 0.0)  # rows that see nothing: exp(-inf - 0) is 0
            p = torch.exp(logits - peak)
            total = p.sum(-1, keepdim=True)
            p = p / total.masked_fill(total == 0, 1.0)
            out = torch.einsum("bhqk,bkhd->bqhd", _dropped(p, scores, block), values)
            lse = (peak + total.log()).squeeze(-1)
        fold(acc, out, lse, fresh)

    def backward_tile(self, rows: Rows, k: Tensor, v: Tensor, scores: TileScores, grads: Grads) -> None:
        with torch.autocast(k.device.type, enabled=False):
            assert rows.delta is not None, "this kernel reads delta"
            grads, dtype = grads.begun(), accumulator_dtype(k.dtype)
            group, block = rows.q.size(2) // k.size(2), _whole(rows.q, k)
            q, dout, lse, delta = (x.to(dtype) for x in (rows.q, rows.dout, rows.lse, rows.delta))
            keys, values = (x.to(dtype).repeat_interleave(group, 2) for x in (k, v))
            logits, slope = _logits(q, keys, scores, block)
            lse = lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)
            p = torch.exp(logits - lse)
            dp = _dropped(torch.einsum("bqhd,bkhd->bhqk", dout, values), scores, block)
            dlogits = p * (dp - delta.unsqueeze(-1))
            if scores.wants_dbias:
                scores.add_dbias(block, dlogits)
            ds = dlogits * slope * scores.scale
            if grads.dq is not None:
                grads.dq.add_(torch.einsum("bhqk,bkhd->bqhd", ds, keys))
            if grads.dk is not None:
                grads.dk.add_(_summed(torch.einsum("bhqk,bqhd->bkhd", ds, q), group))
            if grads.dv is not None:
                grads.dv.add_(_summed(torch.einsum("bhqk,bqhd->bkhd", _dropped(p, scores, block), dout), group))


def refuse_what_is_unknown(call: Call) -> str | None:
    """The reason why a kernel that computes every dtype and feature cannot compute this call, or None."""
    if call.dtype not in FLOATING:
        return f"dtype {call.dtype} is not floating point (float16, bfloat16, float32, float64)"
    if unknown := call.features - FEATURES:
        return f"{', '.join(sorted(unknown))} is no feature of scores ({', '.join(sorted(FEATURES))})"
    return None


def band_mask(nq: int, nk: int, window: Window, device: torch.device) -> Tensor | None:
    """True where query i attends key j, `[nq, nk]`; None for a full rectangle."""
    left, right = window
    if left is None and right is None:
        return None
    rows = torch.arange(nq, device=device)[:, None] + (nk - nq)
    distance = torch.arange(nk, device=device) - rows
    allowed = torch.ones(nq, nk, dtype=torch.bool, device=device)
    if left is not None:
        allowed &= distance >= -left
    if right is not None:
        allowed &= distance <= right
    return allowed


def _whole(q: Tensor, k: Tensor) -> Block:
    """The tile as one block."""
    return Block(slice(0, q.size(0)), slice(0, q.size(2)), slice(0, q.size(1)), slice(0, k.size(1)))


def _logits(q: Tensor, keys: Tensor, scores: TileScores, block: Block) -> tuple[Tensor, Tensor | float]:
    """Logits `[B, H, nq, nk]`, -inf outside the band, and their derivative by `scale * q k^T`."""
    logits: Tensor = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scores.scale
    slope: Tensor | float = 1.0
    if scores.softcap is not None:
        bent = torch.tanh(logits / scores.softcap)
        logits, slope = scores.softcap * bent, 1.0 - bent.square()
    if (bias := scores.bias(block)) is not None:
        logits = logits + bias.to(logits.dtype)
    mask = band_mask(*block.shape, scores.window, q.device)
    return logits if mask is None else logits.masked_fill_(~mask, -math.inf), slope


def _dropped(p: Tensor, scores: TileScores, block: Block) -> Tensor:
    keep = scores.keep(block, p.dtype)
    return p if keep is None else p * keep


def _summed(x: Tensor, group: int) -> Tensor:
    """The gradient of a KV head: that of its query heads, which are consecutive."""
    return x.unflatten(2, (-1, group)).sum(3)
