"""Differences between the sharded and the single run, and how large one may be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringattn.check.observe import Truth
from ringattn.check.settings import Settings

MARGIN = 32.0  # times what other roundings did to the single run


def tolerance(settings: Settings, truth: Truth) -> float:
    """The relative difference always allowed. Transformers' norms and softmax compute in fp32 whatever the dtype."""
    if settings.dtype == "float32":
        return 1e-4
    return 1e-6 if truth.independent else 1e-10


def size(x: Tensor) -> float:
    """The largest absolute value; NaN counts as infinite."""
    return float(x.abs().max().nan_to_num(nan=torch.inf)) if x.numel() else 0.0


def allowed(right: Tensor, shaken: Tensor, relative: float) -> float:
    """The absolute difference from ``right`` that is rounding: of its size, or of what other roundings changed."""
    return max(relative * size(right), MARGIN * size(shaken.double() - right.double()))


def assemble(parts: Sequence[Tensor], positions: Sequence[Tensor], like: Tensor) -> Tensor | None:
    """The whole tensor, shaped ``like``, of every rank's part; None where no dim is that of the tokens.

    ``positions``: int64 ``[local_seqlen]`` of each rank.
    """
    dim = _token_dim([p.shape for p in parts], [len(at) for at in positions], like.shape)
    if dim is None:
        return None
    whole = torch.empty(like.shape, dtype=torch.float64)
    for part, at in zip(parts, positions, strict=True):
        whole.index_copy_(dim, at, part.double())
    return whole


def _token_dim(shapes: Sequence[torch.Size], lengths: Sequence[int], whole: torch.Size) -> int | None:
    seqlen = sum(lengths)
    order = sorted(range(len(whole)), key=lambda d: d != 1)  # dim 1 first: [batch, tokens, ...]
    for dim in order:
        expected = [(*whole[:dim], n, *whole[dim + 1 :]) for n in lengths]
        if whole[dim] == seqlen and all(tuple(s) == e for s, e in zip(shapes, expected, strict=True)):
            return dim
    return None
