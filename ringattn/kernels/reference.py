"""The definition of correct: dense attention with explicit scores, for any dtype, device and head size.

Scores, softmax and gradients are written out as in the textbook and computed in the accumulators' precision
(fp32, fp64 for fp64 inputs). Memory grows with `nq * nk`; it is there to be read, compared with and fallen
back on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ringattn.kernels.base import Call, Grads, Rows
from ringattn.merge import Partial, fold
from ringattn.scores import TileScores, Window

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Reference:
    name = "reference"
    reads_delta = True

    def refuse(self, call: Call) -> str | None:
        if call.dtype not in FLOATING:
            return f"dtype {call.dtype} is not floating point (float16, bfloat16, float32, float64)"
        return refuse_features(call)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores, acc: Partial, fresh: bool) -> None:
        with torch.autocast(q.device.type, enabled=False):
            dtype = acc.out.dtype
            logits = _logits(_grouped(q.to(dtype), k), k.to(dtype), scores.window, scores.scale)
            peak = logits.amax(-1, keepdim=True)
            p = torch.exp(logits - peak)
            total = p.sum(-1, keepdim=True)
            out = torch.einsum("bhgqk,bkhd->bqhgd", p / total, v.to(dtype))
            lse = (peak + total.log()).squeeze(-1)
        fold(acc, out.flatten(2, 3), lse.flatten(1, 2), fresh)

    def backward(self, rows: Rows, k: Tensor, v: Tensor, scores: TileScores, grads: Grads) -> None:
        with torch.autocast(k.device.type, enabled=False):
            assert rows.delta is not None, "this kernel reads delta"
            dtype = grads.dq.dtype
            q, dout = _grouped(rows.q.to(dtype), k), _grouped(rows.dout.to(dtype), k)
            k, v = k.to(dtype), v.to(dtype)
            heads = (k.size(2), q.size(3))
            lse = rows.lse.to(dtype).unflatten(1, heads).unsqueeze(-1)
            delta = rows.delta.to(dtype).unflatten(1, heads).unsqueeze(-1)
            p = torch.exp(_logits(q, k, scores.window, scores.scale) - lse)
            dp = torch.einsum("bqhgd,bkhd->bhgqk", dout, v)
            ds = p * (dp - delta) * scores.scale
            grads.dq.add_(torch.einsum("bhgqk,bkhd->bqhgd", ds, k).flatten(2, 3))
            grads.dk.add_(torch.einsum("bhgqk,bqhgd->bkhd", ds, q))
            grads.dv.add_(torch.einsum("bhgqk,bqhgd->bkhd", p, dout))


def refuse_features(call: Call) -> str | None:
    """The reason why a call's extra features cannot be had, or None if it asks for none."""
    if not call.features:
        return None
    return f"{', '.join(sorted(call.features))} not computed by any kernel yet"


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


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """`[B, n, H, D]` as `[B, n, Hkv, H / Hkv, D]`: consecutive query heads share a KV head."""
    return x.unflatten(2, (k.size(2), -1))


def _logits(q: Tensor, k: Tensor, window: Window, scale: float) -> Tensor:
    """`[B, Hkv, group, nq, nk]`, -inf outside the band."""
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q, k) * scale
    mask = band_mask(q.size(1), k.size(1), window, q.device)
    return scores if mask is None else scores.masked_fill_(~mask, -math.inf)
