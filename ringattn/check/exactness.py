"""A context's output and gradients against those of one process in fp64, each rank its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.attention import attention
from ringattn.context import ContextParallel
from ringattn.masks import Mask, causal, documents, global_tokens, sliding_window
from ringattn.testing import Results, dense_results, results

MOST = 1024  # tokens, where these leave each rank one: dense attention of all is computed on every rank
EXACT = 1e-10  # relative, in fp64
LARGEST = torch.finfo(torch.float64).max


@dataclass(frozen=True)
class Sizes:
    """Of a call: tokens a rank, heads, KV heads, and their size."""

    tokens: int
    heads: int
    kv_heads: int
    dim: int

    def seqlen(self, world: int) -> int:
        """Of all ranks: one more than divides evenly."""
        return max(min(self.tokens * world, MOST), world) + 1


SIZES = {"cpu": Sizes(23, 8, 2, 16), "cuda": Sizes(251, 8, 2, 64)}


@dataclass(frozen=True)
class Deviation:
    """The tensor that is most off, by what is allowed: the root mean square of its errors over its largest number."""

    error: float
    allowed: float
    what: str

    @property
    def weight(self) -> float:
        return min(self.error / self.allowed, LARGEST)

    def __str__(self) -> str:
        size = f"{self.error:.1e}" if self.error < LARGEST else "not a number"
        return f"error {size} ({self.what}) of {self.allowed:.1e} allowed"


class Exactness:
    """The same q, k, v and gradients of results on every rank, and what one process makes of them for a few masks:
    computed once each, with memory for the pairs of all tokens and of the heads over one KV head."""

    def __init__(self, world: int, device: torch.device) -> None:
        self.sizes, self.device = SIZES[device.type], device
        self.seqlen = n = self.sizes.seqlen(world)
        within = documents([0, n // 3, n // 3 + 1, n - n // 4, n]) & sliding_window(n // 6, n // 9)
        around = sliding_window(n // 8, n // 8) | global_tokens(2)
        self.masks: dict[str, Mask] = {"causal": causal(), "documents and a window": within, "global tokens": around}
        self._known: dict[tuple[str, torch.dtype], tuple[Results, list[float]]] = {}

    def worst(self, cp: ContextParallel, mask: str, dtype: torch.dtype) -> Deviation:
        """This rank's part of a call, forward and backward: a call of all ranks of ``cp``."""
        truth, allowed = self._truth(mask, dtype)
        q, k, v, dout, dlse = self._tensors(dtype)
        leaves = [cp.shard(x).requires_grad_() for x in (q, k, v)]
        out, lse = attention(leaves[0], leaves[1], leaves[2], cp=cp, mask=self.masks[mask], return_lse=True)
        found = results(out, lse, cp.shard(dout), cp.shard(dlse, dim=2).to(lse.dtype), leaves)
        deviations = []
        for name, mine, whole, within in zip(Results._fields, found, truth, allowed, strict=True):
            right = cp.shard(whole, dim=2 if name == "lse" else 1)
            deviations.append(Deviation(_difference(mine, right, whole), within, f"{name}, {mask}"))
        return max(deviations, key=lambda one: one.weight)

    def _tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and the gradients of out and lse."""
        draw, sizes = torch.Generator().manual_seed(0), self.sizes
        heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads, sizes.heads)
        shapes = [(1, self.seqlen, number, sizes.dim) for number in heads]
        made = [torch.randn(shape, generator=draw) for shape in (*shapes, (1, sizes.heads, self.seqlen))]
        return [x.to(self.device, dtype) for x in made]

    def _truth(self, mask: str, dtype: torch.dtype) -> tuple[Results, list[float]]:
        """What one process gives in fp64, and how far from it a call in ``dtype`` may be, relative to the largest
        number: twice what the same computation on one device is in that dtype, or two roundings."""
        if (mask, dtype) not in self._known:
            tensors = self._tensors(dtype)
            dense = self.masks[mask].dense(self.seqlen, self.seqlen).to(self.device)
            truth = _dense(dense, [x.double() for x in tensors])
            if dtype == torch.float64:
                allowed = [EXACT] * len(truth)
            else:
                alone, rounding = _dense(dense, tensors), 2 * torch.finfo(dtype).eps
                errors = [_difference(a, whole, whole) for a, whole in zip(alone, truth, strict=True)]
                allowed = [max(2 * error, rounding) for error in errors]
            self._known[mask, dtype] = truth, allowed
        return self._known[mask, dtype]


def _dense(mask: Tensor, tensors: Sequence[Tensor]) -> Results:
    """Dense attention, by the heads that share a KV head, one such group after the other."""
    q, k, v, dout, dlse = tensors
    group = q.shape[2] // k.shape[2]
    parts = []
    for one in range(k.shape[2]):
        heads, kv = slice(one * group, (one + 1) * group), slice(one, one + 1)
        parts.append(dense_results(q[:, :, heads], k[:, :, kv], v[:, :, kv], mask, dout[:, :, heads], dlse[:, heads]))
    return Results(*(torch.cat(of, 1 if of[0].dim() == 3 else 2) for of in zip(*parts, strict=True)))


def _difference(found: Tensor, right: Tensor, whole: Tensor) -> float:
    """Root mean square, relative to the largest number of the whole; NaN counts as the largest number there is."""
    if not found.numel():
        return 0.0
    off = (found.double() - right).square().mean().sqrt() / whole.abs().max()
    return float(off.nan_to_num(nan=LARGEST, posinf=LARGEST))
